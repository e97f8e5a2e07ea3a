"""Tables of xlsx files, read by openpyxl; what a file unpacks to is bounded before anything is parsed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from qwenla_jax.utils.json_files import check_file

MAX_UNPACKED = 512 << 20  # bytes of a file's parts
MAX_TAGS = 10_000_000  # of XML in them: about 100 bytes each in memory; 100,000 rows of 15 cells have 9,000,000
MAX_ROWS = 1 << 18  # the missing ones before a row that names its number too
MAX_CELLS = 5_000_000  # the empty ones before a cell that names its column count too


def xlsx_lines(path: Path) -> list[tuple[Any, ...]]:
    """The lines of a file's active sheet, each up to its last cell; blank ones after the first are left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: openpyxl is not installed, it is no xlsx file, or larger than the bounds of this module.
    """
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: reading xlsx needs openpyxl: pip install 'qwenla_jax[evals]'; or save it as .tsv"
        ) from error
    check_file(path)
    try:
        _check_size(path)
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            return _lines(book.active)
        finally:
            book.close()
    except _TooLarge as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # zip, XML and its own errors
        raise ValueError(f"{path}: not an xlsx file: {error}") from error


class _TooLarge(ValueError):
    """The file is larger than a bound."""


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        # A part that unpacks to more than its entry says is not read further by zipfile.
        if (size := sum(part.file_size for part in parts)) > MAX_UNPACKED:
            raise _TooLarge(f"unpacks to {size:,} bytes; at most {MAX_UNPACKED:,} are read")
        tags = 0
        for part in parts:
            with archive.open(part) as file:
                while chunk := file.read(1 << 20):
                    tags += chunk.count(b"<")
                    if tags > MAX_TAGS:
                        raise _TooLarge(f"holds more than {MAX_TAGS:,} tags of XML, which is no table of answers")


def _lines(sheet: Any) -> list[tuple[Any, ...]]:
    sheet.reset_dimensions()  # what the file says of its size is not believed: lines would be filled up to it
    result: list[tuple[Any, ...]] = []
    cells = 0
    for number, line in enumerate(sheet.iter_rows(values_only=True), 1):
        cells += len(line)
        if number > MAX_ROWS or cells > MAX_CELLS:
            raise _TooLarge(f"has more than {MAX_ROWS:,} rows or {MAX_CELLS:,} cells")
        if not result or line.count(None) < len(line):
            result.append(line)
    return result
