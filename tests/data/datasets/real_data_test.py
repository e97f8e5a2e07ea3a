"""We-Math, MathVision and SceMQA as published: every sample loads; fields against the files read with plain json."""

import json
import re

import pytest
from dataset_faults import check, open_dataset

from qwenla_jax.data.datasets.mathvision import mathvision
from qwenla_jax.data.datasets.scemqa import boxed_answer, option_answer, scemqa
from qwenla_jax.data.datasets.we_math import we_math


def records(dataset):
    return {record.id: record for record in (dataset[i] for i in range(len(dataset)))}


@pytest.mark.parametrize(
    "name, folder, size", [("we_math", "we_math", 50), ("mathvision", "", 160), ("scemqa", "", 48)]
)
def test_every_sample_loads_and_nothing_is_wrong(shared_data, name, folder, size):
    result = check(f"{name}:{shared_data / (folder or name)}")
    assert (result.size, result.invalid, result.problems) == (size, 0, ())
    dataset = open_dataset(f"{name}:{shared_data / (folder or name)}")
    all_of_them = records(dataset)
    assert len(all_of_them) == len(dataset) == size
    for record in all_of_them.values():
        assert record.images[0].mode == "RGB" and len(record.images) == 1 and record.response is None
        assert "<image" not in record.question and record.answer == record.answer.strip() != ""


# Read off the file by eye.
WE_MATH = {
    "2steps_49/2steps_multi": (["Zoo", "Library", "Pool", "Supermarket", "No correct answer"], "A"),
    "2steps_300/2steps_1": (["120", "1500", "1200", "No correct answer"], "C"),
    "2steps_134/2steps_2": (["AB", "AC", "AD", "No correct answer"], "A"),
    "2steps_199/2steps_1": (["8 m", "6 m", "15 m", "5 m", "No correct answer"], "A"),
    "2steps_298/2steps_2": (["4", "3", "2", "1", "No correct answer"], "B"),
    "2steps_334/2steps_1": (["3, 5", "5, 3", "4, 3", "6, 3", "No correct answer"], "B"),
    "2steps_287/2steps_1": (["6, 4, 2", "6, 2, 4", "2, 4, 6", "No correct answer"], "A"),
    "2steps_81/2steps_1": (
        ["Rectangle, Triangle", "Trapezoid, Triangle", "Square, Triangle", "Trapezoid, Trapezoid", "No correct answer"],
        "B",
    ),
    "2steps_19/2steps_1": (["A", "B", "C", "E", "No correct answer"], "B"),
    "2steps_218/2steps_multi": (["1", "2", "1/3π", "2/3π", "No correct answer"], "B"),
    "3steps_101/3steps_multi": (["24 cm²", "12 cm²", "24.5 cm²", "12.5 cm²", "No correct answer"], "B"),
    "2steps_59/2steps_1": (["①", "②", "③", "Cannot be determined", "No correct answer"], "A"),
    "3steps_110/3steps_1": (
        [
            "AB = OD, and AB is parallel to OD",
            "AB < OD, and AB is parallel to OD",
            "AB > OD, and AB intersects OD",
            "Cannot be determined",
            "No correct answer",
        ],
        "A",
    ),
}


def test_we_math_options_and_answers(shared_data):
    result = records(we_math(shared_data / "we_math" / "data"))
    rows = json.loads((shared_data / "we_math" / "data" / "testmini.json").read_text())
    assert len(result) == len(rows)
    for row in rows:
        record = result[f"{row['ID']}/{row['key']}"]
        question, *options = record.question.split("\n")
        assert question == row["question"].strip() and record.answer == row["answer"] and record.kind == row["key"]
        # Every letter and digit of the options is there, in the same order.
        assert re.sub(r"\W", "", "".join(options)) == re.sub(r"\W", "", row["option"])
        assert [line[:3] for line in options] == [f"{letter}. " for letter in "ABCDE"[: len(options)]]
        assert options[-1].endswith("No correct answer")
    for name, (options, answer) in WE_MATH.items():
        assert list(result[name].options) == options
        assert [line[3:] for line in result[name].question.split("\n")[1:]] == options, name
        assert result[name].answer == answer


def test_mathvision_fields(shared_data):
    result = records(mathvision(shared_data / "mathvision"))
    rows = [json.loads(line) for line in (shared_data / "mathvision" / "test.jsonl").read_text().splitlines()]
    assert len(result) == len(rows) == 160 and sum(bool(row["options"]) for row in rows) == 78
    for row in rows:
        record = result[row["id"]]
        lines = record.question.split("\n")
        options = [f"{letter}. {text}" for letter, text in zip("ABCDE", row["options"], strict=False)]
        assert lines[len(lines) - len(options) :] == options
        assert record.answer == row["answer"] and record.kind == row["subject"]
        assert lines[0][:20] == row["question"].replace("<image1>", "").strip()[:20]
    assert result["18"].question == (
        "A fifteen-meter log has to be sawn into three-meter pieces. How many cuts are needed for that?"
    )
    assert result["21"].question.endswith("illustrated nearby?\nA. A\nB. B\nC. C\nD. D\nE. E")
    assert (
        result["88"].question.startswith("There are 12 children")
        and "from the back.\nHow many" in result["88"].question
    )


def test_mathvision_whole_gold_file_has_one_question_without_text(shared_data):
    path = shared_data / "mathvision" / "outputs" / "gold_full_test.jsonl"
    result = check(mathvision(path), images=False)
    assert result.size == 3040 and [(p.id, p.reason) for p in result.problems] == [("528", "empty_question")]
    assert result.problems[0].where == f"{path}:528"
    dataset = mathvision(path)
    by_id = {dataset.raw_record(i).id: dataset.raw_record(i) for i in range(len(dataset))}
    assert by_id["2653"].options[:2] == (("A", "picture 2"), ("B", "picture 3"))
    # Of the file's backslashes with n, those left begin a LaTeX command (or a word in lower case).
    left = {name for raw_record in by_id.values() for name in re.findall(r"\\n\w*", raw_record.question)}
    assert left == {"\\neq", "\\nabla", "\\nfriendships"}


# Of the gold with prose; read off the file by eye.
SCEMQA = {
    "Math/0": "D",
    "Chemistry/0": "C",
    "Chemistry/2": "D",
    "Chemistry/3": "C",
    "Chemistry/5": "B",
    "Biology/0": "D",
    "Biology/3": "B",
    "Physics/0": "A",
    "Physics/5": "A",
    "Math_Free_Response/2": "3.397",
    "Math_Free_Response/3": "0.4",
    "Physics_Free_Response/0": "0.39",
    "Physics_Free_Response/3": "-0.2",
    "Chemistry_Free_Response/4": "$1s^22s^22p^63s^23p^4",
    "Biology_Free_Response/2": "No",
    "Biology_Free_Response/3": "5/21",
}


def test_scemqa_answers_and_options(shared_data):
    result = records(scemqa(shared_data / "scemqa"))
    for name, answer in SCEMQA.items():
        assert result[name].answer == answer, name
    lines = result["Chemistry/3"].question.split("\n")
    assert lines[-4].startswith("A. Cu is the anode where oxidation") and lines[-2].startswith(
        "C. Zn is the anode where ox"
    )
    assert "Half-Cell A: Strip of Cu(s)" in result["Chemistry/3"].question
    assert result["Physics/4"].question.endswith("\nA. $I_B > I_A = I_C$\nB. $I_A > I_C = I_B$\nC. $I_C > I_A > I_B$"
                                                "\nD. $I_C > I_A = I_B$")  # fmt: skip
    sizes = [question.count("\n") for question in (result["Math/0"].question, result["Biology/0"].question)]
    assert sizes == [5, 4]  # options below a question of one line


@pytest.mark.parametrize(
    "gold, letter",
    [("D", "D"), ("A ", "A"), ("C The oxidation", "C"), ("B-This is", "B"), ("A; As the", "A"), ("(B) yes", "B"),
     ("B 127 g is", "B"), ("E z = 0.70", "E"), ("D  https://x", "D"), ("D：During", "D"), ("B $ E_x", "B")],
)  # fmt: skip
def test_option_answers_as_the_published_file_writes_them(gold, letter):
    assert option_answer(gold, "f") == letter


@pytest.mark.parametrize(
    "gold", ["A molecule is", "(C, D) Since", "A, D For", "because D", "Answer: D", "A and B are right"]
)
def test_gold_that_names_no_single_option_is_refused(gold):
    with pytest.raises(ValueError, match="f: the answer"):
        option_answer(gold, "f")


def test_boxed_answers_keep_their_braces():
    assert boxed_answer(r"\answer{\frac{1}{2}} because \answer{3}", "f") == r"\frac{1}{2}"
    for gold in (r"\answer{\frac{1}{2}", "3"):
        with pytest.raises(ValueError, match="f: the answer"):
            boxed_answer(gold, "f")
