"""Questions with reasoning of a chosen length.

Oracle: a solver of its own, which reads the question's text and counts in the drawn scene, and a reader that checks a
reasoning line by line; neither imports the generator. Lengths are those of the embedded tokenizer.
"""

import collections
import re
import types
from pathlib import Path

import pytest

import qwenla_jax
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.sources.spec import parse, problems
from qwenla_jax.data.synthetic.length_options import WORKINGS, LengthOptions
from qwenla_jax.text.conversation import encode_response
from qwenla_jax.text.response_format import parse as sections_of
from qwenla_jax.text.tokenizer import Tokenizer

N = 150
WORDS = "size", "color", "shape", "mark"
ASSETS = next(path.parent for path in Path(qwenla_jax.__file__).parent.rglob("tokenizer.json"))


def source(keys="", seed=4, **more):
    return make_source(f"length_scenes#{keys}" if keys else "length_scenes", "held_out", seed=seed, **more)


def solve(question, objects):
    """(result of the working, answer) from the question's text and the objects alone."""
    work, asked = re.match(r"(From .*?\.) (.*)", question).groups()
    start, end, *numbers = map(int, re.findall(r"\d+", work))
    if "add" in work:
        added, result = numbers
        for _ in range(start, end, -1):
            result = (result + added) % 10
    else:
        (result,) = numbers
    named = lambda words: next(o for o in objects if (o.size, o.color, o.shape) == tuple(words.split()))  # noqa: E731
    if choice := re.fullmatch(r"What mark is on the (.*) if even, on the (.*) if odd\?", asked):
        return result, named(choice[1 + result % 2]).mark
    if mark := re.fullmatch(r"Add: How many objects have a (\w+) mark\?", asked):
        seen = [o for o in objects if o.mark == mark[1]]
    else:
        word = re.fullmatch(r"Add: How many (\w+?)s?(?: shapes)? are there\?", asked)[1]
        seen = [o for o in objects if word in (o.size, o.color, o.shape)]
    return result, str((result + len(seen)) % 10)


def check_reasoning(text, question):
    """The last number of a reasoning of which each step follows from the one before and from the question."""
    start, end, *numbers = map(int, re.findall(r"\d+", question))
    *steps, last = text.split(",")
    value = numbers[-1]
    for step, counter in zip(steps, range(start, end, -1), strict=True):
        if "+" in step:
            assert step == f"{counter}:{value}+{numbers[0]}"
            value = (value + numbers[0]) % 10
        else:
            assert step == f"{counter} there are the objects"
    assert last == f"{end}:{value}"
    return value


@pytest.mark.parametrize(
    "keys", ["tokens=16-64&working=chain|filler&order=after|paper", "tokens=160&words=no&order=after|paper"]
)
def test_questions_and_responses(keys):
    records = source(keys)
    kinds, answers = collections.Counter(), collections.defaultdict(collections.Counter)
    for index in range(N):
        record, objects = records[index], records.scene(index).objects
        result, answer = solve(record.question, objects)
        assert record.answer == answer, record.question
        kinds[record.kind] += 1
        answers[record.kind][answer] += 1
        parts = sections_of(record.response).sections
        text = {part.name: part.text for part in parts}
        assert len(text) == len(parts) == 5
        assert check_reasoning(text["REASONING"], record.question) == result
        assert re.match(f"{result}(\\+| {'odd' if result % 2 else 'even'} )", text["CONCLUSION"])
        assert text["CONCLUSION"].endswith(f"\\boxed{{{answer}}}")
        marked = {f"{o.size} {o.color} {o.shape} {o.mark}" for o in objects}
        if parts[1].name == "CAPTION":  # the paper's order
            assert [part.name for part in parts] == ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"]
            assert set(text["CAPTION"].split(", ")) == {name.rpartition(" ")[0] for name in marked}
            seen = set(text["REFLECTION"].removeprefix("look again: ").split(", "))
            assert seen == ({""} if "words=no" in keys else marked)
        else:
            assert [part.name for part in parts] == ["SUMMARY", "REASONING", "REFLECTION", "CAPTION", "CONCLUSION"]
            assert text["REFLECTION"] == ("" if "words=no" in keys else "look again")
            assert set(text["CAPTION"].split(", ")) == marked
    assert min(kinds.values()) > N / 5
    assert all(max(count.values()) < 0.45 * kinds[kind] for kind, count in answers.items())


def test_lengths_change_the_reasoning_alone():
    tok = Tokenizer.from_folder(ASSETS)
    for working in ("chain", "filler"):
        seen = []
        for tokens in (16, 64, 160, 320):
            records = source(f"tokens={tokens}&working={working}")
            texts = [records[index] for index in range(8)]
            reasons = [re.search("<REASONING>(.*)</REASONING>", record.response)[1] for record in texts]
            assert all(abs(len(tok.encode(reason)) - tokens) <= 3 for reason in reasons)
            asked = [(r.kind, r.question.partition(".")[2]) for r in texts]
            seen.append([*asked, *(re.search("<CAPTION>.*</CAP", r.response)[0] for r in texts)])
        assert seen[0] == seen[1] == seen[2] == seen[3]
    plain = source("tokens=16", style="plain")[0].response
    structured = source("tokens=16")[0].response
    assert plain.splitlines() == [text for text in re.split("<.*?>", structured) if text not in ("", "look again")]


@pytest.mark.parametrize("order", ["after", "paper"])
def test_told_scenes(order):
    """The question alone answers them; they are not the images' scenes."""
    tok, told_again = Tokenizer.from_folder(ASSETS), 0
    records = source(f"tokens=16-160&working=chain|filler&order={order}&told=yes")
    for index in range(N):
        record = records[index]
        text = {part.name: part.text for part in sections_of(record.response).sections}
        work, told, asked = re.fullmatch(r"(From .*?\.) Told: (.*?)\. (.*)", record.question).groups()
        objects = [types.SimpleNamespace(**dict(zip(WORDS, thing.split(), strict=True))) for thing in told.split(", ")]
        result, answer = solve(f"{work} {asked}", objects)
        assert record.answer == answer and check_reasoning(text["REASONING"], work) == result
        listing = text["CAPTION"] if order == "after" else text["REFLECTION"].removeprefix("look again: ")
        assert listing == told
        seen = {f"{o.size} {o.color} {o.shape} {o.mark}" for o in records.scene(index).objects}
        told_again += set(told.split(", ")) == seen
        assert len(tok.encode(record.question)) <= 93  # with an image and the chat's own tokens 128
    assert not told_again


@pytest.mark.parametrize("style", ["structured", "plain"])
def test_cut_responses(style):
    """They are the beginnings of the whole ones, reasoning included; no end of a response is trained behind them."""
    tok = Tokenizer.from_folder(ASSETS)
    keys = "tokens=16-160&working=chain|filler&order=after|paper"
    whole, cut = source(keys, style=style), source(f"{keys}&cut=yes", style=style)
    for index in range(N):
        record, other = whole[index], cut[index]
        assert (other.question, other.answer) == (record.question, record.answer)
        ending = "</REASONING>" if style == "structured" else re.search(r"\d\d:\d(?!\+)", record.response)[0]
        assert other.response == record.response[: record.response.index(ending) + len(ending)]
        ids = encode_response(other.response, tok, other.complete)
        assert ids == encode_response(record.response, tok, record.complete)[: len(ids)]
        assert tok.ids.im_end not in ids


@pytest.mark.parametrize("told", [True, False])
def test_the_setting_names_the_options(told):
    one = LengthOptions(11, 64, WORKINGS, ("paper", "after"), words=False, told=told, cut=not told)
    for options in (LengthOptions(), one):
        assert LengthOptions.of(parse(options.setting())[0].keys) == options


def test_a_wrong_name_is_refused():
    for keys, message in (
        ("tokens=3", "from 7 to 564"),
        ("tokens=64-16", "LOW-HIGH"),
        ("working=none", "chain|filler"),
        ("order=mine", "after|paper"),
        ("words=perhaps", "words=yes"),
        ("told=perhaps", "told=yes"),
        ("cut=perhaps", "cut=yes"),
        ("length=16", "tokens=LOW-HIGH"),
    ):
        (text,) = problems(f"length_scenes#{keys}")
        assert message in text and keys in text
    assert [part.keys for part in parse("length_scenes#tokens=16*3,length_scenes#working=filler")] == [
        {"tokens": "16"},
        {"working": "filler"},
    ]
