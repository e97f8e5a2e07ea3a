"""Corrupt files of questions and predictions through their readers and scorers: a result, or a refusal by name.

Oracle: the clock, the process's memory, and which errors may come. `QWENLA_FUZZ=100000 pytest
tests/evals/files_fuzz_test.py` is the long form, and `QWENLA_FUZZ_SEED` repeats a seed.
"""

import copy
import csv
import io
import json
import os
import random
import re
import time
import zipfile

import pytest
from measure import peak_growth, slower_than

from qwenla_jax.evals.registry import questions_of, score_files
from qwenla_jax.evals.table_files import read_rows
from qwenla_jax.evals.table_writer import write_rows
from qwenla_jax.evals.task import Settings

CASES = int(os.environ.get("QWENLA_FUZZ", "2000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
MEMORY = 512  # MB that all mutations of a kind of file may add to the process
SETTINGS = Settings(algebra=False, missing="wrong", unknown="ignore")
ABOUT = {"question": "which?", "category": "Art", "prediction": "It is A", "answer": "A", "split": "dev"}
LETTERED = [{"index": n, **ABOUT, "A": "red", "B": "None", "C": "nan", "image": "0"} for n in range(3)]
ROWS = {
    "mmmu": [
        {"id": f"validation_Art_{n}", **ABOUT, "options": "['red', 'blue']", "image_1": "a.png", "level": 3.5}
        for n in range(2)
    ]
    + [{"id": "validation_Art_9", "question": "5?", "answer": ["5", "five"], "question_type": "open", "response": "5"}],
    "mmstar": LETTERED,
    "mmbench": [LETTERED[0], LETTERED[1] | {"index": 1_000_000}],
    "mmmu_pro": [{"id": f"test_{n}", **ABOUT, "options": ["red", "blue"], "config": "vision"} for n in range(2)],
    "mathvision": [{"id": "1", **ABOUT, "choices": "['3', '4']", "image": "['a.png', 'b.png']"}],
    "pope": [{"id": n, "question_id": n, **ABOUT, "category": "random,popular", "answer": "yes"} for n in range(2)],
    "mme": [{"category": "OCR", "image": "a", "question": n, "answer": "No", "prediction": "no"} for n in "ab"],
    "chair": [{"image_id": 1, "objects": ["dog"], "caption": "A dog."}],
}
COCO = {  # as one row of questions and of predictions
    "images": [{"id": 1}],
    "categories": [{"id": 7, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 1, "caption": "Two dogs."}],
    "prediction": "A cat",
    "id": 1,
}
HOSTILE = [
    None, True, -1, 1e308, float("nan"), float("inf"), 10**400, "", " ", "nan", "\ud800", "\x00", "[", "[[", "['a'",
    "A" * 70, [], [[]], {}, [None], {"a": None}, {"id": {}}, ["a", 5, {}], [float("nan")] * 3, "[" * 300,
    "-" * 300 + "1", [["a"] * 3] * 3, "1" * 5000, "0", "../x", "data:,", "\u2028", "?",
    list("ABCDEFGHIJKLMNOPQRSTUVWXYZ!"),
]  # fmt: skip
NUMBERS = [b"0", b"-1", b"99999999999", b"9" * 400, b"9" * 5000, b"1e999", b"1.5", b"1048577", b"XFD1048576", b"ZZZ1"]
BYTES = [b'"', b"\t", b"\n", b"\r", b"\\", b"{", b"}", b"[", b"]" * 50, b"[" * 5000, b'{"":' * 5000, b",", b"\t" * 300]
BYTES += [b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"<", b">", b"&", b"<c/>", b"NaN", *NUMBERS]


def corrupt(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        end = min(len(data), at + rng.choice((1, 1, 4, 40)))
        if kind == 0:
            data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = rng.choice(BYTES)
        elif kind == 3:
            data[at:at] = data[max(0, at - 60) : at]
        elif kind == 4 and (numbers := list(re.finditer(rb"[A-Z]?[0-9]+", data))):
            start, end = rng.choice(numbers).span()
            data[start:end] = rng.choice(NUMBERS)
        else:
            del data[at if rng.random() < 0.3 else len(data) :]
    return bytes(data)


def twisted(rng, value):
    """A value with hostile ones in places of its own; keys may go, or stand at another's value."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and rng.random() < 0.8:
                at = at[key]
                continue
            if rng.random() < 0.2:
                del at[key]
            else:
                at[key] = copy.deepcopy(rng.choice(HOSTILE) if rng.random() < 0.8 else at[rng.choice(keys)])
            break
    return value


def text_of(ending, value):
    if ending == "json":
        return json.dumps(value).encode()
    rows = value if isinstance(value, list) else [value]
    if ending == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    rows = [row for row in rows if isinstance(row, dict)]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(dict.fromkeys(str(key) for row in rows for key in row)), delimiter="\t")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def sheet_of(rng, folder, rows, parts):
    """An xlsx file with a corrupt part, or itself corrupt; `parts` keeps the sound ones by task."""
    if not parts:
        write_rows(folder / "sound.xlsx", [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])
        with zipfile.ZipFile(folder / "sound.xlsx") as archive:
            parts |= {name: archive.read(name) for name in archive.namelist()}
    chosen = dict(parts)
    if rng.random() < 0.8:
        name = rng.choice([*parts, *[name for name in parts if "sheet" in name] * 3])
        chosen[name] = corrupt(rng, chosen[name])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in chosen.items():
            archive.writestr(name, data)
    return file.getvalue() if chosen != parts else corrupt(rng, file.getvalue())


def use(task, path):
    """What a run does with a file: reads it, opens its questions, scores it. A refusal by the reader names the file."""
    try:
        read_rows(path)
    except (ValueError, OSError) as error:
        assert path.name in str(error), error
        return False
    if path.suffix == ".xlsx":  # rows are rows, and openpyxl takes its time
        return True
    done = 0
    for each in (score_files, questions_of):
        try:
            result = each(task, [path], settings=SETTINGS)
            result.table().encode() if each is score_files else result[0]
            done += 1
        except (ValueError, OSError) as error:
            assert not isinstance(error, UnicodeError) and str(error)
    return bool(done)


@pytest.mark.filterwarnings("ignore::UserWarning:openpyxl")
@pytest.mark.parametrize("ending", ["json", "jsonl", "tsv", "xlsx"])
def test_damaged_files(tmp_path, ending):
    pytest.importorskip("openpyxl")
    rng = random.Random(f"{SEED} {ending}")
    print(f"QWENLA_FUZZ_SEED={SEED}")
    path, parts, used = tmp_path / f"said_random.{ending}", {}, 0
    for task, rows in ROWS.items():  # what is loaded at the first call is no file's doing
        if ending != "xlsx":
            path.write_bytes(text_of(ending, rows))
            use(task, path)
    growth = peak_growth()
    for _ in range(CASES):
        task = rng.choice([*ROWS, "chair"])
        rows = [COCO] if task == "chair" and rng.random() < 0.7 else ROWS[task]
        if ending == "xlsx":
            data = sheet_of(rng, tmp_path, ROWS[task], parts.setdefault(task, {}))
        elif rng.random() < 0.5:
            data = corrupt(rng, text_of(ending, rows))
        else:
            whole = rows if rng.random() < 0.7 else {str(n): row for n, row in enumerate(rows)}
            data = text_of(ending, twisted(rng, rows if ending != "json" else whole))
        path.write_bytes(data)
        start = time.thread_time()
        try:
            used += use(task, path)
        except Exception as error:
            raise AssertionError((task, data)) from error
        assert not slower_than(1, start, use, task, path), (task, data)
    assert used > CASES // 20  # some files are sound enough to be used
    assert growth() < MEMORY
