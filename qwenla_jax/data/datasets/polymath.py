"""PolyMATH (test 5,000 questions, testmini 1,000), the parquet layout on Hugging Face and its own files.

The question and its options are in the image itself; the text below is ours.

Parquet, confirmed against a public script that reads him1411/polymath from there: `image`, `category`, `final_answer`,
`final_answer_range`, `answer_option`. What exactly `answer_option` holds could not be confirmed, so it is not used;
a `question` is used where there is one. An id could not be confirmed either: rows without one get their row as id.

Own files, confirmed against the scripts of polymathbenchmark/PolyMATH (the file itself is not in that repository):
`annotations.csv` with `input_image_location-input`, `category-input`, `final_answer-output` and
`final_answer_range-output`, and the images in `merged_screenshots/`, named by `input_image_location-input`
with ".png" appended.

An answer is a letter, or a number from 1 to 4 where the range is one of numbers. Gold that accepts several ("[A,B]",
which the official scorer allows) is rejected, since a record has one answer.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.parquet import is_parquet, needed_images, read_parquet
from qwenla_jax.data.datasets.raw_record import Dataset, RawImage, RawRecord, RecordError, records_of
from qwenla_jax.data.datasets.rows import answer_of, image_at, text_of

_LETTERS = "Answer the question in the picture with the letter of the right option."
_NEEDED = ("input_image_location-input", "final_answer-output")
_NUMBERS = "Answer the question in the picture with the number of the right option."


def polymath(path: str | Path) -> Dataset:
    """PolyMATH of parquet files, or of a folder that holds `annotations.csv` and `merged_screenshots`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not of either layout.
    """
    path = Path(path)
    if is_parquet(path):
        rows = read_parquet(path, ("image", "final_answer"))
        return Dataset(
            "polymath",
            records_of(
                rows,
                lambda at, row: _raw_record(
                    at, row.values, str(row.values.get("id") or at), needed_images(row, "image")
                ),
            ),
        )
    file = path / "annotations.csv" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    images = file.parent / "merged_screenshots"

    def read(where: str, row: dict[str, Any]) -> RawRecord:
        place = row.get("input_image_location") or ""
        name = f"{row['paper_id']}_{place}" if row.get("paper_id") else place
        return _raw_record(where, row, name, (image_at(images, f"{place}.png" if place else "", where),))

    return Dataset("polymath", records_of(_rows(file), read))


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row by the names before the hyphen); a parser's error gets file and line."""
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            lacking = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if lacking:
                raise ValueError(f"lacks column {', '.join(lacking)}")
            for row in reader:
                yield f"{file}:{reader.line_num}", {key.split("-")[0]: value for key, value in row.items() if key}
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{file}:{reader.line_num}: {error}") from error


def _raw_record(where: str, row: dict[str, Any], name: str, images: tuple[RawImage, ...]) -> RawRecord:
    answer = answer_of({"final_answer": row.get("final_answer") or ""}, "final_answer", where).strip("[]'\" ")
    if "," in answer:
        raise RecordError(where, "several_answers", f"the answer {answer!r} accepts several; one is expected")
    numbers = str(row.get("final_answer_range") or "").replace(" ", "") in ("1-4", "1,2,3,4") or answer.isdigit()
    question = text_of(row, "question", where) if row.get("question") else _NUMBERS if numbers else _LETTERS
    if len(answer) == 1:
        answer = answer.upper()
    return RawRecord(where, name, question, (), answer, None, str(row.get("category") or "question"), images)
