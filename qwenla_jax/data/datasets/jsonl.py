"""A JSONL file of `{id, image, question, answer[, response][, kind][, options]}`: this project's own format.

`options` lists the texts of options A, B, C, ... (or maps letters to texts), by which answers are matched; the question
has them too. Users' rewards get whatever else the line has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import Option, lettered
from qwenla_jax.data.datasets.raw_record import Dataset, FileImage, RawRecord, RecordError, invalid
from qwenla_jax.data.datasets.rows import further_columns, read_jsonl
from qwenla_jax.text.answers.gold import unwrap_gold

_REQUIRED = ("id", "image", "question", "answer")
_OPTIONAL = ("response", "kind", "options")


def jsonl(path: str | Path) -> Dataset:
    """The records of a JSONL file; paths of images are relative to it, and may be outside of its folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no line.
    """
    path = Path(path)
    return Dataset(str(path), [_raw_record(row, where, path) for where, row in read_jsonl(path)])


def _raw_record(row: dict[str, Any] | RecordError, where: str, path: Path) -> RawRecord:
    try:
        if isinstance(row, RecordError):
            raise row
        for key in (*_REQUIRED, "response", "kind"):
            value = row.get(key)
            if key == "image" and value in (None, "", []):
                raise RecordError(where, "image_absent", "image is missing; expected the path of an image")
            if value is None and key in _REQUIRED:
                raise RecordError(where, "field", f"{key} is missing")
            if value is not None and not isinstance(value, str):
                raise RecordError(where, "field", f"{key} is {repr(value)[:80]}; expected text")
        options = _options(row, where)
        if not (path.parent / row["image"]).is_file():
            raise RecordError(where, "image_absent", f"image {row['image']!r}: no such file beside {path.name}")
    except RecordError as error:
        return invalid(where, error.reason, error.message)
    return RawRecord(
        where,
        row["id"],
        row["question"],
        options,
        unwrap_gold(row["answer"]),
        row.get("response"),
        row.get("kind") or "question",
        (FileImage(path.parent / row["image"]),),
        written=True,
        columns=further_columns(row, (*_REQUIRED, *_OPTIONAL)),
    )


def _options(row: dict[str, Any], where: str) -> tuple[Option, ...]:
    given = row.get("options")
    texts = list(given.values()) if isinstance(given, dict) else [] if given is None else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        message = f"options is {repr(given)[:80]}; expected a list of the options' texts, or letters with their texts"
        raise RecordError(where, "options", message)
    try:
        return lettered(given)
    except ValueError as error:
        raise RecordError(where, "options", str(error)) from error
