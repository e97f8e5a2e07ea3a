"""Parquet and Arrow files with images inside, as Hugging Face's `datasets` writes them, read in a separate process.

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

from qwenla_jax.data.datasets.columns import FIELDS, VIDEOS, names_of, refuse_unknown
from qwenla_jax.data.datasets.conversations import read_question
from qwenla_jax.data.datasets.parquet_process import parquet_process, require_pyarrow
from qwenla_jax.data.datasets.raw_record import Dataset, FileImage, RawRecord, RecordError, records_of
from qwenla_jax.data.datasets.rows import image_of_text
from qwenla_jax.utils.json_files import read_object

# Names of columns that hold images, or where they are; not "image_id", "image_size" or "image_caption".
_IMAGE_NAME = re.compile(
    r"(?:decoded_)?(?:image|img|picture|photo|screenshot)s?(?:_?([0-9]{1,2}))?"
    r"(?:_(?:path|file|filename|file_name|name|bytes|base64|b64|data|url|src)s?)?|file_?name",
    re.IGNORECASE,
)


def is_parquet(path: str | Path) -> bool:
    """Whether a path is a parquet or Arrow file, a pattern of such, or a folder that holds some."""
    path = Path(path)
    return path.suffix in (".parquet", ".arrow") or has_magic(str(path)) or (path.is_dir() and bool(_inside(path)))


def _inside(folder: Path) -> list[Path]:
    if (state := folder / "state.json").is_file():  # `save_to_disk`, which may leave files of an earlier time there
        try:
            return [folder / each["filename"] for each in read_object(state)["_data_files"]]
        except (KeyError, TypeError) as error:
            message = "_data_files is missing or of another form; expected what `save_to_disk` writes"
            raise ValueError(f"{state}: {message}") from error
    if (folder / "dataset_dict.json").is_file():
        return sorted(folder.glob("*/*.arrow"))
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.arrow"))


def shards(path: str | Path) -> list[Path]:
    """The files that a path means, in order: itself, those that fit a pattern, those in a folder or its `data`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a folder holds several splits, whose rows may be the same ones.
    """
    path = Path(path)
    if path.is_dir():
        files = _inside(path)
        arrow = files[0].suffix == ".arrow" if files else False
        splits = sorted({each.parent.name if arrow else re.split(r"-|\.parquet$", each.name)[0] for each in files})
        if len(splits) > 1:
            one = path / splits[0] if arrow else f"{files[0].parent / splits[0]}-*.parquet"
            raise ValueError(f"{path}: holds several splits ({', '.join(splits)}); name one: {one}")
    elif has_magic(str(path)):
        files = sorted(Path(each) for each in glob(str(path)))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"{path}: no parquet or Arrow file there")
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
        image, folder = image_of_text(text, self.shard.parent, self.name), self.shard.parent
        if folder.name == "data" and isinstance(image, FileImage) and not image.path.is_file():
            image = FileImage(folder.parent / text)  # shards lie in `data` of a folder that its paths are relative to
        return image.read()


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


def parquet_questions(path: str | Path, columns: Mapping[str, str] | None = None, first_turn: bool = False) -> Dataset:
    """Any parquet files, or folders that `datasets` saved, with a question, an answer and images in a row.

    The columns are found by their names, the first of `columns.FIELDS` that holds something; questions and answers may
    be messages, see `conversations`. Images are those of the first column that has some in this row, columns with bytes
    first: image, images, decoded_image, image_path, then other names of that kind (`image_1`, `image_2`, ... together),
    then any column of `{bytes, path}`. None is needed.

    Args:
      path: see `shards`.
      columns, first_turn: as in `conversations.read_question`.

    Raises:
      ModuleNotFoundError, FileNotFoundError, ValueError: as in `read_parquet`; no column of questions or of answers, or
        none of a name that `columns` gives; a column of images that holds something else.
    """
    columns = columns or {}
    raw_records: list[RawRecord] = []
    for file, rows, there in _described(path):
        refuse_unknown(columns, there, file)
        for field in ("question", "answer"):
            names = [*names_of(field, columns), *names_of("messages", columns)]
            if not any(name in there for name in names):
                expected = f"expected one of {', '.join(names)}, got {', '.join(there)}"
                raise ValueError(f"{file}: no column of {field}s; {expected}")
        groups = [[columns["image"]]] if "image" in columns else _images(there)
        odd = [f"{n} ({kind})" for n, (_, kind) in there.items() if _IMAGE_NAME.fullmatch(n) or [n] in groups]
        if odd and (not groups or there[groups[0][0]][0] == "other"):
            raise ValueError(f"{file}: cannot read images from {', '.join(odd)}; expected bytes, paths or base64")
        wanted = {name for field in FIELDS if field != "image" for name in names_of(field, columns)}
        texts = [n for n, (kind, _) in there.items() if n in wanted and (n != "response" or kind == "text")]
        counted = [n for n in there if n in VIDEOS or any(n in group for group in groups)]
        raw_records += records_of(
            _rows(file, rows, counted, texts),
            lambda at, row, groups=groups: _raw_record(at, row, groups, columns, first_turn),
        )
    return Dataset("parquet", raw_records)


def _images(columns: Columns) -> list[list[str]]:
    """Groups of columns that may hold images, by preference."""
    named = [name for name in columns if _IMAGE_NAME.fullmatch(name) and columns[name][0] != "other"]
    ranked: list[tuple[tuple[bool, int, bool], list[str]]] = []
    for name in named:
        match = _IMAGE_NAME.fullmatch(name)
        number = match[1] if match else None
        known = FIELDS["image"]
        place = known.index(name) if name in known else len(known)
        choice = columns[name][0] == "text", place, number is not None
        same = next((group for other, group in ranked if number is not None and other == choice), None)
        if same is None:
            ranked.append((choice, [name]))
        else:
            same.append(name)
            same.sort(key=lambda name: (len(name), name))
    groups = [group for _, group in sorted(ranked, key=lambda pair: pair[0])]
    return groups or [[name] for name, (kind, _) in columns.items() if kind == "struct"]


def _raw_record(
    where: str, row: Row, groups: Sequence[Sequence[str]], columns: Mapping[str, str], first_turn: bool
) -> RawRecord:
    several = (tuple(p for name in group for p in stored_images(row, name)) for group in groups)
    images = next((images for images in several if images), ())
    values = row.values | {name: True for name in VIDEOS if row.counts.get(name)}
    return read_question(where, values, columns, images, row.shard.parent, where, first_turn=first_turn)
