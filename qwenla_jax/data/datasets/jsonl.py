"""JSONL files of questions: this project's own form, and the forms of `data.datasets.conversations`.

Own form: `{id, image, question, answer[, response][, kind][, options][, system]}`, where `options` lists the texts of
options A, B, C, ... (or maps letters to texts), by which answers are matched; the question has them too. `image` is the
path of an image, base64, a data URL, or a list of these. Columns of other names: see `data.datasets.columns`.
Users' rewards get whatever else a line has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.columns import further_columns, refuse_unknown, value_of
from qwenla_jax.data.datasets.conversations import image_text, read_question
from qwenla_jax.data.datasets.raw_record import Dataset, FileImage, RawRecord, RecordError, records_of
from qwenla_jax.data.datasets.rows import image_of_text, read_jsonl


def jsonl(path: str | Path, columns: Mapping[str, str] | None = None, first_turn: bool = False) -> Dataset:
    """The records of a JSONL file.

    Args:
      path: the file; paths of images are relative to it, and may be outside of its folder.
      columns, first_turn: as in `conversations.read_question`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no line, or none has a column that `columns` names.
    """
    path, rows = Path(path), list(read_jsonl(Path(path)))
    there = dict.fromkeys(key for _, row in rows if not isinstance(row, RecordError) for key in row)
    if rows:
        refuse_unknown(columns or {}, there, path)
    return Dataset(str(path), records_of(rows, lambda at, row: _raw_record(at, row, path, columns or {}, first_turn)))


def _raw_record(where: str, row: dict[str, Any], path: Path, columns: Mapping[str, str], first: bool) -> RawRecord:
    column, given = value_of(row, "image", columns)
    texts = [image_text(each, column, where) for each in (given if isinstance(given, list) else [given]) if each]
    images = [image_of_text(text, path.parent, f"{where}, image {n}") for n, text in enumerate(texts)]
    line = where.rpartition(":")[2]
    record = read_question(where, row, columns, images, path.parent, line, written=True, first_turn=first)
    question, messages = (value_of(row, field, columns)[1] for field in ("question", "messages"))
    if not record.images and messages is None and not isinstance(question, list):
        raise RecordError(where, "image_absent", f"{column} is missing; expected the path of an image")
    for image in record.images:
        if isinstance(image, FileImage) and not image.path.is_file():
            short = image.name.removeprefix(f"{path.parent}/")
            raise RecordError(where, "image_absent", f"image {short!r}: no such file beside {path.name}")
    return dataclasses.replace(record, columns=further_columns(row, columns))
