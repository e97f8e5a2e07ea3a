"""Files of questions and of predictions, as users have them, read into rows; and the two joined.

JSON (a list, a dict by id or by subject, VLMEvalKit's and the benchmarks' own forms), JSON lines and objects of several
lines one after the other under any of these names, TSV and xlsx of VLMEvalKit, parquet of Hugging Face, and MME's text
files of four columns.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.parquet import is_parquet, read_parquet, stored_images
from qwenla_jax.data.datasets.raw_record import RawImage
from qwenla_jax.evals.sheets import xlsx_lines
from qwenla_jax.utils.json_files import check_file, loads_all, read_bytes

PREDICTION_KEYS = ("prediction", "response", "output", "text", "caption", "model_answer", "answer")
NOTHING = frozenset(("nan", "NaN", "<NA>"))  # what programs write for a missing value, so that it looks like a text
_ID_KEYS = ("id", "index", "question_id", "image_id")
_SHOWN = 5  # names in an error message
_LISTED = 30  # a row's columns in one
_MME_COLUMNS = ("image", "question", "answer", "prediction")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
      where: file and row, for errors.
      number: its place in the file from 0.
      source: the file's folder and name without its ending, which tell some benchmarks' parts apart.
      values: what it holds; empty cells are left out.
      images: its images, unopened.
    """

    where: str
    number: int
    source: str
    values: Mapping[str, Any]
    images: tuple[RawImage, ...] = ()

    def text(self, *keys: str) -> str | None:
        """The first of these values that is there, as text: whole numbers without ".0"; None where there is none."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if value is not None and not isinstance(value, list | dict):
                return str(value)
        return None

    def need(self, *keys: str) -> str:
        """As `text`.

        Raises:
          ValueError: none of them is there.
        """
        result = self.text(*keys)
        if result is None:
            names = list(self.values)
            held = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
            raise ValueError(f"{self.where}: lacks {' or '.join(keys)}; it has {held or 'nothing'}")
        return result

    def below(self, other: Row) -> Row:
        """This row with what it lacks taken from another one."""
        return dataclasses.replace(self, values={**other.values, **self.values})


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, or of a folder of parquet files.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read; the message names the file, the line and what was expected.
    """
    source = f"{path.parent.name}/{path.name if path.is_dir() else path.stem}"
    if is_parquet(path):
        result = []
        for number, (where, row) in enumerate(read_parquet(path)):
            images = tuple(each for column in row.counts for each in stored_images(row, column))
            result.append(Row(where, number, source, _filled(row.values), images))
        return result
    readers = {".tsv": _tsv, ".xlsx": _xlsx, ".json": _json, ".jsonl": _json, ".txt": _columns}
    if path.suffix not in readers:
        raise ValueError(f"{path}: cannot read {path.suffix or 'this'}; expected {', '.join(readers)} or .parquet")
    rows = readers[path.suffix](path)
    return [Row(f"{path}: row {n + 1}", n, source, _filled(values)) for n, values in enumerate(rows)]


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without cells that hold nothing: None, nan, the empty text."""
    empty = lambda value: value is None or value == "" or (isinstance(value, float) and math.isnan(value))  # noqa: E731
    return {str(key): value for key, value in values.items() if not empty(value) or key in PREDICTION_KEYS[:-1]}


def _json(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    values = loads_all(text, str(path))
    if len(values) != 1:
        return _objects(path, [value for _, value in values])
    ((_, whole),) = values
    if isinstance(whole, dict) and not (_is_row(whole) or (path.suffix == ".jsonl" and "\n" not in text.strip())):
        return _of_dict(path, whole)
    return _objects(path, whole if isinstance(whole, list) else [whole])


def _is_row(whole: Mapping[str, Any]) -> bool:
    """Whether a file's only object is a row, and not one that holds rows by their ids or subjects."""
    return bool(whole.keys() & {*_ID_KEYS, *PREDICTION_KEYS})


def _of_dict(path: Path, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """{id: object}, {id: text or list}, {subject: [objects]}; COCO's annotation files as one row."""
    if "annotations" in whole:
        return [whole]
    rows: list[dict[str, Any]] = []
    for key, value in whole.items():
        if isinstance(value, dict):
            rows.append({"id": key, **value})
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            rows += [{"subject": key, **one} for one in value]
        else:
            rows.append({"id": key, "objects" if isinstance(value, list) else "prediction": value})
    return rows


def _objects(path: Path, rows: Sequence[Any]) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} holds a {type(row).__name__}; expected an object")
    return list(rows)


def _tsv(path: Path) -> list[dict[str, Any]]:
    check_file(path)
    before = csv.field_size_limit(sys.maxsize)  # images in base64 stand in cells
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = [line for line in csv.reader(lines, delimiter="\t") if line]
    except csv.Error as error:
        raise ValueError(f"{path}: not a table with tabs: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows):
        if len(row) > len(rows[0]):
            raise ValueError(f"{path}: row {number} has more cells than the header")
    return _named(path, rows)


def _xlsx(path: Path) -> list[dict[str, Any]]:
    return _named(path, xlsx_lines(path))


def _named(path: Path, lines: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Cells by the names in the first line, each of which stands once.

    What a short line lacks is not there, but a prediction, which is empty.
    Nothing else is filled up: a few bytes would make as many cells as the header has columns, times the lines.
    """
    header = [str(name) for name in lines[0]] if lines else []
    twice = next((name for name, count in Counter(header).items() if count > 1 and name not in ("", "None")), None)
    if twice is not None:
        raise ValueError(f"{path}: two columns are called {twice!r}; expected each name once")
    predictions = [key for key in PREDICTION_KEYS if key in header]
    rows = []
    for line in lines[1:]:
        cells = dict(zip(header, line, strict=False))
        rows.append(cells | {key: None for key in predictions if key not in cells})
    return rows


def _columns(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Lines end where the operating systems' do; other separators are characters of a text.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _text(path)), 1):
        if not line.strip():
            continue
        cells = line.split("\t", 3)
        if len(cells) < 3:
            raise ValueError(f"{path}:{number}: has {len(cells)} columns; expected {', '.join(_MME_COLUMNS)} with tabs")
        rows.append({"category": path.stem, **dict(zip(_MME_COLUMNS, cells, strict=False))})
    return rows


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
