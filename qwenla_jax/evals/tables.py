"""Files of questions and of predictions, as users have them, read into rows; and the two joined.

JSON (a list, a dict by id or by subject, VLMEvalKit's and the benchmarks' own forms), JSON lines under any of these
names, TSV and xlsx of VLMEvalKit, parquet of Hugging Face, and MME's text files of four columns.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.data.corpora.entries import Picture
from qwenla_jax.data.corpora.parquet import is_parquet, read_parquet, stored_pictures

PREDICTION_KEYS = ("prediction", "response", "output", "text", "caption", "model_answer", "answer")
_SHOWN = 5  # names in an error message
_MME_COLUMNS = ("image", "question", "answer", "prediction")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
      where: file and row, for errors.
      number: its place in the file from 0.
      source: the file's folder and name without its ending, which tell some benchmarks' parts apart.
      values: what it holds; empty cells are left out.
      pictures: its pictures, unopened.
    """

    where: str
    number: int
    source: str
    values: Mapping[str, Any]
    pictures: tuple[Picture, ...] = ()

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
        found = self.text(*keys)
        if found is None:
            raise ValueError(f"{self.where}: lacks {' or '.join(keys)}; it has {', '.join(self.values) or 'nothing'}")
        return found

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
        found = []
        for number, row in enumerate(read_parquet(path)):
            pictures = tuple(each for column in row.counts for each in stored_pictures(row, column))
            found.append(Row(row.where, number, source, _filled(row.values), pictures))
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    readers = {".tsv": _tsv, ".xlsx": _xlsx, ".json": _json, ".jsonl": _json, ".txt": _columns}
    if path.suffix not in readers:
        raise ValueError(f"{path}: cannot read {path.suffix or 'this'}; expected {', '.join(readers)} or .parquet")
    try:
        rows = readers[path.suffix](path)
        return [Row(f"{path}: row {n + 1}", n, source, _filled(values)) for n, values in enumerate(rows)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without cells that hold nothing: None, nan, the empty text."""
    empty = lambda value: value is None or value == "" or (isinstance(value, float) and math.isnan(value))  # noqa: E731
    return {str(key): value for key, value in values.items() if not empty(value) or key in PREDICTION_KEYS[:-1]}


def _json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except ValueError as first:
        return _json_lines(path, text, first)
    if isinstance(whole, dict) and not whole.keys() & {"id", "question_id", "image_id"}:
        return _of_dict(path, whole)
    return _objects(path, whole if isinstance(whole, list) else [whole])


def _json_lines(path: Path, text: str, first: ValueError) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {first if number == 1 else error}") from error
    return _objects(path, rows)


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
    before = csv.field_size_limit(sys.maxsize)  # pictures in base64 stand in cells
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t")
            rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}: not a table with tabs: {error}") from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"{path}: row {number} has more cells than the header")
    return rows


def _xlsx(path: Path) -> list[dict[str, Any]]:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: reading xlsx needs openpyxl: pip install 'qwenla_jax[evals]'; or save it as .tsv"
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        lines = list(book.active.iter_rows(values_only=True))
        book.close()
    except Exception as error:  # zip, XML and its own errors
        raise ValueError(f"{path}: not an xlsx file: {error}") from error
    header = [str(name) for name in lines[0]] if lines else []
    return [dict(zip(header, line, strict=False)) for line in lines[1:] if any(cell is not None for cell in line)]


def _columns(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
