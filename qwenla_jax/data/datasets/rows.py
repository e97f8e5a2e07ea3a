"""Readers for the common forms of datasets: JSON lines, text fields, base64, and images named by a relative path."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.raw_record import FileImage, RawImage, RecordError
from qwenla_jax.text.answers.gold import unwrap_gold
from qwenla_jax.utils import json_files

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG")
MAX_LINE = 64 * 2**20  # bytes of a line of JSON
_LONG = 64  # characters; an image in base64 has more, and a path seldom


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """(where, object) of every line that is not blank; an error instead of the object where the line has none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is longer than `MAX_LINE`, so that this is no file of lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: has more than {MAX_LINE:,} bytes; expected an object a line")
            if not line.strip():
                continue
            try:
                row = json_files.loads(line, where)
            except ValueError as error:
                yield where, RecordError(where, "not_json", str(error).removeprefix(f"{where}: "))
                continue
            if not isinstance(row, dict):
                row = RecordError(where, "not_an_object", f"holds a {type(row).__name__}; expected an object")
            yield where, row


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text of a row; numbers count as text, but for those that stand for a missing value (nan).

    Raises:
      RecordError: the key is missing or holds something else.
    """
    value = row.get(key)
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        message = f"{key} is missing" if value is None else f"{key} is {repr(value)[:80]}"
        raise RecordError(where, "field", f"{message}; expected text")
    return value


def answer_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """The right answer of a row, without the markup that `text.answers.gold` removes.

    Raises:
      RecordError: as in `text_of`.
    """
    return unwrap_gold(text_of(row, key, where))


def from_base64(text: str, name: str) -> bytes:
    """The bytes that a text in base64 stands for, with or without the start of a data URL.

    Raises:
      RecordError: the text is not base64.
    """
    bare = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(bare.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"{text[:20]!r}... is neither base64 ({error}) nor the name of a file"
        raise RecordError(name, "image_base64", message) from error


@dataclass(frozen=True)
class EncodedImage:
    """An image in base64, with or without the start of a data URL.

    Attributes:
      text: the base64.
      name: for errors.
    """

    text: str
    name: str

    def read(self) -> bytes:
        """Its bytes; raises as `from_base64`."""
        return from_base64(self.text, self.name)


def image_of_text(text: str, folder: Path, name: str) -> RawImage:
    """The image that a text holds in base64, or whose path it is.

    Args:
      text: base64, a data URL, or a path, which "file://" may precede.
      folder: what the path is relative to.
      name: for errors.

    Raises:
      RecordError: the text is another URL. A missing file is no error here.
    """
    text = text.strip().removeprefix("file://")
    if text.startswith("data:") or (len(text) > _LONG and "." not in text):
        return EncodedImage(text, name)
    if re.match("[A-Za-z]{2,9}://", text):
        message = f"is at {text[:80]!r}, and nothing is downloaded; expected bytes or a path"
        raise RecordError(name, "image_absent", message)
    return FileImage(folder / text)


def image_at(folder: Path, path: str, where: str, add_suffix: bool = False) -> FileImage:
    """The image that a path names.

    Args:
      folder: what the path is relative to.
      path: as the dataset gives it.
      where: row, for errors.
      add_suffix: the dataset leaves out the file name's suffix.

    Raises:
      RecordError: the path leads out of the folder, or two files fit it. A missing file is no error here.
    """
    whole = folder / path
    # Only the text is checked, not the disk: a dataset of 100,000 rows must open quickly.
    if not path.strip() or Path(path).is_absolute() or ".." in Path(path).parts:
        raise RecordError(where, "image_path", f"image path {path!r}; expected one below {folder}")
    if add_suffix and not whole.is_file():
        files = [whole.with_name(whole.name + suffix) for suffix in SUFFIXES]
        files = [each for each in files if each.is_file()]
        if len(files) > 1:
            names = " and ".join(each.name for each in files)
            raise RecordError(where, "image_path", f"image {path!r} is both {names} in {whole.parent}; keep one")
        whole = files[0] if files else whole
    return FileImage(whole)
