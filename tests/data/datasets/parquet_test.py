"""Parquet files written here by pyarrow in the layouts of the datasets' cards."""

import base64
import io
import os
import signal
import sys

import numpy as np
import pytest
from dataset_faults import check
from PIL import Image

from qwenla_jax.data.datasets import parquet_child, parquet_process
from qwenla_jax.data.datasets.geometry3k import geometry3k
from qwenla_jax.data.datasets.mathvision import mathvision
from qwenla_jax.data.datasets.parquet import parquet_questions
from qwenla_jax.data.datasets.polymath import polymath
from qwenla_jax.data.datasets.we_math import we_math

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
    dataset = mathvision(tmp_path)
    got = [dataset[i] for i in range(3)]
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
    dataset = polymath(write(tmp_path / "p.parquet", columns, {"image": IMAGE}))
    assert (dataset[0].answer, dataset[1].answer, dataset[1].images[0].width) == ("B", "3", 51)
    assert (
        "letter" in dataset[0].question and "number" in dataset[1].question and dataset[0].kind == "spatial_reasoning"
    )
    with pytest.raises(ValueError, match="row 2: the answer 'A,C' accepts several"):
        dataset[2]

    columns = {"images": [[png(60)], [png(61)]], "problem": ["<image>Find x.", "<image>Find y."], "answer": ["2", "7"]}
    free = geometry3k(write(tmp_path / "g.parquet", columns, {"images": pa.list_(IMAGE)}))
    assert [(r.question, r.answer, r.images[0].width) for r in (free[0], free[1])] == [
        ("Find x.", "2", 60), ("Find y.", "7", 61)]  # fmt: skip
    later = columns | {"id": [5, 6], "choices": [["1", "2"], ["6", "7"]], "ground_truth": ["B", "7"]}
    chosen = geometry3k(write(tmp_path / "h.parquet", later, {"images": pa.list_(IMAGE)}))
    assert [(r.id, r.question, r.answer) for r in (chosen[0], chosen[1])] == [
        ("5", "Find x.\nA. 1\nB. 2", "B"), ("6", "Find y.\nA. 6\nB. 7", "B")]  # fmt: skip


def test_any_parquet_over_shards_and_row_groups(tmp_path):
    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        columns = {
            "qid": list(numbers),
            "problem": [f"q{n}" for n in numbers],
            "final_answer": [f"a{n}" for n in numbers],
            "images": [[png(30 + n)] * (n % 3) for n in numbers],
        }
        write(tmp_path / f"train-{shard:05}-of-00002.parquet", columns, {"images": pa.list_(IMAGE)})
    dataset = parquet_questions(tmp_path)
    assert len(dataset) == 10
    for n in (9, 0, 4, 5, 8):
        record = dataset[n]
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
    dataset = parquet_questions(path)
    assert dataset[0].answer == "A"  # the text of one option
    result = [(p.where, p.reason) for p in check(dataset).problems]
    assert result == [
        (f"{path}: row 1", "duplicate_id"),
        (f"{path}: row 2", "empty_question"),
        (f"{path}: row 3", "answer_not_among_options"),
        (f"{path}: row 3", "image_absent"),
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


PNG = png(37)["bytes"]
AS_TEXT = base64.b64encode(PNG).decode()
BYTES = {"bytes": PNG, "path": None}
PATH_ONLY = {"bytes": None, "path": "sub/a.png"}
QUESTION = {"question": ["<image>q"], "answer": ["3"]}


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [BYTES]},
        {"image": [PNG]},
        {"image": ["sub/a.png"]},
        {"image": ["{folder}/sub/a.png"]},
        {"images": [["sub/a.png"]]},
        {"image_path": ["sub/a.png"]},
        {"image_paths": [["sub/a.png"]]},
        {"file_name": ["sub/a.png"]},
        {"image": [AS_TEXT]},
        {"image_base64": [f"data:image/png;base64,{AS_TEXT}"]},
        {"images": [[AS_TEXT]]},
        {"image": [PATH_ONLY]},
        {"images": [[PATH_ONLY]]},
        {"image": [{"path": "sub/a.png"}]},
        {"image": [{"bytes": AS_TEXT}]},
        {"img": [BYTES]},
        {"view": [BYTES]},
        {"image_1": [BYTES], "image_2": pa.array([None], IMAGE)},
        {"image": pa.array([None], IMAGE), "image_path": ["sub/a.png"]},
        {"image": ["lost.png"], "decoded_image": [BYTES]},
        {"image": pa.array(["sub/a.png"]).dictionary_encode()},
    ],
)
def test_a_image_in_every_form_that_files_have(tmp_path, columns):
    """Oracle: the image is 37 pixels wide."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(PNG)
    plain = {
        name: [value.format(folder=tmp_path) if isinstance(value, str) else value for value in values]
        if isinstance(values, list)
        else values
        for name, values in columns.items()
    }
    pq.write_table(pa.table(QUESTION | plain), tmp_path / "x.parquet")
    (image,) = parquet_questions(tmp_path / "x.parquet")[0].images
    assert image.width == 37
    assert check(f"parquet:{tmp_path / 'x.parquet'}").problems == ()
    (tmp_path / "data").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "data" / "x.parquet")
    assert parquet_questions(tmp_path)[0].images[0].width == 37


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"image": ["lost.png"]}, "lost.png: cannot be read"),
        ({"image": ["../../x.png"]}, "x.png: cannot be read"),
        ({"image": ["https://host/a.png"]}, "nothing is downloaded"),
        ({"image": ["q!" * 50]}, "neither base64"),
        ({"image": [{"bytes": None, "path": None}]}, "holds neither bytes nor a path"),
        ({"image": [b""]}, "holds neither bytes nor a path"),
        ({"images": [[None]]}, "has places for 1|holds neither"),
        ({"image": pa.array([None], IMAGE)}, "has places for 1 .* the record has 0"),
        ({"images": pa.array([[]], pa.list_(IMAGE))}, "has places for 1 .* the record has 0"),
        ({"images": [[BYTES, BYTES]]}, "has places for 1 .* the record has 2"),
        ({"image": [""]}, "has places for 1 .* the record has 0"),
        ({"image": [None]}, "has places for 1 .* the record has 0"),
        ({}, "has places for 1 .* the record has 0"),
    ],
)
def test_a_image_that_cannot_be_read_is_not_left_out(tmp_path, columns, message):
    pq.write_table(pa.table(QUESTION | columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message) as error:
        parquet_questions(tmp_path / "x.parquet")[0]
    assert error.value.reason in ("image_absent", "image_base64")
    assert check(f"parquet:{tmp_path / 'x.parquet'}").invalid == 1


@pytest.mark.parametrize("values", [[3], [[[[1, 2]]]], [{"height": 3}]])
def test_a_column_called_like_images_that_holds_none_is_refused(tmp_path, values):
    pq.write_table(pa.table(QUESTION | {"image": values}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: cannot read images from image \(.*expected bytes, paths"):
        parquet_questions(tmp_path / "x.parquet")
    # Beside a column with images it is some number of theirs, and other columns say nothing of images.
    message = {"image_id": [3], "image_size": [[1, 2]], "image": values, "decoded_image": [BYTES]}
    pq.write_table(pa.table(QUESTION | message), tmp_path / "x.parquet")
    assert len(parquet_questions(tmp_path / "x.parquet")[0].images) == 1


def test_the_datasets_own_readers_miss_a_image(tmp_path):
    columns = {"question": ["q"], "option": ["A. 1;B. 2"], "answer": ["B"], "image_path": pa.array([None], IMAGE)}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="row 0: column image_path is empty; expected an image"):
        we_math(tmp_path / "x.parquet")[0]


def test_options_wrapped_answers_and_missing_values(tmp_path):
    columns = {
        "problem": ["q"] * 5,
        "options": pa.array([{"A": "red", "B": "blue", "C": None}] * 4 + [None]),
        "solution": ["<answer> B. blue </answer>", "<think>?</think><answer>red</answer>", "A", "C", "#### 3"],
        "id": [1.0, float("nan"), 3.0, None, 5.0],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    dataset = parquet_questions(tmp_path / "x.parquet")
    assert [dataset.raw_record(i).answer for i in range(5)] == ["B", "A", "A", "C", "3"]
    assert dataset[0].question == "q\nA. red\nB. blue" and dataset[0].options == ("red", "blue")
    assert [(p.where[-1], p.reason) for p in check(dataset).problems] == [("3", "answer_not_among_options")]
    numbers = {"question": ["q"] * 2, "answer": [3.5, float("nan")]}
    pq.write_table(pa.table(numbers), tmp_path / "y.parquet")
    dataset = parquet_questions(tmp_path / "y.parquet")
    assert dataset[0].answer == "3.5" and check(dataset).problems[0].message == "answer is missing; expected text"
    images = {"question": ["Which?"], "choices": [["<image>", "<image>"]], "answer": ["B"], "images": [[BYTES, BYTES]]}
    pq.write_table(pa.table(images), tmp_path / "z.parquet")
    assert parquet_questions(tmp_path / "z.parquet")[0].question == "Which?\nA. picture 1\nB. picture 2"
    written = {"question": ["Which?\nA. red\nB. blue"], "choices": [["A. red", "B. blue"]], "answer": ["B"]}
    pq.write_table(pa.table(written), tmp_path / "w.parquet")
    assert parquet_questions(tmp_path / "w.parquet")[0].question == "Which?\nA. red\nB. blue"


def test_a_file_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path, monkeypatch):
    """One text of a megabyte for each of 20,000 rows: 20 GB of a file of about a megabyte."""
    text = np.random.default_rng(0).integers(32, 127, 2**20, np.uint8).tobytes().decode()
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array([text]))
    pq.write_table(pa.table({"question": column, "answer": ["1"] * 20_000}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 2**21
    with pytest.raises(ValueError, match="x.parquet: .*unpacks to"):
        parquet_questions(tmp_path / "x.parquet")
    pq.write_table(pa.table({"question": [text[:20_000]] * 5000, "answer": ["1"] * 5000}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: .*its text unpacks to more than [0-9,]+ bytes"):
        parquet_questions(tmp_path / "x.parquet")
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), pa.array([PNG + b"." * 2**20]))
    pq.write_table(pa.table({"question": ["q"] * 3000, "answer": ["1"] * 3000, "image": image}), tmp_path / "y.parquet")
    assert parquet_questions(tmp_path / "y.parquet")[2999].images[0].width == 37
    rows = pa.table({"question": pa.nulls(10_000_001, pa.string()), "answer": pa.nulls(10_000_001, pa.string())})
    pq.write_table(rows, tmp_path / "z.parquet")
    with pytest.raises(ValueError, match="claims 10,000,001 rows; at most 10,000,000 are read"):
        parquet_questions(tmp_path / "z.parquet")


def test_a_crash_or_a_hang_of_the_reading_process_is_named_and_survived(tmp_path, monkeypatch):
    pq.write_table(pa.table(QUESTION | {"image": [BYTES]}), tmp_path / "x.parquet")
    dataset, process = parquet_questions(tmp_path / "x.parquet"), parquet_process.parquet_process()
    for _ in range(2):
        os.kill(process._process.pid, signal.SIGSEGV)
        process._process.wait()
        with pytest.raises(ValueError, match=r"x.parquet: reading it ended the reading process \(SIGSEGV\)") as error:
            dataset[0]
        assert error.value.reason == "image_invalid"
        assert dataset[0].images[0].width == 37
    os.kill(process._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(parquet_process, "_DEADLINE_S", 0.2)
    with pytest.raises(ValueError, match="x.parquet: reading it took more than 0.2 s"):
        parquet_questions(tmp_path / "x.parquet")
    monkeypatch.undo()
    assert len(parquet_questions(tmp_path / "x.parquet")) == 1


def test_cached_images_are_those_of_the_file(tmp_path):
    pq.write_table(pa.table(QUESTION | {"image": [BYTES]}), tmp_path / "x.parquet")
    dataset = parquet_questions(tmp_path / "x.parquet")
    assert dataset[0].images[0].width == dataset[0].images[0].width == 37
    pq.write_table(pa.table(QUESTION | {"image": [png(38)]}), tmp_path / "x.parquet")
    assert dataset[0].images[0].width == 38


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_the_cache_is_bounded_and_its_batches_are_found(tmp_path, monkeypatch, suffix):
    """Oracle: the widths as written, in an order that leaves and re-enters batches and row groups."""
    widths = [1 + n % 150 for n in range(300)]
    path = tmp_path / f"x.{suffix}"
    columns = {"image": [png(width) for width in widths]}
    if suffix == "parquet":
        write(path, columns, {"image": IMAGE}, group=200)
    else:
        table = pa.table(columns, schema=pa.schema([("image", IMAGE)]))
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=200)
    monkeypatch.setattr(parquet_child, "_CACHE_BYTES", 10_000)
    files = parquet_child._Files()
    for row in (0, 63, 64, 199, 200, 299, 0, 65, 250, 199):
        cell = files.cell(str(path), "image", row)
        assert Image.open(io.BytesIO(cell["bytes"])).width == widths[row]
        assert files._bytes == sum(array.nbytes for array in files._cached.values())
        assert files._bytes <= 10_000 or len(files._cached) == 1
