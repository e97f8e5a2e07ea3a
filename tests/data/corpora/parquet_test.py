"""Parquet files written here by pyarrow in the layouts of the datasets' cards."""

import io
import sys

import pytest
from PIL import Image

from qwenla_jax.data.corpora import parquet
from qwenla_jax.data.corpora.checks import check
from qwenla_jax.data.corpora.geometry3k import geometry3k
from qwenla_jax.data.corpora.mathvision import mathvision
from qwenla_jax.data.corpora.parquet import parquet_questions
from qwenla_jax.data.corpora.polymath import polymath
from qwenla_jax.data.corpora.we_math import we_math

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(width, color="red"):
    out = io.BytesIO()
    Image.new("RGB", (width, 30), color).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": f"{width}.png"}


def write(path, columns, types, group=2):
    schema = pa.schema([(name, types.get(name, pa.infer_type(values))) for name, values in columns.items()])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=group)
    return path


def test_mathvision(tmp_path):
    columns = {
        "id": ["7", "8", "9"],
        "question": ["How many?\n<image1>", "Which?\n<image1>", "Where <image1>?"],
        "options": [[], ["x", "y"], ["<image1>", "no"]],
        "image": ["images/7.jpg", "images/8.jpg", "images/9.jpg"],
        "decoded_image": [png(40), png(41), png(42)],
        "answer": ["4", "B", "A"],
        "solution": [None, None, "s"],
        "level": [1, 2, 3],
        "subject": ["algebra", "logic", "logic"],
    }
    write(tmp_path / "data" / "test-00000-of-00001.parquet", columns, {"decoded_image": IMAGE, "solution": pa.string()})
    corpus = mathvision(tmp_path)
    got = [corpus[i] for i in range(3)]
    assert [r.id for r in got] == ["7", "8", "9"] and [r.answer for r in got] == ["4", "B", "A"]
    assert [r.question for r in got] == ["How many?", "Which?\nA. x\nB. y", "Where ?\nA. picture 1\nB. no"]
    assert [r.images[0].size for r in got] == [(40, 30), (41, 30), (42, 30)]
    assert [r.kind for r in got] == ["algebra", "logic", "logic"]
    # With a second split beside it, nobody can know which one is meant.
    write(
        tmp_path / "data" / "testmini-00000-of-00001.parquet",
        columns,
        {"decoded_image": IMAGE, "solution": pa.string()},
    )
    with pytest.raises(ValueError, match=r"several splits \(test, testmini\).*data/test-\*.parquet"):
        mathvision(tmp_path)
    assert len(mathvision(tmp_path / "data" / "test-*.parquet")) == 3


def test_we_math_polymath_and_geometry3k(tmp_path):
    columns = {"question": ["Q ( )"], "option": ["A. 1; 2;B. 3"], "answer": ["B"], "image_path": [png(33)]}
    record = we_math(write(tmp_path / "w.parquet", columns, {"image_path": IMAGE}))[0]
    assert (record.question, record.answer, record.images[0].width) == ("Q ( )\nA. 1; 2\nB. 3", "B", 33)

    columns = {
        "image": [png(50), png(51), png(52)],
        "category": ["spatial_reasoning", "odd_one_out", "odd_one_out"],
        "final_answer": ["b", "3", "[A,C]"],
        "final_answer_range": ["A-D", "1-4", "A-D"],
        "answer_option": ["?"] * 3,
    }
    corpus = polymath(write(tmp_path / "p.parquet", columns, {"image": IMAGE}))
    assert (corpus[0].answer, corpus[1].answer, corpus[1].images[0].width) == ("B", "3", 51)
    assert "letter" in corpus[0].question and "number" in corpus[1].question and corpus[0].kind == "spatial_reasoning"
    with pytest.raises(ValueError, match="row 2: the answer 'A,C' accepts several"):
        corpus[2]

    columns = {"images": [[png(60)], [png(61)]], "problem": ["<image>Find x.", "<image>Find y."], "answer": ["2", "7"]}
    free = geometry3k(write(tmp_path / "g.parquet", columns, {"images": pa.list_(IMAGE)}))
    assert [(r.question, r.answer, r.images[0].width) for r in (free[0], free[1])] == [
        ("Find x.", "2", 60), ("Find y.", "7", 61)]  # fmt: skip
    later = columns | {"id": [5, 6], "choices": [["1", "2"], ["6", "7"]], "ground_truth": ["B", "7"]}
    chosen = geometry3k(write(tmp_path / "h.parquet", later, {"images": pa.list_(IMAGE)}))
    assert [(r.id, r.question, r.answer) for r in (chosen[0], chosen[1])] == [
        ("5", "Find x.\nA. 1\nB. 2", "B"), ("6", "Find y.\nA. 6\nB. 7", "B")]  # fmt: skip


@pytest.mark.parametrize("keep", [0, 2**30])
def test_any_parquet_over_shards_and_row_groups(tmp_path, monkeypatch, keep):
    monkeypatch.setattr(parquet, "KEEP_BYTES", keep)
    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        columns = {
            "qid": list(numbers),
            "problem": [f"q{n}" for n in numbers],
            "final_answer": [f"a{n}" for n in numbers],
            "images": [[png(30 + n)] * (n % 3) for n in numbers],
        }
        write(tmp_path / f"train-{shard:05}-of-00002.parquet", columns, {"images": pa.list_(IMAGE)})
    corpus = parquet_questions(tmp_path)
    assert len(corpus) == 10
    for n in (9, 0, 4, 5, 8):
        record = corpus[n]
        assert (record.id, record.question, record.answer) == (str(n), f"q{n}", f"a{n}")
        assert [image.width for image in record.images] == [30 + n] * (n % 3)


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    columns = {
        "id": ["a", "a", "c", "d", "e"],
        "question": ["q", "q", " ", "q", "q"],
        "answer": ["red", "red", "red", "black", None],
        "options": [["red", "blue"]] * 5,
        "image": [
            png(30),
            png(31),
            png(32),
            {"bytes": None, "path": "far.png"},
            {"bytes": b"\x89PNG no", "path": None},
        ],
    }
    path = write(tmp_path / "x.parquet", columns, {"image": IMAGE})
    corpus = parquet_questions(path)
    assert corpus[0].answer == "A"  # the text of one option
    found = [(p.where, p.reason) for p in check(corpus).problems]
    assert found == [
        (f"{path}: row 1", "duplicate_id"),
        (f"{path}: row 2", "empty_question"),
        (f"{path}: row 3", "answer_not_among_options"),
        (f"{path}: row 3", "picture_absent"),
        (f"{path}: row 4", "field"),
    ]
    with pytest.raises(ValueError, match="no column of answers; expected one of answer, .* got question"):
        parquet_questions(write(tmp_path / "y.parquet", {"question": ["q"]}, {}))
    with pytest.raises(ValueError, match="lacks column decoded_image; it has"):
        mathvision(write(tmp_path / "z.parquet", {k: ["1"] for k in ("id", "question", "options", "answer")}, {}))
    (tmp_path / "no.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="no.parquet: not a parquet file"):
        parquet_questions(tmp_path / "no.parquet")
    for name in ("gone.parquet", "gone-*.parquet"):
        with pytest.raises(FileNotFoundError, match="gone"):
            parquet_questions(tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        parquet_questions(path)
