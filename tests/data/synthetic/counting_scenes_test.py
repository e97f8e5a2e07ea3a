"""Questions that are answered after a countdown.

Oracle: `answers_anew`, which reads the question's text and counts in the drawn scene without the generator; a countdown
is recounted from the question.
"""

import re

import pytest
from answers_anew import recount

from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.sources.spec import problems
from qwenla_jax.text.response_format import parse

N = 200


def source(keys, **more):
    return make_source(f"counting_scenes#{keys}", "held_out", seed=4, **more)


@pytest.mark.parametrize("keys", ["numbers=0", "numbers=1-10", "numbers=53"])
def test_questions_and_responses(keys):
    low, high = (int(x) for x in re.findall(r"\d+", keys + "-" + keys.split("=")[1])[:2])
    records, reflecting, lengths = source(keys), 0, set()
    for index in range(N):
        record, scene = records[index], records.scene(index)
        counted = re.match(r"From (\d+) to (\d+) count\. ", record.question)
        numbers = [str(n) for n in range(int(counted[1]), int(counted[2]) - 1, -1)] if counted else []
        question = record.question.removeprefix(counted[0]) if counted else record.question
        assert record.answer == recount(scene, question), question
        parsed = parse(record.response)
        text = {section.name: section.text for section in parsed.sections}
        assert parsed.ok and text["CONCLUSION"] == record.answer
        assert text["CAPTION"].split()[0] == str(len(scene.objects))
        reasoning = text["REASONING"].rpartition(": ")[0]
        assert (reasoning.split(",") if reasoning else []) == numbers and low <= len(numbers) <= high
        lengths.add(len(numbers))
        if "REFLECTION" in text:
            reflecting += 1
            seen = text["REFLECTION"].removeprefix("look again: ").split(", ")
            assert sorted(seen) == sorted(f"{o.size} {o.color} {o.shape}" for o in scene.objects)
    assert lengths == set(range(low, high + 1)) and abs(reflecting / N - 0.5) < 0.12


def test_neither_countdown_nor_share_changes_what_is_asked():
    short, long = source("numbers=0&reflect=1"), source("numbers=20&reflect=0.0")
    for index in range(20):
        assert long[index].question.partition(" count. ")[2] == short[index].question
        assert "REFLECTION" in short[index].response and "REFLECTION" not in long[index].response


def test_a_long_countdown_before_what_the_caption_says():
    records = source("numbers=1-50&asks=total&reflect=1")
    for index in range(N):
        first, last = map(
            int, re.match(r"From (\d+) to (\d+) count\. How many objects", records[index].question).groups()
        )
        text = {section.name: section.text for section in parse(records[index].response).sections}
        assert text["REASONING"] == ",".join(map(str, range(first, last - 1, -1))) + ": objects"
        assert "REFLECTION" not in text
        assert records[index].answer == text["CONCLUSION"] == str(len(records.scene(index).objects))


@pytest.mark.parametrize("keys", ["numbers=5-2", "numbers=0-81", "numbers=x", "tokens=16", "asks=no", "reflect=2"])
def test_a_wrong_name_is_refused(keys):
    (text,) = problems(f"counting_scenes#{keys}")
    assert "numbers=LOW-HIGH" in text or "expected LOW-HIGH" in text
    assert keys in text
