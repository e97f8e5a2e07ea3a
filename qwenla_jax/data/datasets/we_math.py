"""We-Math (testmini, 1,740 questions), its own files and the parquet layout on Hugging Face.

Own files, confirmed against the repository We-Math/We-Math: `testmini.json`, a list of objects with `ID`, `key`,
`question`, `option` (one string), `answer` (a letter) and `image_path` relative to the file's folder. `ID` alone is not
unique: the steps of one problem share it and differ in `key`.

Parquet: `question`, `option`, `answer` and the image in `image_path` are confirmed by a public script that reads
We-Math/We-Math from there; that `ID` and `key` are there too is not, and rows without them get their row as id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import from_string
from qwenla_jax.data.datasets.parquet import is_parquet, needed_images, read_parquet
from qwenla_jax.data.datasets.raw_record import Dataset, RawImage, RawRecord, records_of
from qwenla_jax.data.datasets.rows import answer_of, image_at, text_of
from qwenla_jax.utils.json_files import read_json


def we_math(path: str | Path) -> Dataset:
    """We-Math of a folder that holds `testmini.json` (or `data/testmini.json`), of that file, or of parquet files.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not of either layout.
    """
    path = Path(path)
    if is_parquet(path):
        table = read_parquet(path, ("question", "option", "answer", "image_path"))
        return Dataset(
            "we_math", records_of(table, lambda at, row: _raw_record(at, row.values, needed_images(row, "image_path")))
        )
    if path.is_dir():
        places = (path / "testmini.json", path / "data" / "testmini.json")
        path = next((each for each in places if each.is_file()), path)
        if path.is_dir():
            raise FileNotFoundError(f"{path}: holds neither testmini.json nor data/testmini.json nor parquet files")
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, as in We-Math's testmini.json")
    return Dataset(
        "we_math",
        records_of(
            ((f"{path}: question {number}", row) for number, row in enumerate(rows)),
            lambda at, row: _raw_record(at, row, (image_at(path.parent, text_of(row, "image_path", at), at),)),
        ),
    )


def _raw_record(where: str, row: dict[str, Any], images: tuple[RawImage, ...]) -> RawRecord:
    return RawRecord(
        where,
        f"{row['ID']}/{row['key']}" if row.get("ID") and row.get("key") else where,
        text_of(row, "question", where),
        from_string(text_of(row, "option", where)),
        answer_of(row, "answer", where),
        None,
        str(row.get("key") or "question"),
        images,
    )
