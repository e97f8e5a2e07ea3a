"""The images of a benchmark's rows, wherever they are: in files, in base64, with another row.

VLMEvalKit's tables hold an image in base64, a list of them, or, in at most 64 characters, the index of the row that
has it. The benchmarks' own files name files. Nothing is opened or decoded here; what is wrong with an image is told
when it is read.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwenla_jax.data.datasets.raw_record import RawImage, RecordError
from qwenla_jax.data.datasets.rows import from_base64, image_at
from qwenla_jax.evals.table_files import NOTHING, Row
from qwenla_jax.evals.task import Item

_DIGITS = 12  # of the number in the name of an image of COCO
_SHORT = 64  # characters; no image is so small
_MOST = 256  # images of a row
_DEEPEST = 8  # rows that name the image of the next
_KEYS = ("image", "images", "decoded_image")
_NUMBERED = tuple(f"image_{number}" for number in range(1, 10))
_NAMES = ("image_path", "image_file", "file_name", "image_src")


@dataclasses.dataclass(frozen=True)
class TextImage:
    """An image as base64 `text`, with or without the start of a data URL; errors call it `name`."""

    name: str
    text: str = dataclasses.field(repr=False)

    def read(self) -> bytes:
        """The bytes of its file. Raises RecordError where the text is not base64."""
        return from_base64(self.text, self.name)


@dataclasses.dataclass(frozen=True)
class LostImage:
    """An image that a row names and that cannot be there; `reason` and `message` as of `RecordError`."""

    name: str
    reason: str
    message: str

    def read(self) -> bytes:
        """Always raises RecordError."""
        raise RecordError(self.name, self.reason, self.message)


def with_images(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Rows of one file with their images, unopened; rows that have some (of parquet files) stay as they are.

    Args:
      rows: all rows of the file, because some name the image of another one.
      folder: what names of files are relative to.
    """
    cells = {index: _cells(row) for row in rows if (index := row.text("index")) is not None}
    images = lambda row: row.images or _bounded(row, _images(row, _cells(row), cells, folder, ()))  # noqa: E731
    return [dataclasses.replace(row, images=images(row)) for row in rows]


def coco_images(items: Sequence[Item], folder: Path) -> list[Item]:
    """Items whose ids are those of COCO's images, with COCO's files of val2014 where they have no image."""
    result = []
    for item in items:
        if not item.images and item.id.isdecimal() and len(item.id) <= _DIGITS:
            image = image_at(folder, f"COCO_val2014_{int(item.id):012d}.jpg", item.id)
            item = dataclasses.replace(item, images=(image,))
        result.append(item)
    return result


def _cells(row: Row) -> tuple[str, ...]:
    """The texts that stand for a row's images."""
    for keys in (_KEYS, _NUMBERED, _NAMES):
        if result := [text for key in keys for text in _texts(row, key) if text not in NOTHING]:
            return tuple(result)
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


def _bounded(row: Row, images: Iterator[RawImage]) -> tuple[RawImage, ...]:
    """Rows that name rows that name rows have more images than a file has bytes."""
    result = tuple(itertools.islice(images, _MOST + 1))
    if len(result) <= _MOST:
        return result
    return (LostImage(row.where, "image_count", f"has more than {_MOST} images"),)


def _images(
    row: Row, texts: Sequence[str], cells: Mapping[str, tuple[str, ...]], folder: Path, seen: tuple[str, ...]
) -> Iterator[RawImage]:
    for number, text in enumerate(texts, 1):
        text = text.strip()
        name = f"{row.where}: image {number}"
        if len(text) <= _SHORT and text in cells:
            if len(seen) == _DEEPEST:
                yield LostImage(name, "image_index", f"is that of a row after {_DEEPEST} others that name the next")
            elif text in (*seen, row.text("index")) or not cells[text]:
                message = f"is that of the row with the index {text}, which has none of its own"
                yield LostImage(name, "image_index", message)
            else:
                yield from _images(row, cells[text], cells, folder, (*seen, text))
        elif len(text) <= _SHORT and text.isdecimal():
            yield LostImage(name, "image_index", f"is that of the row with the index {text}, and there is none")
        elif text.startswith("data:") or (len(text) > _SHORT and "." not in text):
            yield TextImage(name, text)
        else:
            yield _file(row, text, folder, name)


def _file(row: Row, text: str, folder: Path, name: str) -> RawImage:
    """The file that a text names: below the folder, or as MME has it in a folder of the row's category."""
    if text.startswith(("http://", "https://")):
        text = Path(urllib.parse.urlsplit(text).path).name
    category = row.text("category")
    places = [text, *([f"{category}/{text}", f"{category}/images/{text}"] if category else [])]
    try:
        result = [image_at(folder, place, row.where) for place in places]
    except RecordError as error:
        return LostImage(name, error.reason, error.message)
    return next((image for image in result if image.path.is_file()), result[0])
