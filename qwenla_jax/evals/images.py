"""The pictures of a benchmark's rows, wherever they are: in files, in base64, with another row.

VLMEvalKit's tables hold a picture in base64, a list of them, or, in at most 64 characters, the index of the row that
has it. The benchmarks' own files name files. Nothing is opened or decoded here; what is wrong with a picture is told
when it is read.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwenla_jax.data.datasets.raw_record import Picture, RecordError
from qwenla_jax.data.datasets.rows import from_base64, picture_at
from qwenla_jax.evals.table_files import NOTHING, Row
from qwenla_jax.evals.task import Item

_DIGITS = 12  # of the number in the name of a picture of COCO
_SHORT = 64  # characters; no picture is so small
_MOST = 256  # pictures of a row
_DEEPEST = 8  # rows that name the picture of the next
_KEYS = ("image", "images", "decoded_image")
_NUMBERED = tuple(f"image_{number}" for number in range(1, 10))
_NAMES = ("image_path", "image_file", "file_name", "image_src")


@dataclasses.dataclass(frozen=True)
class TextPicture:
    """A picture in base64.

    Attributes:
      name: what errors call it.
      text: base64, with or without the start of a data URL.
    """

    name: str
    text: str = dataclasses.field(repr=False)

    def read(self) -> bytes:
        """The bytes of its file.

        Raises:
          RecordError: the text is not base64.
        """
        return from_base64(self.text, self.name)


@dataclasses.dataclass(frozen=True)
class LostPicture:
    """A picture that a row names and that cannot be there.

    Attributes:
      name: what errors call it.
      reason, message: as of `RecordError`.
    """

    name: str
    reason: str
    message: str

    def read(self) -> bytes:
        """Never the bytes.

        Raises:
          RecordError: always.
        """
        raise RecordError(self.name, self.reason, self.message)


def with_pictures(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Rows of one file with their pictures, unopened; rows that have some (of parquet files) stay as they are.

    Args:
      rows: all rows of the file, because some name the picture of another one.
      folder: what names of files are relative to.
    """
    cells = {index: _cells(row) for row in rows if (index := row.text("index")) is not None}
    return [
        row
        if row.pictures
        else dataclasses.replace(row, pictures=_bounded(row, _pictures(row, _cells(row), cells, folder, ())))
        for row in rows
    ]


def coco_pictures(items: Sequence[Item], folder: Path) -> list[Item]:
    """Items whose ids are those of COCO's pictures, with COCO's files of val2014 where they have no picture."""
    found = []
    for item in items:
        if not item.pictures and item.id.isdecimal() and len(item.id) <= _DIGITS:
            picture = picture_at(folder, f"COCO_val2014_{int(item.id):012d}.jpg", item.id)
            item = dataclasses.replace(item, pictures=(picture,))
        found.append(item)
    return found


def _cells(row: Row) -> tuple[str, ...]:
    """The texts that stand for a row's pictures."""
    for keys in (_KEYS, _NUMBERED, _NAMES):
        found = [text for key in keys for text in _texts(row, key) if text not in NOTHING]
        if found:
            return tuple(found)
    return ()


def _texts(row: Row, key: str) -> list[str]:
    value = row.values.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [str(value)]
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    text = row.text(key)
    return [] if text is None else [text]


def _bounded(row: Row, pictures: Iterator[Picture]) -> tuple[Picture, ...]:
    """Rows that name rows that name rows have more pictures than a file has bytes."""
    found = tuple(itertools.islice(pictures, _MOST + 1))
    if len(found) <= _MOST:
        return found
    return (LostPicture(row.where, "picture_count", f"has more than {_MOST} pictures"),)


def _pictures(
    row: Row, texts: Sequence[str], cells: Mapping[str, tuple[str, ...]], folder: Path, seen: tuple[str, ...]
) -> Iterator[Picture]:
    for number, text in enumerate(texts, 1):
        text = text.strip()
        name = f"{row.where}: picture {number}"
        if len(text) <= _SHORT and text in cells:
            if len(seen) == _DEEPEST:
                yield LostPicture(name, "picture_index", f"is that of a row after {_DEEPEST} others that name the next")
            elif text in (*seen, row.text("index")) or not cells[text]:
                told = f"is that of the row with the index {text}, which has none of its own"
                yield LostPicture(name, "picture_index", told)
            else:
                yield from _pictures(row, cells[text], cells, folder, (*seen, text))
        elif len(text) <= _SHORT and text.isdecimal():
            yield LostPicture(name, "picture_index", f"is that of the row with the index {text}, and there is none")
        elif text.startswith("data:") or (len(text) > _SHORT and "." not in text):
            yield TextPicture(name, text)
        else:
            yield _file(row, text, folder, name)


def _file(row: Row, text: str, folder: Path, name: str) -> Picture:
    """The file that a text names: below the folder, or as MME has it in a folder of the row's category."""
    if text.startswith(("http://", "https://")):
        text = Path(urllib.parse.urlsplit(text).path).name
    category = row.text("category")
    places = [text, *([f"{category}/{text}", f"{category}/images/{text}"] if category else [])]
    try:
        found = [picture_at(folder, place, row.where) for place in places]
    except RecordError as error:
        return LostPicture(name, error.reason, error.message)
    return next((picture for picture in found if picture.path.is_file()), found[0])
