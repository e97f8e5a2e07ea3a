"""MMBench and MMStar. Oracles: what VLMEvalKit's and MMStar's own code read in these answers; hand-computed scores;
openpyxl reads the sheet back. `beside_official.py` asks that code about thousands of real answers."""

import json

import pytest

from qwenla_jax.cli import evaluate
from qwenla_jax.evals.benchmarks.mmbench_mmstar import first_letter, read_letter
from qwenla_jax.evals.lettered import inline_options
from qwenla_jax.evals.registry import questions_of, score_files
from qwenla_jax.evals.table_writer import write_rows
from qwenla_jax.evals.task import Settings

OPTIONS = {"A": "red", "B": "green", "C": "light green", "D": "4"}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("The answer is C.", "C"),
        ("A or B", None),
        ("A cat is there, red", "A"),  # the article; the text decides
        ("A cat sits there", "A"),  # among the last four words
        ("A cat sits over there", None),
        ("B is what I think", None),
        ("the answer is **d**, since A and B differ", "D"),
        ("The correct answer is B, though A is red", "B"),
        ("the answer is E", None),
        ("It is RED", "A"),
        ("light green", None),  # holds "green" too
        ("not A, not C", None),
        ("AB", None),
        ("", None),
        ("a", None),
        ("Z, so red", None),  # none of the options
        ("Cannot determine the answer, red", None),
        ("Failed to obtain answer via API. B", None),
        ("red " * 20, None),  # more than twice as long as all options
        ("between red and 4", None),
    ],
)
def test_letter_by_hand(text, read):
    assert read_letter(text, OPTIONS) == read


def tsv(path, rows):
    names = list(rows[0])
    path.write_text(
        "\n".join(["\t".join(names), *("\t".join(str(row[name]) for name in names) for row in rows)]) + "\n"
    )
    return path


def bench(*rows):
    about = {"question": "which?", "A": "red", "B": "blue", "category": "color"}
    return [about | {"index": index, "answer": answer, "prediction": said} for index, answer, said in rows]


def test_mmbench_by_hand(tmp_path):
    # Question 1 is right both ways, question 2 unrotated alone, question 3 has no rotation and is wrong.
    rows = bench((1, "A", "A"), (1000001, "B", "B"), (2, "A", "red"), (1000002, "B", "A"), (3, "A", "B or A"))
    result = score_files("mmbench", [tsv(tmp_path / "dev.tsv", rows)])
    assert result.figures["vanilla"].value == pytest.approx(200 / 3)
    assert result.figures["circular"].value == pytest.approx(100 / 3)
    assert result.counts["naming_no_single_option"] == 1 and result.counts["questions_with_rotations"] == 2
    alone = score_files("mmbench", [tsv(tmp_path / "vanilla.tsv", rows[::2])])
    assert "circular" not in alone.figures and "no rotation" in alone.notes["circular"]
    with pytest.raises(ValueError, match="have rotations alone"):
        score_files("mmbench", [tsv(tmp_path / "odd.tsv", rows[1:])])


@pytest.mark.parametrize("ending", ["tsv", "xlsx"])
def test_withheld_answers_make_a_submission(tmp_path, capsys, ending):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in bench((1, "", "B"), (2, "", "=1+1"))]
    path, sheet = tsv(tmp_path / "test.tsv", rows), tmp_path / f"sheet.{ending}"
    arguments = ["--task=mmbench", f"--score={path}"]
    assert evaluate.main(arguments) == 2 and "withheld (2 of 2)" in capsys.readouterr().err
    assert evaluate.main([*arguments, f"--submission={sheet}"]) == 0
    if ending == "tsv":
        cells = [line.split("\t") for line in sheet.read_text().splitlines()]
    else:
        book = pytest.importorskip("openpyxl").load_workbook(sheet)
        cells = [[str(cell.value or "") for cell in row] for row in book.active.iter_rows()]
        assert book.active["I3"].data_type == "s"  # no formula
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "category", "split", "prediction"]
    assert [row[8] for row in cells[1:]] == ["B", "=1+1"] and cells[1][2:6] == ["red", "blue", "", ""]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_mmstar_by_hand(tmp_path):
    rows = [
        {
            "index": 0,
            "question": "what?\nOptions: A: red, B: blue",
            "answer": "B",
            "category": "x",
            "prediction": "blue",
        },
        {"index": 1, "question": "what?\n(A) red\n(B) blue", "answer": "A", "category": "y", "prediction": "B"},
        {"index": 2, "question": "what?\nOptions: A: red, B: blue", "answer": "A", "category": "y", "prediction": "A"},
    ]
    (tmp_path / "said.json").write_text(json.dumps(rows))
    figures = score_files("mmstar", [tmp_path / "said.json"]).figures
    assert figures["accuracy"].value == pytest.approx(200 / 3)  # not 75, the mean of the categories
    assert figures["accuracy/y"].value == 50.0
    assert figures["accuracy by first letter"].value == pytest.approx(200 / 3)  # "blue" begins with a b
    assert inline_options("no options: B: x") == {}
    assert inline_options("Options: A: 1, 2, B: 3\nC: 4") == {"A": "1, 2", "B": "3", "C": "4"}


def test_options_that_are_missing_are_none(tmp_path):
    """A row whose right option is missing is scored, wrong, and counted; texts that programs write for a missing cell.

    Oracle: VLMEvalKit's `build_choices`, which leaves cells out that pandas reads as missing.
    """
    rows = [
        {"index": 0, "question": "q", "A": "Apple", "B": "Banana", "C": "", "D": "", "answer": "D", "prediction": "D"},
        {"index": 1, "question": "q", "A": "Apple", "B": "Banana", "C": "nan", "D": "NaN", "answer": "B"},
        {"index": 2, "question": "q", "A": "1", "B": "nan", "C": "", "D": "", "answer": "B", "prediction": "B"},
    ]
    rows[1] |= {"prediction": "It is a banana", "hint": "nan"}
    rows = [{"hint": "", **row, "category": "x"} for row in rows]
    for task in ("mmstar", "mmbench", "mmmu"):
        result = score_files(task, [tsv(tmp_path / "said.tsv", rows)], settings=Settings(fallback="wrong"))
        assert result.counts["whose_right_letter_is_no_option"] == 1
        # MMMU's scorer reads an option's text in more than five words alone.
        assert [row["right"] for row in result.rows] == [False, task != "mmmu", True], task
    items = questions_of("mmstar", [tmp_path / "said.tsv"]).items
    assert [list(item.options) for item in items] == [["A", "B"]] * 3
    assert items[1].question == "q\nA. Apple\nB. Banana"
    inline = "q\nOptions: A: Apple, B: Banana, C: nan, D: nan"
    assert inline_options(inline) == inline_options(inline, "B") == {"A": "Apple", "B": "Banana"}
    assert inline_options(inline, "C") == {"A": "Apple", "B": "Banana", "C": "nan"}
    said = {"index": 0, "question": inline, "answer": "B", "category": "x", "prediction": "It is a banana"}
    (tmp_path / "said.json").write_text(json.dumps(said))
    assert score_files("mmstar", [tmp_path / "said.json"]).counts["right"] == 1
    (tmp_path / "said.json").write_text(json.dumps(said | {"answer": "banana"}))
    with pytest.raises(ValueError, match="row 1: the right answer is 'banana'; expected a letter, as A, B"):
        score_files("mmstar", [tmp_path / "said.json"])


def test_an_empty_cell_of_xlsx_is_no_option(tmp_path):
    rows = [{"index": n, "question": "q", "A": "x", "B": "y", "answer": "AB"[n], "prediction": "A"} for n in range(2)]
    write_rows(tmp_path / "said.xlsx", [rows[0], rows[1] | {"B": None}])
    counts = score_files("mmstar", [tmp_path / "said.xlsx"]).counts
    assert (counts["right"], counts["questions"], counts["whose_right_letter_is_no_option"]) == (1, 2, 1)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B", "B"),
        ("b: blue", "B"),
        (" (c) red", "C"),
        ("Option D", "D"),
        ("The answer is A.", "A"),
        ("Because it is C", "B"),  # as there
        ("the correct answer is A", None),
        ("(", None),
        ("", None),
        ("1", None),
    ],
)
def test_first_letter_by_hand(text, read):
    assert first_letter(text) == read
