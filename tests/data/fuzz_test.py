"""Corrupt datasets and images: an error that names the file or the row, in no time and in bounded memory.

Oracle: the kind of the error, the clock, the memory that the process has taken at its most. 2,000 mutations of each
kind; `QWENLA_FUZZ=100000 pytest tests/data/fuzz_test.py` is the long form, and `QWENLA_FUZZ_SEED` repeats a seed.
"""

import csv
import io
import json
import os
import random
import time

import pytest
from measure import peak_growth, slower_than
from PIL import Image

from qwenla_jax.data.datasets.parquet_process import parquet_process
from qwenla_jax.data.datasets.readers import READERS
from qwenla_jax.data.images.decode import ImageError, open_image
from qwenla_jax.data.sources.factory import make_source

CASES = int(os.environ.get("QWENLA_FUZZ", "2000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
MOST_MB = 1500
PIECES = [
    *(b"\xff", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"1e999", b"-0", b"null", b"[]", b"{}", b"[" * 2000, b'"'),
    *(b"<image>", b"<image2>", b"<video>", b"<answer>", b"</answer>", b'{"a":' * 500, b"9" * 5000, b"\n", b"../", b"/"),
    *(b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x80\x80\x80\x80\x01"),
]


# A PNG of one pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def mutated(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 12))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at : at + rng.randrange(1, 20)]
            case 2:
                content[at:at] = rng.choice(PIECES)
            case 3:
                piece = rng.choice(PIECES)
                content[at : at + len(piece)] = piece
            case 4:
                other = rng.randrange(len(content) + 1)
                content[at:at] = content[other : other + 40]
            case 5 if rng.random() < 0.3:
                del content[at:]
    return bytes(content)


def read_all(source):
    """Whether all records can be read; a record's fault has a reason to be counted by."""
    whole = True
    for index in range(min(len(source), 4)):
        try:
            source[index]
        except ValueError as error:
            assert getattr(error, "reason", None), error
            whole = False
    return whole


def child_seconds():
    """Of the reading process that is there now."""
    process = parquet_process()._process
    try:
        with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return process.pid, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError):
        return None, 0.0


def fuzz(name, seeds, read, refused=(ValueError, OSError)):
    """Runs `read` on mutations of (suffix, content)."""
    rng = random.Random(f"{SEED} {name}")
    print(f"QWENLA_FUZZ_SEED={SEED}")  # pytest shows it where the test fails
    whole, growth = 0, peak_growth()
    for _ in range(CASES):
        content = mutated(rng, rng.choice(seeds))
        (pid, began), start = child_seconds(), time.thread_time()
        try:
            whole += bool(read(content))
        except refused as error:
            assert str(error) and not isinstance(error, UnicodeError), repr(error)
        assert not slower_than(1, start, read, content), content[:200]
        after, ended = child_seconds()
        assert after != pid or ended - began < 1, content[:200]
    assert 0 < whole < CASES  # some are still whole, and not all
    assert growth() < MOST_MB


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    for place in ("merged_screenshots/a.png", "1/img_diagram.png"):
        (tmp_path / place).parent.mkdir()
        Image.new("RGB", (30, 20), "red").save(tmp_path / place)
    return tmp_path


def rows():
    said = "".join(f"<{t}>x</{t}>" for t in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION"))
    row = {"id": "a", "image": "a.png", "question": "<image>\nq?", "answer": "<answer> B </answer>", "response": said}
    choices = {"options": ["A. red", "B. blue"]}
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": said}]
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "text", "text": "q"},
    ]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    messages.append({"role": "assistant", "content": said})
    scemqa = {"Question": "q\nA. x\nB. y", "Answer (final answer highlighted)": "B: y", "ImagePath": "a.png"}
    maths = {"ID": "1", "key": "k", "question": "q", "option": "A. 1; B. 2", "answer": "B", "image_path": "a.png"}
    table = io.StringIO()
    csv.writer(table).writerows(
        [
            ["input_image_location-input", "final_answer-output", "final_answer_range-output", "question-input"],
            ["a", "B", "A-D", "q, <image>"],
            ["b", "2", "1-4", ""],
        ]
    )
    return {
        "jsonl": ("x.jsonl", [row | choices, row | {"id": "b", "kind": "k"}, row | {"id": "c"}]),
        "conversations": ("y.jsonl", [{"image": "a.png", "conversations": talk}, {"messages": messages}]),
        "mathvision": ("test.jsonl", [row | choices | {"subject": "s"}, row | {"id": "b", "options": [], "level": 1}]),
        "llava_cot": ("train.jsonl", [{"id": "a", "image": "a.png", "conversations": talk * 2}]),
        "we_math": ("testmini.json", [maths, maths | {"key": "l"}]),
        "scemqa": ("multiple_choice.json", {"M": [scemqa, scemqa]}),
        "geometry3k": ("1/data.json", {"problem_text": "q", "choices": ["1", "2"], "answer": "A"}),
        "polymath": ("annotations.csv", table.getvalue()),
    }


@pytest.mark.parametrize("name", rows())
def test_text_files(folder, name):
    place, content = rows()[name]
    path = folder / place
    if place.endswith(".jsonl"):
        content = "\n".join(map(json.dumps, content))
    content = content if isinstance(content, str) else json.dumps(content)

    def read(mutation):
        path.unlink(missing_ok=True)  # some file systems write what is truncated to the disk at once
        path.write_bytes(mutation)
        if name in ("jsonl", "conversations"):
            return read_all(make_source(str(path), "train", seed=0, whole=True, max_invalid=10**9))
        return read_all(READERS[name](folder if name == "geometry3k" else path))

    fuzz(name, [content.encode()], read)


def test_parquet(folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    img = (folder / "a.png").read_bytes()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"id": ["a", "b", "c"], "question": ["<image>q"] * 3, "answer": ["x", "B", "x"]}
    columns |= {"options": [["x", "y"], [], ["x", "B"]], "level": [1.0, None, 3.0]}
    images = [
        pa.array([{"bytes": img, "path": "a"}] * 3, kind),
        pa.array([[{"bytes": None, "path": "a.png"}]] * 3, pa.list_(kind)),
        pa.array(["a.png"] * 3),
    ]
    seeds = []
    for number, compression in enumerate(("none", "snappy", "zstd", "gzip")):
        for image in images:
            out = io.BytesIO()
            pq.write_table(
                pa.table(columns | {"image": image}),
                out,
                compression=compression,
                row_group_size=2,
                use_dictionary=number % 2 == 0,
                data_page_version="2.0" if number > 1 else "1.0",
                store_schema=number != 0,
            )
            seeds.append(out.getvalue())
    path = folder / "x.parquet"

    def read(mutation):
        path.unlink(missing_ok=True)  # some file systems write what is truncated to the disk at once
        path.write_bytes(mutation)
        return read_all(READERS["parquet"](path))

    fuzz("parquet", seeds, read)
    with open(f"/proc/{parquet_process()._process.pid}/status", encoding="ascii") as file:
        most = next(line for line in file if line.startswith("VmHWM"))
    assert int(most.split()[1]) >> 10 < MOST_MB


def test_arrow(folder):
    pa = pytest.importorskip("pyarrow")
    image = {"bytes": (folder / "a.png").read_bytes(), "path": "a"}
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "B"}]
    table = pa.table(
        {"id": ["a", "b", "c"], "messages": [turns] * 3, "images": [[image]] * 3, "level": [1.0, None, 3.0]}
    )
    seeds = []
    for rows in (1, 3):
        out = io.BytesIO()
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=rows)
        seeds.append(out.getvalue())
    path = folder / "x.arrow"

    def read(mutation):
        path.unlink(missing_ok=True)
        path.write_bytes(mutation)
        return read_all(READERS["parquet"](path))

    fuzz("arrow", seeds, read)


@pytest.mark.filterwarnings("ignore")
def test_images():
    noise = Image.effect_noise((24, 16), 60)
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
    saved = [(kind, noise.convert("RGB"), {}) for kind in kinds]
    saved += [(kind, noise.convert("RGBA"), {}) for kind in ("PNG", "TIFF", "WEBP")] + [("PNG", noise.convert("P"), {})]
    saved += [("TIFF", noise, {"compression": "tiff_lzw"}), ("JPEG", noise, {"progressive": True})]
    exif = Image.Exif()
    exif[0x0112] = 6
    saved += [(kind, noise, {"exif": exif}) for kind in ("JPEG", "PNG")]
    seeds = []
    for kind, image, options in saved:
        out = io.BytesIO()
        image.save(out, kind, **options)
        seeds.append(out.getvalue())
    fuzz("images", seeds, open_image, refused=ImageError)
