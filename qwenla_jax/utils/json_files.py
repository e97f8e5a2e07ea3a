"""Reading JSON that others wrote: whatever it holds, a value or one `ValueError` that names the place.

The parser of the standard library lets three things through that the rest of a program trips over: nesting that ends in
`RecursionError` (at parsing, or later where the value is copied or written), files that are not files (a pipe hangs, a
device never ends), and files too large to be what they claim.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Nothing that is read here nests deeper than 20; Python's own recursion limit is 1,000.
MAX_DEPTH = 100
MAX_BYTES = 4 << 30
_BLANKS = re.compile(r"[ \t\n\r]*")


def loads(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
      text: UTF-8 bytes or text; a byte-order mark in front is skipped.
      where: what to call the text in errors: a file, or a file and a line.

    Raises:
      ValueError: it is not JSON, not UTF-8, holds a number too long to read, or nests deeper than `MAX_DEPTH`.
    """
    with _named(where):
        decoded = _decoded(text)
        return _shallow(json.loads(decoded), decoded)


def loads_all(text: str | bytes, where: str) -> list[tuple[int, Any]]:
    """The values of a text that holds one JSON value after the other: JSON lines, or objects of several lines each.

    Args:
      text, where: as in `loads`.

    Returns:
      (line that it begins at, value) of each, lines counted from 1; empty for a blank text.

    Raises:
      ValueError: as in `loads`; the place is that of the line that the wrong value begins at.
    """
    with _named(where):
        decoded = _decoded(text)
    result: list[tuple[int, Any]] = []
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _blanks(decoded, 0)
    while at < len(decoded):
        line, counted = line + decoded.count("\n", counted, at), at
        with _named(f"{where}:{line}"):
            value, end = decoder.raw_decode(decoded, at)
            result.append((line, _shallow(value, decoded, at, end)))
        at = _blanks(decoded, end)
    return result


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        message = f"nested more than {MAX_DEPTH} deep; expected JSON that people or programs write"
        raise ValueError(f"{where}: {message}") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _decoded(text: str | bytes) -> str:
    decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    return decoded.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")


def _blanks(text: str, at: int) -> int:
    """Index of the first character from `at` on that is none of JSON's blanks."""
    result = _BLANKS.match(text, at)
    return at if result is None else result.end()


def _shallow(value: Any, text: str, start: int = 0, end: int | None = None) -> Any:
    """A value of text[start:end], refused as the parser refuses it where it is deeper than `MAX_DEPTH`."""
    # Most texts have fewer brackets than that, and need no walk.
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise RecursionError
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as in `loads`, or it is no regular file, or larger than max_bytes.
      OSError: it cannot be read.
    """
    return loads(read_bytes(path, max_bytes), str(path))


def read_object(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
      FileNotFoundError, ValueError, OSError: as in `read_json`; ValueError too where it holds something else.
    """
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def read_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of bounded size; nothing else is opened. Raises as `check_file` does."""
    check_file(path, max_bytes)
    return Path(path).read_bytes()


def check_file(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> None:
    """Refuses what cannot be read whole, without opening it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no regular file (a pipe, a device, a folder), or larger than max_bytes.
      OSError: nothing can be told of it.
    """
    try:
        result = Path(path).stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    if not stat.S_ISREG(result.st_mode):
        raise ValueError(f"{path}: not a regular file")
    if result.st_size > max_bytes:
        raise ValueError(f"{path}: {result.st_size:,} bytes; at most {max_bytes:,} are read")


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects nest deeper than `depth`; without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
    return bool(level)
