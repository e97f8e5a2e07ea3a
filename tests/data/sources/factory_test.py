"""Sources by name: which records a split holds, against the files read by hand."""

import collections
import json

import pytest
from dataset_faults import open_dataset
from PIL import Image

from qwenla_jax.data.contamination import find_leaks, take_fingerprints
from qwenla_jax.data.sources.factory import image_files, make_source, readable, sources_of
from qwenla_jax.data.sources.skip_invalid import TooManyInvalid


def ids(source):
    return [source[i].id for i in range(len(source))]


def entry_ids(name, split, **more):
    source = make_source(name, split, seed=0, **more)
    return [source.raw_record(i).id for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """MathVision's layout: 60 questions, of which 7 has no answer, 8 no image and 9 a broken one."""
    Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    rows = []
    for n in range(60):
        options = ["x", "y", "z"] if n % 2 else []
        answer = "" if n == 7 else "A" if n % 2 else "1"
        image = {8: "none.png", 9: "bad.png"}.get(n, "good.png")
        subject = "algebra" if n % 3 else "counting"
        rows.append(
            {"id": str(n), "question": "q", "options": options, "answer": answer, "subject": subject, "image": image}
        )
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_tenth_is_held_out_and_a_problems_steps_stay_together(shared_data):
    name = f"we_math:{shared_data / 'we_math'}"
    train, held = (entry_ids(name, split) for split in ("train", "held_out"))
    dataset = open_dataset(name)
    assert sorted(train + held) == sorted(dataset.raw_record(i).id for i in range(len(dataset))) and held
    problems = [{each.rpartition("/")[0] for each in side} for side in (train, held)]
    assert not problems[0] & problems[1]
    assert entry_ids(name, "train", whole=True) == [dataset.raw_record(i).id for i in range(len(dataset))]
    assert entry_ids(name, "train", size=3) == train[:3]
    sources = [make_source(name, split, seed=0) for split in ("train", "held_out")]
    assert not find_leaks(*(take_fingerprints(source, "x") for source in sources)).leaks


@pytest.mark.parametrize("held", ["val", "test"])
def test_own_splits_count(tmp_path, held):
    for split, numbers in (("train", range(3)), (held, range(3, 5))):
        for number in numbers:
            place = tmp_path / split / str(number)
            place.mkdir(parents=True)
            Image.new("RGB", (30, 30)).save(place / "img_diagram.png")
            row = {"problem_text": "q", "choices": ["1", "2", "3", "4"], "answer": "B"}
            (place / "data.json").write_text(json.dumps(row))
    name = f"geometry3k:{tmp_path}"
    for whole in (False, True):
        assert entry_ids(name, "train", whole=whole) == ["train/0", "train/1", "train/2"]
        assert entry_ids(name, "held_out", whole=whole) == [f"{held}/3", f"{held}/4"]


def test_parquet_files_of_splits(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for name in ("train-0", "train-1", "validation-0", "test-0", "testmini-0"):
        table = pa.table({"id": [f"{name}/{i}" for i in range(2)], "question": ["q"] * 2, "answer": ["1"] * 2})
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    assert entry_ids(f"parquet:{tmp_path}", "train") == ["train-0/0", "train-0/1", "train-1/0", "train-1/1"]
    assert entry_ids(f"parquet:{tmp_path}", "held_out") == ["validation-0/0", "validation-0/1"]


def test_supervised_training_needs_responses(folder, tmp_path):
    with pytest.raises(ValueError, match="mathvision: its records have no responses, and supervised training needs"):
        make_source(f"mathvision:{folder}", "cold_start", seed=0, max_invalid=100)
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "<SUMMARY>a</SUMMARY><CAPTION>a</CAPTION>"}]
    turns[1]["value"] += "<REASONING>a</REASONING><CONCLUSION>4</CONCLUSION>"
    rows = [{"id": str(n), "image": "good.png", "conversations": turns} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = make_source(f"llava_cot:{tmp_path}", "cold_start", seed=0, whole=True)
    assert (source[0].answer, source[0].response) == ("4", turns[1]["value"])
    lines = [{"id": str(n), "image": "good.png", "question": "q", "answer": "1"} for n in range(3)]
    lines[1]["response"] = turns[1]["value"]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert entry_ids(str(tmp_path / "x.jsonl"), "cold_start", whole=True, max_invalid=2) == ["1"]
    with pytest.raises(ValueError, match="2 records cannot be used .no_response 2.*(?s:.*)x.jsonl:3: response is miss"):
        make_source(str(tmp_path / "x.jsonl"), "cold_start", seed=0, whole=True, max_invalid=1)


def test_what_the_text_rules_out_is_left_out_up_to_a_number(folder):
    name = f"mathvision:{folder}"
    with pytest.raises(ValueError, match=r"1 records cannot .*\(empty_answer 1\), at most 0 (?s:.*)jsonl:8: the an"):
        make_source(name, "train", seed=0)
    source = make_source(name, "train", seed=0, whole=True, max_invalid=1)
    assert [source.raw_record(i).id for i in range(len(source))] == [str(n) for n in range(60) if n != 7]
    # What goes through by index leaves broken images out, too.
    with pytest.raises(TooManyInvalid, match="more than 2 records cannot be used .*(?s:.*)bad.png"):
        readable(source, 2)
    assert ids(readable(source, 3)) == [str(n) for n in range(60) if n not in (7, 8, 9)]


def test_filters(folder):
    source = make_source(
        f"mathvision:{folder}#kinds=counting&max_options=2", "train", seed=0, whole=True, max_invalid=1
    )
    assert ids(source) == [str(n) for n in range(60) if n % 2 == 0 and n % 3 == 0]
    assert source.left_out == {"many_options": 30, "other_kind": 20} and len(source.faults) == 0


def test_a_mixture_keeps_its_proportions_and_what_is_held_out_stands_once(folder):
    name = f"mathvision:{folder}*3,scenes*1"
    mixed = make_source(name, "train", seed=0, max_invalid=1, size=1200)
    places = [mixed.source.place(i)[0] for i in range(1200)]
    for start in range(0, 1200, 4):
        assert collections.Counter(places[start : start + 4]) == {"mathvision": 3, "scenes": 1}
    assert sources_of(mixed).keys() == {"mathvision", "scenes"}
    one = entry_ids(f"mathvision:{folder}", "train", max_invalid=1)
    drawn = [mixed.source.place(i)[1] for i, source in enumerate(places) if source == "mathvision"]
    assert sorted(drawn[: len(one)]) == list(range(len(one)))  # a whole pass before any comes again
    first = next(i for i, source in enumerate(places) if source == "scenes")
    assert mixed[first].id.startswith("scenes/scene-0-train-")
    twice = f"mathvision:{folder}*1,mathvision:{folder}#kinds=counting*1"
    held = make_source(twice, "held_out", seed=0, max_invalid=2)
    every = [entry_ids(part, "held_out", max_invalid=1) for part in twice.replace("*1", "").split(",")]
    assert sorted(ids(held)) == sorted([f"mathvision/{n}" for n in every[0]] + [f"mathvision.2/{n}" for n in every[1]])
    once = make_source(twice, "train", seed=0, max_invalid=2, whole=True, once=True)
    assert len(once) == 59 + 20 and len({once.source.place(i) for i in once._indices}) == 79


def test_images_in_files_of_their_own_are_known(folder):
    result = image_files(make_source(f"mathvision:{folder}", "train", seed=0, whole=True, max_invalid=1))
    assert result["3"] == folder / "good.png" and result["9"] == folder / "bad.png" and len(result) == 59
    mixed = make_source(f"mathvision:{folder},scenes", "train", seed=0, whole=True, max_invalid=1, size=100)
    assert image_files(mixed)["mathvision/3"] == folder / "good.png"
