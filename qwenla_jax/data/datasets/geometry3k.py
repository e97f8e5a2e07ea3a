"""Geometry3K (3,002 questions: train 2,101, validation 300, test 601), its own files and the parquet layout.

Own files, confirmed against the repository lupantech/InterGPS and the samples in it: one folder a question, named by
its number, with `data.json` (`annotat_text`, the text with its LaTeX marked, or `problem_text` without; `choices`;
`answer`, a letter) and `img_diagram.png`; these folders are in `train`, `val` and `test`.

Parquet, confirmed against the card of hiyouga/geometry3k: `images` (a list), `problem`, `answer`, and in its later
revision also `id`, `choices` and `ground_truth`. Where the latter two exist they are used and the answer is the
letter, else it is free. Not confirmed: that `problem` begins with `<image>` (it is removed anywhere), and whether
`ground_truth` is a letter (the text of exactly one option, in it or in `answer`, is accepted too).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import Option, letter_of, lettered
from qwenla_jax.data.datasets.parquet import Row, is_parquet, needed_images, read_parquet
from qwenla_jax.data.datasets.raw_record import Dataset, FileImage, RawRecord, RecordError, records_of
from qwenla_jax.data.datasets.rows import answer_of, text_of
from qwenla_jax.utils.json_files import read_json


def geometry3k(path: str | Path) -> Dataset:
    """Geometry3K of a folder of numbered folders (such as `train`), or of parquet files.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file is not of either layout.
    """
    path = Path(path)
    if is_parquet(path):
        return Dataset("geometry3k", records_of(read_parquet(path, ("images", "problem", "answer")), _from_row))
    folders = [each.parent for each in path.glob("*/data.json")] if path.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"{path}: holds no folder with a data.json; expected one such as geometry3k/train")
    folders.sort(key=lambda each: (len(each.name), each.name))  # by number
    return Dataset("geometry3k", records_of(((str(each / "data.json"), each) for each in folders), _from_folder))


def _from_folder(where: str, folder: Path) -> RawRecord:
    try:
        row = read_json(where)
    except (OSError, ValueError) as error:
        raise RecordError(where, "not_json", str(error).removeprefix(f"{where}: ")) from error
    if not isinstance(row, dict):
        raise RecordError(where, "not_an_object", f"holds a {type(row).__name__}; expected an object")
    goals = row.get("problem_type_goal")
    return RawRecord(
        where,
        f"{folder.parent.name}/{folder.name}",
        text_of(row, "annotat_text" if row.get("annotat_text") else "problem_text", where),
        _choices(row),
        answer_of(row, "answer", where),
        None,
        "+".join(map(str, goals)) if isinstance(goals, list) and goals else "question",
        (FileImage(folder / "img_diagram.png"),),
    )


def _choices(row: dict[str, Any]) -> tuple[Option, ...]:
    if options := lettered(row.get("choices")):
        return options
    raise ValueError(f"choices is {row.get('choices')!r}; expected a list of texts")


def _from_row(where: str, row: Row) -> RawRecord:
    answer = answer_of(row.values, "answer", where)
    options: tuple[Option, ...] = ()
    if row.values.get("choices") and row.values.get("ground_truth") is not None:
        options = _choices(row.values)
        named = letter_of(answer_of(row.values, "ground_truth", where), options)
        answer = named if named in [letter for letter, _ in options] else letter_of(answer, options)
    number = row.values.get("id")
    return RawRecord(
        where,
        str(number) if number is not None else where,
        text_of(row.values, "problem", where),
        options,
        answer,
        None,
        "question",
        needed_images(row, "images"),
    )
