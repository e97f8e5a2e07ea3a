"""MathVision (test 3,040 questions, testmini 304), its own files and the parquet layout on Hugging Face.

Own files, confirmed against its `test.jsonl`: an object a line with `id`, `question`, `options` (a list, empty where
the answer is free), `answer` (a letter, or the free answer), `subject`, `level`, and `image`, a path relative to the
file. A question has one image even where its text numbers several; see `placeholders`.

Parquet, confirmed against the feature list of the dataset's card (MathLLMs/MathVision): the same fields, with the
image in `decoded_image` and only its name in `image`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import lettered
from qwenla_jax.data.datasets.parquet import is_parquet, needed_images, read_parquet
from qwenla_jax.data.datasets.raw_record import Dataset, RawImage, RawRecord, records_of
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
    if is_parquet(path):
        rows = read_parquet(path, ("id", "question", "options", "answer", "decoded_image"))
        return Dataset(
            "mathvision",
            records_of(rows, lambda at, row: _raw_record(at, row.values, needed_images(row, "decoded_image"))),
        )
    path = path / "test.jsonl" if path.is_dir() else path
    return Dataset(
        "mathvision",
        records_of(
            read_jsonl(path),
            lambda at, row: _raw_record(at, row, (image_at(path.parent, text_of(row, "image", at), at),)),
        ),
    )


def _raw_record(where: str, row: dict[str, Any], images: tuple[RawImage, ...]) -> RawRecord:
    options = lettered(row.get("options"))
    return RawRecord(
        where,
        text_of(row, "id", where),
        _LINE_BREAK.sub("\n", text_of(row, "question", where)),
        tuple((letter, _IMAGE_TAG.sub(r"picture \1", text)) for letter, text in options),
        answer_of(row, "answer", where),
        None,
        str(row.get("subject") or "question"),
        images,
        parts=True,
    )
