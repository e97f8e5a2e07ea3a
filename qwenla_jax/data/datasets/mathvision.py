"""MathVision (test 3,040 questions, testmini 304), its own files and the parquet layout on Hugging Face.

Own files, confirmed against its `test.jsonl`: an object a line with `id`, `question`, `options` (a list, empty where
the answer is free), `answer` (a letter, or the free answer), `subject`, `level`, and `image`, a path relative to the
file. A question has one image even where its text numbers several; see `placeholders`.

Parquet, confirmed against the feature list of the dataset's card (MathLLMs/MathVision): the same fields, with the
image in `decoded_image` and only its name in `image`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import lettered
from qwenla_jax.data.datasets.parquet import is_parquet, needed_images, read_parquet
from qwenla_jax.data.datasets.raw_record import Dataset, RawImage, RawRecord, RecordError, invalid
from qwenla_jax.data.datasets.rows import answer_of, image_at, read_jsonl, text_of

_IMAGE_TAG = re.compile(r"<image(\d+)>")  # an option that is a part of the image
_LINE_BREAK = re.compile(r"\\n(?![a-z])")  # 30 questions hold backslash and n for one, and LaTeX has \ne and \nu


def mathvision(path: str | Path) -> Dataset:
    """MathVision of a JSONL file, of a folder that holds `test.jsonl`, or of parquet files.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not of either layout.
    """
    path = Path(path)
    raw_records = []
    if is_parquet(path):
        for row in read_parquet(path, ("id", "question", "options", "answer", "decoded_image")):
            raw_records.append(_raw_record(row.values, row.where, lambda row=row: needed_images(row, "decoded_image")))
        return Dataset("mathvision", raw_records)
    path = path / "test.jsonl" if path.is_dir() else path
    for where, row in read_jsonl(path):
        if isinstance(row, RecordError):
            raw_records.append(invalid(where, row.reason, row.message))
        else:
            raw_records.append(
                _raw_record(
                    row,
                    where,
                    lambda row=row, where=where: (image_at(path.parent, text_of(row, "image", where), where),),
                )
            )
    return Dataset("mathvision", raw_records)


def _raw_record(row: dict[str, Any], where: str, images: Callable[[], tuple[RawImage, ...]]) -> RawRecord:
    try:
        options = lettered(row.get("options"))
        return RawRecord(
            where,
            text_of(row, "id", where),
            _LINE_BREAK.sub("\n", text_of(row, "question", where)),
            tuple((letter, _IMAGE_TAG.sub(r"picture \1", text)) for letter, text in options),
            answer_of(row, "answer", where),
            None,
            str(row.get("subject") or "question"),
            images(),
            parts=True,
        )
    except RecordError as error:
        return invalid(where, error.reason, error.message)
    except ValueError as error:
        return invalid(where, "options", str(error))
