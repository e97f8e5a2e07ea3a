"""Tables written whole: to a temporary name beside the file, then renamed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.utils.atomic_files import replacing


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as .jsonl, .tsv or .xlsx.

    Raises:
      ValueError: another ending, or xlsx without openpyxl.
      OSError: it cannot be written; then nothing is changed.
    """
    writers: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], None]]
    writers = {".jsonl": _jsonl, ".tsv": _tsv, ".xlsx": _xlsx}
    if path.suffix not in writers:
        raise ValueError(f"{path}: cannot write {path.suffix or 'this'}; expected {', '.join(writers)}")
    with replacing(path, shared=True) as fresh:
        writers[path.suffix](fresh, rows)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, _names(rows), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _xlsx(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        import openpyxl
        import openpyxl.cell
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: writing xlsx needs openpyxl: pip install 'qwenla_jax[evals]'; or name a .tsv"
        ) from error
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    names, illegal = _names(rows), openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE
    sheet.append(names)
    for row in rows:
        # A model may write what XML cannot hold: control characters, half a surrogate pair.
        cells = [openpyxl.cell.WriteOnlyCell(sheet, _writable(row.get(name, ""), illegal)) for name in names]
        for cell in cells:
            # A model's text that starts with "=" is no formula.
            if cell.data_type == "f":
                cell.data_type = "s"
        sheet.append(cells)
    book.save(path)


def _writable(value: Any, illegal: re.Pattern[str]) -> Any:
    if not isinstance(value, str):
        return value
    return illegal.sub("", value).encode("utf-8", "backslashreplace").decode("utf-8")
