"""Which columns of a row are its question, its answer, its images and so on: by common names, or as a setting says."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "question": ("question", "problem", "query", "prompt"),
        "answer": ("answer", "final_answer", "ground_truth", "solution", "gold"),
        "image": ("image", "images", "decoded_image", "image_path", "image_paths"),
        "messages": ("messages", "conversations"),
        "system": ("system",),
        "response": ("response",),
        "options": ("options", "choices", "option"),
        "id": ("id", "ID", "qid", "question_id", "pid"),
        "kind": ("kind", "category", "subject"),
    }
)
VIDEOS = ("video", "videos")  # columns whose content cannot be trained on
_MAX_FURTHER = 10_000  # characters of JSON


def parse_columns(text: str) -> dict[str, str]:
    """The columns of fields that a setting names: "question:prompt_text|image:img".

    Raises:
      ValueError: a pair of another form, or a field that is none of `FIELDS`.
    """
    result = {}
    for pair in text.split("|") if text else ():
        field, colon, column = pair.partition(":")
        if field not in FIELDS or not colon or not column:
            raise ValueError(f"columns: {pair!r} is no FIELD:COLUMN with a FIELD of {', '.join(FIELDS)}")
        result[field] = column
    return result


def refuse_unknown(columns: Mapping[str, str], there: Collection[str], where: object) -> None:
    """Checks that the columns that a setting names are there.

    Raises:
      ValueError: one is not; the message lists those that are.
    """
    for field, column in columns.items():
        if column not in there:
            raise ValueError(f"{where}: no column {column!r} (columns={field}:{column}); it has {', '.join(there)}")


def names_of(field: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that a field may be in, by preference."""
    return (columns[field],) if field in columns else FIELDS[field]


def value_of(row: Mapping[str, Any], field: str, columns: Mapping[str, str]) -> tuple[str, Any]:
    """The first column of a field that holds something in a row, and its value; None as the value where none does."""
    names = names_of(field, columns)
    return next(((name, row[name]) for name in names if row.get(name) not in (None, [])), (names[0], None))


def further_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """What a row of JSON has in columns that are no field, for users' rewards.

    Columns named as those of images or messages, and values of more than 10,000 characters of JSON, are left out.
    """
    used = {*VIDEOS, *FIELDS["image"], *FIELDS["messages"]}
    used.update(value_of(row, field, columns)[0] for field in FIELDS)
    return {k: value for k, value in row.items() if k not in used and len(json.dumps(value)) <= _MAX_FURTHER}
