"""LLaVA-CoT, Geometry3K and PolyMATH as their own files, written here in the published layouts."""

import json

import pytest
from dataset_faults import check, open_dataset
from PIL import Image

from qwenla_jax.data.datasets.geometry3k import geometry3k
from qwenla_jax.data.datasets.llava_cot import llava_cot, stands_alone
from qwenla_jax.data.datasets.polymath import polymath
from qwenla_jax.data.datasets.readers import READERS
from qwenla_jax.data.datasets.scemqa import scemqa
from qwenla_jax.data.datasets.we_math import we_math


def make_image(path, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def answer(text):
    return (
        f"<SUMMARY> s </SUMMARY>\n\n<CAPTION> c </CAPTION>\n\n<REASONING> r </REASONING>\n\n"
        f"<CONCLUSION> {text} </CONCLUSION>"
    )


def talk(*turns):
    said = []
    for question, response in turns:
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": response}]
    return said


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_llava_cot_gives_each_turn_that_stands_alone(tmp_path):
    make_image(tmp_path / "coco/train2017/000000000009.jpg")
    make_image(tmp_path / "sqa/train/4/image.png", (40, 20))
    image = "coco/train2017/000000000009.jpg"
    several = talk(
        ("<image>\nWhat color is it?", answer("red")),
        ("Is it large?", answer("no")),
        ("How many cars are in this image?", answer("2")),
        ("Why?", answer("because")),
        ("What is the man on the left wearing?", answer("a hat")),
    )
    path = jsonl(
        tmp_path / "train.jsonl",
        {"id": "a", "image": image, "conversations": several},
        "",
        {"id": "b", "image": "sqa/train/4/image.png", "conversations": talk(("Which?\n<image>", answer("B")))},
        {"id": "b", "image": image, "conversations": talk(("Other?\n<image>", answer("C")))},
        {"id": "b", "image": "sqa/train/4/image.png", "conversations": talk(("Which?\n<image>", answer("B")))},
    )
    dataset = llava_cot(tmp_path)
    good = [dataset[i] for i in range(5)]
    assert [r.id for r in good] == ["a", "a#2", "a#4", "b", "b@4"]
    assert [r.question for r in good] == [
        "What color is it?",
        "How many cars are in this image?",
        "What is the man on the left wearing?",
        "Which?",
        "Other?",
    ]
    assert [r.answer for r in good] == ["red", "2", "a hat", "B", "C"]
    assert good[1].response == answer("2") and [r.kind for r in good] == ["coco"] * 3 + ["sqa", "coco"]
    assert good[3].images[0].size == (40, 20) and dict(dataset.refused) == {"turn_points_back": 2}
    result = check(dataset)
    assert [(p.where, p.reason) for p in result.problems] == [(f"{path}:5", "duplicate_id")]
    assert "left out, turn_points_back: 2" in result.text()
    first = llava_cot(path, later_turns=False)
    assert len(first) == 4 and first.refused["later_turn"] == 4


@pytest.mark.parametrize(
    "question, alone",
    [
        ("What color is the bus?", True),
        ("What is shown in this image?", True),
        ("How many people are sitting at the table?", True),
        ("What color is that?", False),
        ("What about the dog?", False),
        ("And the cat?", False),
        ("Is there anything else?", False),
        ("Is he smiling?", False),
        ("Where is the other one?", False),
        ("why?", False),
        ("How?", False),
        ("Are you sure?", False),
        ("", False),
    ],
)
def test_turns_that_stand_alone(question, alone):
    assert stands_alone(question) is alone


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conversations": talk(("q", "no tags"))}, "turn 0 is not in the format"),
        ({"conversations": talk(("q", "<CONCLUSION>x</CONCLUSION>"))}, "not in the format"),
        ({"conversations": talk(("", answer("x")))}, "question is empty"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, r"conversations\[0\] is from 'gpt'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "ends with a question"),
        ({"conversations": []}, "expected a list"),
        ({"conversations": [3]}, r"conversations\[0\] is '3'"),
        ({"image": "../secret.png"}, "expected one below"),
        ({"image": "/etc/x.png"}, "expected one below"),
        ({"image": None}, "image is missing"),
        ({"image": "none.png"}, "cannot be read"),
        ({"id": None}, "id is missing"),
    ],
)
def test_llava_cot_rows_that_cannot_be_used(tmp_path, change, message):
    make_image(tmp_path / "a.png")
    row = {"id": "x", "image": "a.png", "conversations": talk(("q", answer("x")))}
    path = jsonl(tmp_path / "train.jsonl", row | {"id": "good"}, row | change)
    dataset = llava_cot(path)
    assert dataset[0].id == "good"
    with pytest.raises(ValueError, match=message):
        dataset[1]
    (problem,) = check(dataset).problems
    assert problem.where == f"{path}:2" and check(dataset).invalid == 1


def test_geometry3k(tmp_path):
    row = {
        "problem_text": "Find x.",
        "choices": ["1", "2.5", "3"],
        "answer": "C",
        "id": 11,
        "problem_type_goal": ["Angle"],
    }
    for number in (2, 10):
        folder = tmp_path / "train" / str(number)
        make_image(folder / "img_diagram.png", (number + 20, 30))
        marked = row | {"annotat_text": "Find $x$"} if number == 10 else row
        (folder / "data.json").write_text(json.dumps(marked))
    (tmp_path / "train" / "30").mkdir()
    (tmp_path / "train" / "30" / "data.json").write_text("{")
    dataset = geometry3k(tmp_path / "train")
    assert [dataset[0].id, dataset[1].id] == ["train/2", "train/10"] and dataset[1].images[0].width == 30
    assert dataset[0].question == "Find x.\nA. 1\nB. 2.5\nC. 3" and dataset[1].question.startswith("Find $x$\nA")
    assert (dataset[0].answer, dataset[0].kind) == ("C", "Angle")
    with pytest.raises(ValueError, match="30/data.json: not JSON"):
        dataset[2]
    with pytest.raises(FileNotFoundError, match="no folder with a data.json"):
        geometry3k(tmp_path / "nowhere")


def test_polymath(tmp_path):
    make_image(tmp_path / "merged_screenshots" / "u_q1.png")
    (tmp_path / "annotations.csv").write_text(
        "input_image_location-input,final_answer-output,final_answer_range-output,category-input\n"
        'u_q1,A,A-D,odd_one_out\nu_q2,2,"1,2,3,4",odd_one_out\nu_q3,"[A,B]",A-D,x\nu_q4,,A-D,x\n'
    )
    dataset = polymath(tmp_path)
    assert (dataset[0].id, dataset[0].answer, dataset[0].kind) == ("u_q1", "A", "odd_one_out")
    result = [(p.where[-1], p.reason) for p in check(dataset).problems]
    assert result == [
        ("3", "image_absent"), ("4", "several_answers"), ("5", "empty_answer"), ("5", "image_absent")]  # fmt: skip
    for content, message in (("x" * 200_000, "field larger than field limit"), ("\xff", "'utf-8' codec can't decode")):
        rows = f"input_image_location-input,final_answer-output\nu_q1,A\n{content},A\n"
        (tmp_path / "annotations.csv").write_bytes(rows.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"annotations.csv:[0-9]: {message}"):
            polymath(tmp_path)
    (tmp_path / "annotations.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="annotations.csv:1: lacks column input_image_location-input"):
        polymath(tmp_path)


def test_scemqa_images_without_an_ending(tmp_path):
    rows = [
        {"Question": "q\nA. x\nB. y", "Answer (final answer highlighted)": "B", "ImagePath": f"M/{n}"} for n in range(3)
    ]
    folder = tmp_path / "Multiple_Choice"
    make_image(folder / "M" / "0.JPG")
    make_image(folder / "M" / "1.png")
    make_image(folder / "M" / "1.jpg")
    (folder / "multiple_choice.json").write_text(json.dumps({"M": rows}))
    dataset = scemqa(tmp_path)
    assert dataset[0].images[0].size == (30, 20)
    with pytest.raises(ValueError, match="both 1.jpg and 1.png .*keep one"):
        dataset[1]
    with pytest.raises(ValueError, match="M/2 cannot be read|cannot be read"):
        dataset[2]
    assert len(scemqa(folder)) == len(scemqa(folder / "multiple_choice.json")) == 3


def test_names_and_files_that_are_none(tmp_path):
    for name in ("we_math", "other:x", "we_math:"):
        with pytest.raises(ValueError, match="expected NAME:PATH"):
            open_dataset(name)
    for name in READERS:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            open_dataset(f"{name}:{tmp_path / 'nowhere'}")
    (tmp_path / "testmini.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no question"):
        we_math(tmp_path)
    (tmp_path / "testmini.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list of objects"):
        we_math(tmp_path)
