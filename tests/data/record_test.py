"""JSONL files as users write them, good and broken; easy-VQA against its own answers."""

import json

import pytest
from PIL import Image

from qwenla_jax.data.datasets import rows
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.synthetic.easy_vqa import EasyVqaSource
from qwenla_jax.text.answers.match import matches

GOOD = {"id": "a", "image": "images/a.png", "question": "what?", "answer": "b"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG no")
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_records(folder):
    path = write(folder, GOOD, "", GOOD | {"id": "b", "response": "r", "kind": "k"})
    source = opened(path, "train", whole=True)
    assert [(r.id, r.response, r.kind) for r in (source[0], source[1])] == [("a", None, "question"), ("b", "r", "k")]
    assert source[0].images[0].size == (30, 20) and len(source) == 2
    assert source[0].options == ()
    asked = write(folder, GOOD | {"options": ["red", "B is blue"]})
    assert opened(asked, "train", whole=True)[0].options == ("red", "B is blue")


def test_placeholders_wrappings_and_options_of_a_line(folder):
    options = ["A. red", "B. blue"]
    path = write(
        folder,
        GOOD
        | {"question": "<image>\nWhich?\nA. red\nB. blue", "options": options, "answer": "<answer> B. blue </answer>"},
        GOOD | {"id": "b", "options": {"A": "red", "B": "blue"}, "answer": "blue", "question": "  kept as it is \n"},
    )
    source = opened(path, "train", whole=True)
    assert [r.question for r in (source[0], source[1])] == ["Which?\nA. red\nB. blue", "  kept as it is \n"]
    assert [r.options for r in (source[0], source[1])] == [("red", "blue")] * 2
    assert [matches("B", r.answer, r.options) for r in (source[0], source[1])] == [True, True]
    assert [matches("A", r.answer, r.options) for r in (source[0], source[1])] == [False, False]


def test_a_line_without_an_end_is_no_line(folder, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    with pytest.raises(ValueError, match="data.jsonl:2: has more than 1,000 bytes; expected an object a line"):
        opened(write(folder, GOOD, " " * 5000), "train")


def opened(path, split, **more):
    return make_source(str(path), split, seed=0, **more)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1]", "holds a list"),
        ({k: v for k, v in GOOD.items() if k != "answer"}, "answer is missing"),
        (GOOD | {"answer": [3]}, "answer is \\[3\\]; expected text"),
        (GOOD | {"response": ["x"]}, "response is \\['x'\\]; expected text"),
        (GOOD | {"options": "red;blue"}, "the options 'red;blue' do not start with 'A.'"),
        (GOOD | {"options": ["red", []]}, "the options are \\['red', \\[\\]\\]; expected a list"),
        (GOOD | {"image": "images/none.png"}, "image 'images/none.png': no such file"),
        (GOOD | {"id": "first"}, "id 'first' stands at .*data.jsonl:1 already"),
        (GOOD | {"image": None}, "image is missing; expected the path"),
        (GOOD | {"image": [3]}, "image holds 3 for an image; expected a path, base64 or a data URL"),
        (GOOD | {"question": "<image> and <image>?"}, "the question has places for 2 .*, the record has 1"),
        (GOOD | {"question": "<video> what?"}, "the question has a place for a video"),
        (GOOD | {"question": "x\ud800"}, "question holds half of a character \\('.ud800' at 1\\)"),
        (GOOD | {"answer": "\udc80"}, "answer holds half of a character"),
        (GOOD | {"response": "r\udfff"}, "response holds half of a character"),
        (GOOD | {"id": "\ud800"}, "id holds half of a character"),
        (GOOD | {"kind": "\ud800"}, "kind holds half of a character"),
        (GOOD | {"options": ["a", "\ud800"]}, "option B holds half of a character"),
        (GOOD | {"image": "\ud800.png"}, "image '.ud800.png': no such file"),
        (GOOD | {"options": ["red", "blue"], "answer": "green"}, "the answer 'green' is none of the options A, B"),
        (GOOD | {"answer": "<answer>3"}, "the answer '<answer>3' is wrapped in <answer>, which no response repeats"),
        (GOOD | {"question": "x" * 1_000_001}, "question has 1,000,001 characters; at most 1,000,000"),
        ('{"id": ' + "[" * 200_000, "nested more than 100 deep"),
        ('{"id": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_broken_line_is_named(folder, line, message):
    path = write(folder, GOOD | {"id": "first"}, line)
    with pytest.raises(ValueError, match=rf"data.jsonl:2: {message}"):
        opened(path, "train", whole=True)


def test_a_broken_image_and_an_empty_file_are_named(folder):
    source = opened(write(folder, GOOD | {"image": "images/broken.png"}), "train", whole=True)
    with pytest.raises(ValueError, match="broken.png: starts like a PNG but its header is broken or cut off"):
        source[0]
    with pytest.raises(ValueError, match="holds no question"):
        opened(write(folder), "train")
    with pytest.raises(ValueError, match="data.jsonl:1: response is missing"):
        opened(write(folder, GOOD), "cold_start")
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        make_source("nothing.jsonl", "train", seed=0)


def test_a_tenth_is_held_out_and_nothing_is_in_both(folder):
    path = write(folder, *(GOOD | {"id": str(i)} for i in range(500)))
    train, held = (opened(path, split) for split in ("train", "held_out"))
    ids = [{source[i].id for i in range(len(source))} for source in (train, held)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 500 and 30 < len(held) < 70


def test_easy_vqa_is_the_packages():
    easy_vqa = pytest.importorskip("easy_vqa")
    source = EasyVqaSource("held_out")
    questions, answers, images = easy_vqa.get_test_questions()
    assert len(source) == len(questions) == 9673
    want = sorted(zip(questions, answers, strict=True))
    got = sorted((q, a) for q, a, _ in source._rows)
    assert got == want
    record = source[0]
    assert record.images[0].size == (64, 64) and record.answer in easy_vqa.get_answers()
    # What is put together from an image's questions never contradicts one of their answers.
    whole = 0
    for question, answer, image in source._rows[:2000]:
        facts = source._facts[image]
        if len(facts) < 2:
            continue
        whole += 1
        words = question.rstrip("?").split()
        if answer in ("yes", "no"):
            true = bool(set(words) & set(facts)) != bool({"no", "not"} & set(words))
            assert answer == ("yes" if true else "no"), (question, facts)
        else:
            assert answer in facts
    assert whole > 1700
    cold = EasyVqaSource("cold_start")
    assert all(cold[i].response for i in range(300)) and 35_000 < len(cold) < 38_575
