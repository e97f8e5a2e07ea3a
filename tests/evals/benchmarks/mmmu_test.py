"""MMMU and MMMU-Pro. Oracles: the official scorer's figure on a model's real outputs; its rules worked out by hand."""

import itertools
import json
import random
import re

import pytest

from qwenla_jax.evals.benchmarks.mmmu import choice, normal, numbers, open_candidates, open_right, score_mmmu
from qwenla_jax.evals.registry import score_files
from qwenla_jax.evals.task import Answer, Item, Settings

FOUR = {"A": "red", "B": "light blue", "C": "blue", "D": "9"}


@pytest.mark.parametrize(("fallback", "accuracy"), [("random", 36.67), ("wrong", 36.56)])
def test_real_outputs(shared_data, fallback, accuracy):
    folder = shared_data / "mmmu"
    paths = [folder / "llava1.5_13b_outputs.json"], [folder / "answer_dict_val.json"]
    result = score_files("mmmu", *paths, Settings(fallback=fallback))
    assert round(result.figures["accuracy"].value, 2) == accuracy
    assert result.counts["questions"] == 900 and result.counts["naming_no_option"] == 2
    # The outputs hold the questions too.
    alone = score_files("mmmu", paths[0], [], Settings(fallback=fallback))
    assert alone.figures["accuracy"] == result.figures["accuracy"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) or (A)", "A"),  # the last by position
        ("A B", "B"),
        ("Not (B) but C ", "B"),  # brackets go first
        ("It is B, I think", None),
        ("I would say that it is blue", "C"),
        ("I would say that it is light blue", "C"),  # "blue" stands later than "light blue"
        ("it is red", None),  # text only in more than five words
        ("", None),
        ("abc", None),
    ],
)
def test_choice_by_hand(text, read):
    assert choice(text, FOUR) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Answer: B", "B"),
        ("Answer: A. Answer: C", "C"),
        ("Answer: AB", "B"),  # two letters: on to the other passes, " Answer: AB " holds "B "
        ("so B. follows", "B"),
        ("The ANSWER: A", "A"),  # "A " at the end
    ],
)
def test_choice_of_pro_by_hand(text, read):
    assert choice(text, FOUR, pro=True) == read


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The answer is 3.14159", "3.14", True),
        ("so x = 5", "5", True),
        ("It costs $1,234.50.", "1234.5", False),  # the numbers are 1,234 and 234.50
        ("about 1,234", "1234", True),
        ("2e3", "2000", True),
        ("It is a Romanesque church.", "romanesque", True),
        ("five", "5", False),
        ("The final result is \n nothing", "nothing", False),  # the shortest tail is "is", and the only one
        ("It is c", "c", True),  # " c" holds " c"
        ("It is cocoa", "c", False),  # "cocoa" holds neither " c" nor "c "
        ("", "5", False),
        ("-3", "3", False),
    ],
)
def test_open_by_hand(text, gold, right):
    assert open_right(text, gold) is right


def test_numbers_in_open_answers_are_the_official_ones():
    """Oracle: the official expressions, whose time is quadratic in the number of digits."""
    scientific = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
    simple = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
    rng = random.Random(0)
    texts = ["".join(text) for length in range(6) for text in itertools.product("1.,e-a", repeat=length)]
    texts += ["".join(rng.choice("012.,eE+-ab_ \n٣²") for _ in range(rng.randrange(25))) for _ in range(5_000)]
    for text in texts:
        wanted = [*re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text), *scientific.findall(text), *simple.findall(text)]
        assert numbers(text) == wanted, text


def test_splits_are_not_added_up(tmp_path):
    # As in VLMEvalKit's MMMU_DEV_VAL: validation 2 of 3, dev 0 of 1.
    said = [("dev", "B"), ("validation", "A"), ("validation", "B"), ("validation", "A")]
    rows = [
        {"index": n, "question": "q", "A": "red", "B": "blue", "answer": "A", "category": "Art", "split": split}
        | {"prediction": text}
        for n, (split, text) in enumerate(said)
    ]
    (tmp_path / "said.json").write_text(json.dumps(rows))
    result = score_files("mmmu", [tmp_path / "said.json"])
    assert {name: round(figure.value, 2) for name, figure in result.figures.items()} == {
        "accuracy/validation": 66.67, "accuracy/Art/validation": 66.67, "accuracy/dev": 0.0, "accuracy/Art/dev": 0.0,
    }  # fmt: skip
    assert (result.counts["right/validation"], result.counts["questions/dev"]) == (2, 1)
    assert [row["id"] for row in result.rows] == ["0", "1", "2", "3"]
    # The benchmark's own files tell the split in the id alone; one split is scored as it always is.
    for row in rows:
        row["id"] = f"{row.pop('split')}_Art_{row.pop('index')}"
    (tmp_path / "said.json").write_text(json.dumps(rows))
    assert score_files("mmmu", [tmp_path / "said.json"]).figures == result.figures
    (tmp_path / "said.json").write_text(json.dumps(rows[1:]))
    assert list(score_files("mmmu", [tmp_path / "said.json"]).figures) == ["accuracy", "accuracy/Art"]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"answer": "?"}, "right answers are withheld"),
        ({"answer": [""], "question_type": "open"}, "row 1: a right answer is blank"),
        ({"answer": "[]", "question_type": "open"}, "row 1: a right answer is blank"),
        ({"options": "['a', "}, "row 1: options is .*; expected a list"),
        ({"options": 5}, "row 1: options is 5; expected a list"),
        ({"options": ["a"] * 27}, "row 1: options holds 27 texts"),
    ],
)
def test_gold_that_cannot_be_scored(tmp_path, odd, message):
    row = {"id": "test_Art_1", "question": "q", "options": ["a", "b"], "answer": "A", "response": "A"}
    (tmp_path / "said.json").write_text(json.dumps([row | odd]))
    with pytest.raises(ValueError, match=message):
        score_files("mmmu", [tmp_path / "said.json"])


def test_open_parts_by_hand():
    assert normal(" A ") == [" a", "a "] and normal("1,000.456") == [1000.46]
    assert open_candidates("It is 7. So it is 8 = 9") == [9.0]
    assert open_candidates("x is 2 apples") == ["2 apples", 2.0]
    assert open_right("either", ["neither", "either"])


def test_fallback_is_seeded_and_counted():
    answers = [Answer(Item(str(n), answer="A", options=FOUR, kind="k"), "") for n in range(400)]
    first, again = (score_mmmu(answers, Settings(seed=1)) for _ in range(2))
    assert first == again and first.counts["naming_no_option"] == 400
    assert 50 < first.counts["right"] == first.counts["of_these_right_by_chance"] < 150
    assert score_mmmu(answers, Settings(fallback="wrong")).counts["right"] == 0
    assert score_mmmu([Answer(answers[0].item, "", given=False)], Settings()).counts["naming_no_option"] == 0


def test_pro_configs_and_their_mean(tmp_path):
    def write(name, responses):
        rows = [
            {"id": f"test_Art_{n}", "options": "['red', 'blue']", "answer": "A", "response": text}
            for n, text in enumerate(responses)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    ten = write("model_standard (10 options)_cot.jsonl", ["Answer: A", "Answer: B"])
    four = write("model_standard (4 options)_cot.jsonl", ["Answer: A", "Answer: A"])
    vision = write("model_vision_cot.jsonl", ["Answer: B", "Answer: B"])
    figures = score_files("mmmu_pro", [ten, four, vision]).figures
    assert figures["overall"].value == 25.0 and figures["accuracy/standard (4 options)"].value == 100.0
    alone = score_files("mmmu_pro", [ten])
    assert "overall" not in alone.figures and "give both" in alone.notes["overall"]


def test_pro_question_that_nobody_can_answer_counts(tmp_path):
    """As it is published: the options stand in a list within the list, so that the right letter is none of them."""
    row = {"id": "validation_Accounting_29", "options": "[['A', 'B', 'Not enough information']]", "answer": "B"}
    path = tmp_path / "model_vision_cot.jsonl"
    path.write_text(json.dumps(row | {"response": "Answer: B"}))
    result = score_files("mmmu_pro", [path])
    assert result.figures["accuracy/vision"].value == 0.0 and result.counts["whose_right_letter_is_no_option"] == 1
    for odd, message in (({"answer": "blue"}, "'blue'; expected a letter"), ({"options": "[]"}, "holds no options")):
        path.write_text(json.dumps(row | odd | {"response": "B"}))
        with pytest.raises(ValueError, match=message):
            score_files("mmmu_pro", [path])


def test_parquet_questions(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {
            "id": "validation_Art_1",
            "question": "which?",
            "options": "['red', 'it\\'s']",
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {
            "id": "validation_Art_2",
            "question": "how many?",
            "options": "[]",
            "answer": "['5', 'five']",
            "question_type": "open",
        },
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation-00000.parquet")
    said = {"validation_Art_1": "B", "validation_Art_2": "It is five"}
    (tmp_path / "said.json").write_text(json.dumps(said))
    result = score_files("mmmu", [tmp_path / "said.json"], [tmp_path / "validation-00000.parquet"])
    assert result.counts["right"] == 2 and result.figures["accuracy/Art"].value == 100.0


def test_options_are_needed(tmp_path):
    (tmp_path / "said.json").write_text(json.dumps({"validation_Art_1": "B"}))
    (tmp_path / "gold.json").write_text(
        json.dumps({"validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"}})
    )
    with pytest.raises(ValueError, match="multiple-choice question without options"):
        score_files("mmmu", [tmp_path / "said.json"], [tmp_path / "gold.json"])
