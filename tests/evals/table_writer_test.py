"""Reading files, joining predictions with questions, conclusions, and the command. Oracle: by hand."""

import json
import os
import re
import zipfile

import pytest

from qwenla_jax.cli import evaluate
from qwenla_jax.evals import sheets
from qwenla_jax.evals.registry import questions_of, score_files, tasks
from qwenla_jax.evals.result import Figure, Result, ratio_figure
from qwenla_jax.evals.table_files import Row, read_rows
from qwenla_jax.evals.table_writer import write_rows
from qwenla_jax.evals.task import Settings

QUESTIONS = [
    {"id": str(n), "question": "q", "options": ["red", "blue"], "answer": "A", "question_type": "multiple-choice"}
    for n in range(3)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def score(tmp_path):
    gold = write(tmp_path / "gold.jsonl", QUESTIONS)

    def run(said, **settings):
        rows = [{"id": name, "prediction": text} for name, text in said]
        return score_files("mmmu", [write(tmp_path / "said.jsonl", rows)], [gold], Settings(**settings))

    return run


ALL = [("2", "A"), ("0", "A"), ("1", "B")]


def test_order_does_not_matter(score):
    assert score(ALL).counts["right"] == 2
    assert [row["id"] for row in score(ALL).rows] == ["0", "1", "2"]


def test_missing_is_refused_or_counted(score):
    with pytest.raises(ValueError, match=r"no prediction for the question '1' \(1 of 3\).*missing=wrong"):
        score(ALL[:2])
    wrong, without = score(ALL[:2], missing="wrong"), score(ALL[:2], missing="leave_out")
    assert wrong.counts["without_prediction_as_wrong"] == 1 and round(wrong.figures["accuracy"].value, 1) == 66.7
    assert without.counts["without_prediction_left_out"] == 1 and without.figures["accuracy"].value == 100.0
    with pytest.raises(ValueError, match="nothing to score"):
        score([("9", "A")], missing="leave_out", unknown="ignore")


def test_unknown_is_refused_or_counted(score):
    with pytest.raises(ValueError, match="no question has the id '7'"):
        score([*ALL, ("7", "A")])
    assert score([*ALL, ("7", "A")], unknown="ignore").counts["predictions_without_question_ignored"] == 1


def test_duplicates_are_refused(score, tmp_path):
    with pytest.raises(ValueError, match="several predictions have the id '2'"):
        score([*ALL, ("2", "B")])
    gold = write(tmp_path / "twice.jsonl", [*QUESTIONS, QUESTIONS[1]])
    write(tmp_path / "said.jsonl", [{"id": name, "prediction": text} for name, text in ALL])
    with pytest.raises(ValueError, match="several questions have the id '1'"):
        score_files("mmmu", [tmp_path / "said.jsonl"], [gold], Settings(unknown="ignore"))


def test_conclusions(score):
    said = [
        ("0", "I think (B). <CONCLUSION> A </CONCLUSION>"),
        ("1", "A"),
        ("2", "<CONCLUSION>B</CONCLUSION><CONCLUSION>A"),
    ]
    auto = score(said, fallback="wrong")
    assert auto.counts["missing_conclusions"] == 1 and auto.notes["missing_conclusion_rate"].startswith("33.33%")
    assert [row["read"] for row in auto.rows] == ["A", None, "B"]  # the last that is closed
    assert auto.notes["scored_text"] == "the last <CONCLUSION> alone"
    whole = score(said, conclusion="never")
    assert "missing_conclusions" not in whole.counts and whole.rows[0]["read"] == "B"
    assert score(ALL, conclusion="always", fallback="wrong").counts["missing_conclusions"] == 3
    assert score(ALL).notes["scored_text"] == "the whole prediction"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="missing: got 'drop', expected one of refuse, wrong, leave_out"):
        Settings(missing="drop")


@pytest.mark.parametrize("ending", ["json", "jsonl", "tsv", "xlsx", "parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, ending):
    rows = [{"index": 5, "question": 'a "b"', "prediction": "x\ny"}, {"index": 6, "question": "c", "prediction": "d"}]
    path = tmp_path / f"said.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "xlsx":
        book = pytest.importorskip("openpyxl").Workbook()
        for cells in (list(rows[0]), *(list(row.values()) for row in rows)):
            book.active.append(cells)
        book.save(path)
    elif ending == "tsv":
        pytest.importorskip("pandas").DataFrame(rows).to_csv(path, sep="\t", index=False)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    result = read_rows(path)
    assert [(row.text("index"), row.text("question"), row.text("prediction")) for row in result] == [
        ("5", 'a "b"', "x\ny"), ("6", "c", "d"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "cannot read .csv; expected .tsv, .xlsx"),
        ("a.json", "{", "a.json:1: not JSON"),
        ("a.json", "[1]", "row 1 holds a int; expected an object"),
        ("a.jsonl", '{"id": 1}\n{', "a.jsonl:2: not JSON"),
        ("a.tsv", "index\tq\n1\t2\t3\n", "row 1 has more cells than the header"),
        ("a.tsv", "index\tanswer\tq\tanswer\n1\tA\tx\tB\n", "a.tsv: two columns are called 'answer'"),
        ("a.xlsx", "no zip", "not an xlsx file"),
        ("a.txt", "one\n", "has 1 columns; expected image, question, answer, prediction"),
        ("a.parquet", "no parquet", "not a parquet file"),
        ("a.json", b"\xff\xfe\xff", "not UTF-8"),
        ("a.tsv", b"index\n\xff\n", "not UTF-8"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.json", "[" * 200_000, "nested more than 100 deep"),
        ("a.jsonl", "{}\n" + '{"a":' * 200_000, "a.jsonl:2: nested more than 100 deep"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_objects_of_json_however_they_stand(tmp_path):
    rows = [{"index": 7, "prediction": "B"}, {"index": 8, "prediction": "C"}]
    texts = {
        "lines": "\n".join(map(json.dumps, rows)),
        "pretty": "\n".join(json.dumps(row, indent=2) for row in rows),  # as some files of captions are published
        "close": "".join(map(json.dumps, rows)),
        "list": json.dumps(rows, indent=1),
        "one": json.dumps(rows[0]),
        "one, pretty": json.dumps(rows[0], indent=1),
    }
    for ending in ("json", "jsonl"):
        for name, text in texts.items():
            (tmp_path / f"a.{ending}").write_text(text + "\n")
            result = [dict(row.values) for row in read_rows(tmp_path / f"a.{ending}")]
            assert result == (rows[:1] if name.startswith("one") else rows), (ending, name)
    # One object of other keys is a row in JSON lines, and holds rows by their ids in JSON.
    for ending, wanted in (("jsonl", [{"a": "B", "b": "C"}]), ("json", [{"id": "a", "prediction": "B"}, {"id": "b"}])):
        (tmp_path / f"a.{ending}").write_text('{"a": "B", "b": "C"}')
        result = [dict(row.values) for row in read_rows(tmp_path / f"a.{ending}")]
        assert [one.items() >= other.items() for one, other in zip(result, wanted, strict=True)] == [True] * len(wanted)


def test_short_rows_lack_their_last_cells_and_cost_nothing(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("index\tA\tprediction\n1\tx\n2\n")
    assert [dict(row.values) for row in read_rows(path)] == [
        {"index": "1", "A": "x", "prediction": None}, {"index": "2", "prediction": None},
    ]  # fmt: skip
    # 200 kB that would be 10^10 cells.
    path.write_text("\t".join(map(str, range(100_000))) + "\n" + "1\n" * 100_000)
    rows = read_rows(path)
    assert len(rows) == 100_000 and dict(rows[-1].values) == {"0": "1"}
    with pytest.raises(ValueError, match="lacks id; it has 0, .* 29 and 99970 more") as error:
        Row("a", 0, "a", dict.fromkeys(map(str, range(100_000)), "1")).need("id")
    assert len(str(error.value)) < 300


@pytest.fixture
def sheet(tmp_path):
    """An xlsx file with its sheet's XML replaced."""
    write_rows(tmp_path / "a.xlsx", [{"index": 1, "prediction": "A"}])
    with zipfile.ZipFile(tmp_path / "a.xlsx") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def make(change):
        with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in parts.items():
                archive.writestr(name, change(data.decode()) if "sheet1" in name else data)
        return tmp_path / "a.xlsx"

    return make


def test_small_xlsx_files_that_become_large(sheet, monkeypatch):
    path = sheet(lambda text: text.replace("<sheetData>", '<dimension ref="A1:XFD1048576"/><sheetData>'))
    assert [dict(row.values) for row in read_rows(path)] == [{"index": 1, "prediction": "A"}]
    for change in (
        lambda text: re.sub(r"<row[^>]*>(?=(?!.*<row))", '<row r="99999999999">', text),
        lambda text: text.replace("</sheetData>", '<row><c r="ZZZ9"/></row>' * 2000 + "</sheetData>"),
    ):
        with pytest.raises(ValueError, match="a.xlsx: has more than 262,144 rows or 5,000,000 cells"):
            read_rows(sheet(change))
    large = sheet(lambda text: text.replace("</sheetData>", "<row/>" * 200_000 + "</sheetData>"))
    assert large.stat().st_size < 20_000 and len(read_rows(large)) == 1
    monkeypatch.setattr(sheets, "MAX_TAGS", 100_000)
    with pytest.raises(ValueError, match="a.xlsx: holds more than 100,000 tags"):
        read_rows(large)
    monkeypatch.setattr(sheets, "MAX_UNPACKED", 1 << 20)
    with pytest.raises(ValueError, match="a.xlsx: unpacks to .* bytes; at most 1,048,576 are read"):
        read_rows(large)


@pytest.mark.parametrize("ending", ["json", "jsonl", "tsv", "xlsx", "txt"])
def test_what_is_no_file_is_not_opened(tmp_path, ending):
    os.mkfifo(tmp_path / f"a.{ending}")
    with pytest.raises(ValueError, match=f"a.{ending}: not a regular file"):
        read_rows(tmp_path / f"a.{ending}")
    with (tmp_path / f"b.{ending}").open("wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(ValueError, match=f"b.{ending}: 42,949,672,960 bytes; at most"):
        read_rows(tmp_path / f"b.{ending}")


def test_missing_file_and_missing_column(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(tmp_path / "no.json")
    gold = write(tmp_path / "gold.jsonl", QUESTIONS)
    said = write(tmp_path / "said.jsonl", [{"id": str(n), "guess": "A"} for n in range(3)])
    with pytest.raises(ValueError, match="row 1: lacks prediction or response.*it has id, guess"):
        score_files("mmmu", [said], [gold])
    assert score_files("mmmu", [said], [gold], Settings(field="guess")).counts["right"] == 3


def test_prediction_may_be_empty(score):
    assert score([("0", ""), ("1", None), ("2", "A")], fallback="wrong").counts["right"] == 1


def test_questions_are_records(tmp_path):
    source = questions_of("mmmu", [write(tmp_path / "gold.jsonl", QUESTIONS)])
    assert len(source) == 3
    record = source[1]
    assert (record.id, record.answer, record.options, record.images) == ("1", "A", ("red", "blue"), ())
    assert record.question == "q\n(A) red\n(B) blue"


def test_images_of_parquet_open(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "png")
    rows = [
        {
            "question_id": "a",
            "question": "q?",
            "answer": "Yes",
            "category": "OCR",
            "image": {"bytes": buffer.getvalue(), "path": "a"},
        }
    ]
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mme.parquet")
    record = questions_of("mme", [tmp_path / "mme.parquet"])[0]
    assert record.images[0].size == (4, 3) and record.answer == "yes" and record.id == "OCR/a/q?"


def test_command_prints_json_and_a_table(tmp_path, capsys):
    gold, said = (
        write(tmp_path / "g.jsonl", QUESTIONS),
        write(tmp_path / "s.jsonl", [{"id": n, "prediction": "A"} for n in "012"]),
    )
    arguments = ["--task=mmmu", f"--score={said}", f"--gold={gold}"]
    assert evaluate.main([*arguments, "--json", f"--details={tmp_path / 'd.jsonl'}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["task"] == "mmmu" and result["figures"]["accuracy"]["value"] == 100.0
    assert result["figures"]["accuracy"]["low"] == pytest.approx(43.85, abs=0.01)  # Wilson: 1 / (1 + 1.96^2 / 3)
    assert [json.loads(line)["right"] for line in (tmp_path / "d.jsonl").read_text().splitlines()] == [True] * 3
    assert evaluate.main(arguments) == 0
    assert "100.00  [43.85, 100.00]" in capsys.readouterr().out
    assert evaluate.main([*arguments, "--judge_url=http://x"]) == 2
    assert "--judge_url is for --task=mmhal" in capsys.readouterr().err
    assert evaluate.main(["--task=mmmu", "--score=nowhere.json"]) == 2


@pytest.mark.parametrize("ending", ["tsv", "xlsx"])
def test_what_a_table_cannot_hold_is_written_as_it_can(tmp_path, ending):
    path = tmp_path / f"sheet.{ending}"
    write_rows(path, [{"index": "1", "prediction": "a\x0b\x00b\ud800"}])
    said = "ab" if ending == "xlsx" else "a\x0b\x00b"  # XML has no control characters
    assert read_rows(path)[0].values == {"index": "1", "prediction": said + r"\ud800"}
    assert Result("t", {}, {"accuracy/\ud800": 1}, {}).table().endswith(r"accuracy/\ud800  1")


def test_result_without_counts_is_json():
    assert (
        json.loads(json.dumps(Result("t", {"x": ratio_figure([])}, {}, {}).to_json()))["figures"]["x"]["value"] is None
    )
    assert str(Figure(1.0)) == "1.00" and tuple(tasks())[0] == "chair"
