"""Parquet files with images inside, as Hugging Face's `datasets` writes them, read in a separate process.

A column of images holds `{bytes, path}` or a list of these; bare bytes are taken too. Text is read at once, images
on access; the process caches them, still encoded, up to 4 GiB. An image may also be a path (`{bytes: null, path}`, or a
text), relative to the shard's folder or to the one above a shard's `data`, or base64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import letter_of, lettered
from qwenla_jax.data.datasets.parquet_process import parquet_process, require_pyarrow
from qwenla_jax.data.datasets.raw_record import Dataset, FileImage, RawRecord, RecordError, records_of
from qwenla_jax.data.datasets.rows import answer_of, from_base64, text_of

_QUESTIONS = ("question", "problem", "query", "prompt")
_OPTIONS = ("options", "choices", "option")
_ANSWERS = ("answer", "final_answer", "ground_truth", "solution")
_IMAGES = ("image", "images", "decoded_image", "image_path")
_IDS = ("id", "ID", "qid", "question_id", "pid")
_KINDS = ("kind", "category", "subject")
_TEXTS = frozenset((*_QUESTIONS, *_OPTIONS, *_ANSWERS, *_IDS, *_KINDS, "response"))
# Names of columns that hold images, or where they are; not "image_id", "image_size" or "image_caption".
_IMAGE_NAME = re.compile(
    r"(?:decoded_)?(?:image|img|picture|photo|screenshot)s?(?:_?([0-9]{1,2}))?"
    r"(?:_(?:path|file|filename|file_name|name|bytes|base64|b64|data|url|src)s?)?|file_?name",
    re.IGNORECASE,
)
_LONG = 64  # characters; an image in base64 has more, and a path seldom


def is_parquet(path: str | Path) -> bool:
    """Whether a path is a parquet file, a pattern of such, or a folder that holds some."""
    path = Path(path)
    return path.suffix == ".parquet" or has_magic(str(path)) or (path.is_dir() and bool(_inside(path)))


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def shards(path: str | Path) -> list[Path]:
    """The files that a path means, in order: itself, those that fit a pattern, those in a folder or its `data`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a folder holds several splits, whose rows may be the same ones.
    """
    path = Path(path)
    if path.is_dir():
        files = _inside(path)
        splits = sorted({each.name.split("-")[0].removesuffix(".parquet") for each in files})
        if len(splits) > 1:
            raise ValueError(
                f"{path}: holds several splits ({', '.join(splits)}); name one: {files[0].parent / splits[0]}-*.parquet"
            )
    elif has_magic(str(path)):
        files = sorted(Path(each) for each in glob(str(path)))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"{path}: no parquet file there")
    return files


@dataclass(frozen=True)
class StoredImage:
    """An image inside a parquet file, or one that the file names.

    Attributes:
      shard: its file.
      column, row, item: where it is there; the item counts within a list of images.
      name: for errors.
    """

    shard: Path
    column: str
    row: int
    item: int
    name: str

    def read(self) -> bytes:
        """Its bytes.

        Raises:
          RecordError: the cell holds none, or cannot be read.
          ImageError: the file that it names is no image.
        """
        try:
            # Bytes, {bytes, path}, a text, a list of these, or None.
            cell = parquet_process().ask("cell", self.shard, self.column, self.row)
        except ValueError as error:
            raise RecordError(self.name, "image_invalid", str(error)) from error
        value = cell[self.item] if isinstance(cell, list) else cell
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if isinstance(value, str) and value.strip():
            return self._named(value.strip())
        message = "holds neither bytes nor a path; expected an image (datasets' Image(decode=False) shows it)"
        raise RecordError(self.name, "image_absent", message)

    def _named(self, text: str) -> bytes:
        """The bytes that a text stands for: base64, or the path of a file."""
        if text.startswith("data:") or (len(text) > _LONG and "." not in text):
            return from_base64(text, self.name)
        if re.match("[A-Za-z]{2,9}://", text):
            message = f"is at {text[:80]!r}, and nothing is downloaded; expected bytes or a path"
            raise RecordError(self.name, "image_absent", message)
        folder = self.shard.parent
        if folder.name == "data" and not (folder / text).is_file():
            folder = folder.parent  # shards lie in `data` of a dataset's folder, which its paths are relative to
        return FileImage(folder / text).read()


@dataclass(frozen=True)
class Row:
    """A row of a parquet file.

    Attributes:
      where: file and row, counted from 0 within the file.
      values: everything but images.
      counts: number of images, by column.
      shard, number: where the images are.
    """

    where: str
    values: dict[str, Any]
    counts: dict[str, int]
    shard: Path
    number: int


Columns = Mapping[str, tuple[str, str]]  # name -> kind, type in words; see `parquet_child`


def read_parquet(path: str | Path, required: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """(where, row) of all rows of all shards, images unread.

    Images are in columns of bytes, structs with bytes or a path, lists of these.

    Raises:
      ModuleNotFoundError: pyarrow is not installed.
      FileNotFoundError, ValueError: as in `shards`; a file that is no parquet, is corrupt, or lacks a column.
    """
    for file, rows, columns in _described(path):
        lacking = [name for name in required if name not in columns]
        if lacking:
            raise ValueError(f"{file}: lacks column {', '.join(lacking)}; it has {', '.join(columns)}")
        images = [name for name, (kind, _) in columns.items() if kind in ("bytes", "struct")]
        yield from _rows(file, rows, images, [name for name in columns if name not in images])


def _described(path: str | Path) -> list[tuple[Path, int, Columns]]:
    """Each shard with its number of rows and its columns."""
    require_pyarrow()
    return [(file, *parquet_process().ask("describe", file)) for file in shards(path)]


def _rows(file: Path, rows: int, images: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(where, row) of the rows of a shard.

    Args:
      file, rows: the shard and its number of rows.
      images: columns to count images in.
      texts: columns to read.
    """
    process = parquet_process()
    counts = {name: process.ask("counts", file, name) for name in images}
    values: dict[str, list[Any]] = {name: [] for name in texts}
    if texts:
        process.ask("start_rows", file, texts)
        while (part := process.ask("rows", file)) is not None:
            for name, column in part.items():
                values[name] += column
    lengths = {len(column) for column in (*counts.values(), *values.values())}
    if lengths - {rows}:
        raise ValueError(f"{file}: claims {rows:,} rows and holds {min(lengths):,}; it is corrupt")
    for number in range(rows):
        here = {name: column[number] for name, column in counts.items()}
        where = f"{file}: row {number}"
        yield where, Row(where, {name: values[name][number] for name in texts}, here, file, number)


def stored_images(row: Row, column: str) -> tuple[StoredImage, ...]:
    """The images of a row's column.

    Raises:
      RecordError: the column holds no images.
    """
    if column not in row.counts:
        raise RecordError(row.where, "field", f"column {column} holds no images; expected {{bytes, path}}")
    return tuple(
        StoredImage(row.shard, column, row.number, item, f"{row.where}, {column} {item}")
        for item in range(row.counts[column])
    )


def needed_images(row: Row, column: str) -> tuple[StoredImage, ...]:
    """As `stored_images`, of a dataset in which every question is about an image.

    Raises:
      RecordError: the column holds no images, or this row has none.
    """
    if images := stored_images(row, column):
        return images
    raise RecordError(row.where, "image_absent", f"column {column} is empty; expected an image")


def parquet_questions(path: str | Path, name: str = "parquet") -> Dataset:
    """Any parquet files with a question, an answer and images in a row.

    The columns are found by their names, the first of each list that exists: question, problem, query or prompt;
    answer, final_answer, ground_truth or solution; options, choices or option (see `multiple_choice.lettered`); id, ID,
    qid, question_id or pid; response; kind, category or subject. Images are those of the first column that has some in
    this row, columns with bytes first: image, images, decoded_image, image_path, then other names of that kind
    (`image_1`, `image_2`, ... together), then any column of `{bytes, path}`. None is needed.

    Raises:
      ModuleNotFoundError, FileNotFoundError, ValueError: as in `read_parquet`; no column of questions or of answers; a
        column with the name of an image column that holds something else.
    """
    raw_records: list[RawRecord] = []
    for file, rows, columns in _described(path):
        keys = []
        for what, names in (("questions", _QUESTIONS), ("answers", _ANSWERS)):
            keys.append(next((key for key in names if key in columns), None))
            if keys[-1] is None:
                expected = f"expected one of {', '.join(names)}, got {', '.join(columns)}"
                raise ValueError(f"{file}: no column of {what}; {expected}")
        groups = _images(columns)
        odd = [f"{n} ({kind})" for n, (_, kind) in columns.items() if _IMAGE_NAME.fullmatch(n)]
        if odd and not groups:
            raise ValueError(f"{file}: cannot read images from {', '.join(odd)}; expected bytes, paths or base64")
        texts = [name for name in columns if name in _TEXTS]
        question, answer = map(str, keys)
        raw_records += records_of(
            _rows(file, rows, [name for group in groups for name in group], texts),
            lambda at, row, question=question, answer=answer, groups=groups: _raw_record(row, question, answer, groups),
        )
    return Dataset(name, raw_records)


def _images(columns: Columns) -> list[list[str]]:
    """Groups of columns that may hold images, by preference."""
    named = [name for name in columns if _IMAGE_NAME.fullmatch(name) and columns[name][0] != "other"]
    ranked: list[tuple[tuple[bool, int, bool], list[str]]] = []
    for name in named:
        match = _IMAGE_NAME.fullmatch(name)
        number = match[1] if match else None
        place = _IMAGES.index(name) if name in _IMAGES else len(_IMAGES)
        choice = columns[name][0] == "text", place, number is not None
        same = next((group for other, group in ranked if number is not None and other == choice), None)
        if same is None:
            ranked.append((choice, [name]))
        else:
            same.append(name)
            same.sort(key=lambda name: (len(name), name))
    groups = [group for _, group in sorted(ranked, key=lambda pair: pair[0])]
    return groups or [[name] for name, (kind, _) in columns.items() if kind == "struct"]


def _raw_record(row: Row, question: str, answer: str, groups: Sequence[Sequence[str]]) -> RawRecord:
    values = row.values
    options = lettered(next((values[key] for key in _OPTIONS if values.get(key)), []))
    several = (tuple(p for name in group for p in stored_images(row, name)) for group in groups)
    kind = next((values[key] for key in _KINDS if values.get(key)), "question")
    name = next((values[key] for key in _IDS if values.get(key) is not None), row.where)
    response = values.get("response")
    text = answer_of(values, answer, row.where)
    return RawRecord(
        row.where,
        str(name),
        text_of(values, question, row.where),
        options,
        letter_of(text, options) if options else text,
        response if isinstance(response, str) else None,
        str(kind),
        next((images for images in several if images), ()),
    )
