"""The process that reads parquet and Arrow files for `parquet_process`: pyarrow is C++, and a corrupt file can end it.

Started as a file of its own, so that it loads pyarrow and nothing else. It answers one request after the other and ends
with the connection. Its memory is bounded by the size of the files on disk: a column can declare, and repeat, far more
than a file of its size should unpack to.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet
import pyarrow.types as types

_ROWS = 256  # of one batch
_MAX_ROWS = 10_000_000  # of one file
# What a file may unpack to: text, and everything that its reading takes. Text written by people shrinks to a tenth.
_TEXT_BASE, _TEXT_SHARE = 64 << 20, 100
_MEMORY_BASE, _MEMORY_SHARE, _MEMORY_MOST = 1 << 30, 40, 64 << 30
_PART_BYTES = 8 << 20  # of one answer, about
_LONG = 1000  # bytes of a text that is more than a path
_CELL_ROWS, _CACHE_BYTES = 64, 4 << 30  # of a batch of images; of all batches in memory


def main() -> int:
    """Answers requests (name, arguments) on the connection whose file descriptor is the only argument."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pa.set_cpu_count(1)
    files, connection = _Files(), Connection(int(sys.argv[1]))
    while True:
        try:
            name, path, arguments = connection.recv()
        except (EOFError, OSError):
            return 0
        try:
            _bound_memory(os.stat(path).st_size)
            answer = "ok", getattr(files, name)(path, *arguments)
        except (MemoryError, pa.ArrowMemoryError):
            answer = "error", "it unpacks to far more than a file of its size should"
        except Exception as error:  # whatever pyarrow, or the decoding of its values, makes of a corrupt file
            answer = "error", " ".join(str(error).split())[:300] or type(error).__name__
        connection.send(answer)


def _bound_memory(size: int) -> None:
    """Limits the address space to the present use and what reading a file of that size may need."""
    with contextlib.suppress(OSError, ValueError):  # a system without this limit, or without /proc
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        most = taken + min(_MEMORY_BASE + _MEMORY_SHARE * size, _MEMORY_MOST)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


class _Files:
    """The requests. A path may be asked about in any order; `rows` continues where the last one ended."""

    def __init__(self) -> None:
        self._rows: dict[str, Iterator[dict[str, list[Any]]]] = {}
        # Batches of images, the least recently used one first.
        self._cached: collections.OrderedDict[tuple[Any, ...], pa.Array] = collections.OrderedDict()
        self._bytes = 0

    def describe(self, path: str) -> tuple[int, dict[str, tuple[str, str]]]:
        """Number of rows, and column -> its kind (see `_kind`) and its type in words."""
        with _open(path) as file:
            columns = {field.name: (_kind(field.type), str(field.type)[:80]) for field in file.schema_arrow}
            return file.metadata.num_rows, columns

    def counts(self, path: str, column: str) -> list[int]:
        """Items of each row: of a list its length, else 1 where there is a value that is no empty text."""
        result: list[int] = []
        with _open(path) as file:
            if not isinstance(file, _ArrowFile):
                if _is_full(file, column):
                    return [1] * file.metadata.num_rows
                column = _smallest_leaf(file, column)
            for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
                result += _counts(batch.column(0))
        return result

    def start_rows(self, path: str, columns: Sequence[str]) -> None:
        """Makes `rows` begin with the first row, and return these columns."""
        self._rows[path] = _parts(path, columns)

    def rows(self, path: str) -> dict[str, list[Any]] | None:
        """The next rows, column by column; None at the end."""
        part = next(self._rows[path], None)
        if part is None:
            del self._rows[path]
        return part

    def cell(self, path: str, column: str, row: int) -> Any:
        """One value; of a parquet file from the cache, where the batches of its row group up to that row are kept."""
        status = os.stat(path)
        of_file = path, status.st_mtime_ns, status.st_size, column
        with _open(path) as file:
            group = 0
            while row >= (rows := file.metadata.row_group(group).num_rows):
                group, row = group + 1, row - rows
            if isinstance(file, _ArrowFile):  # it is mapped, so the system caches it
                return next(file.iter_batches(rows, [column], [group])).column(0)[row].as_py()
            number, row = divmod(row, _CELL_ROWS)
            if (*of_file, group, number) not in self._cached:
                batches = file.iter_batches(_CELL_ROWS, row_groups=[group], columns=[column], use_threads=False)
                for at, batch in zip(range(number + 1), batches, strict=False):
                    self._cache((*of_file, group, at), batch.column(0))
            self._cached.move_to_end((*of_file, group, number))
            return self._cached[*of_file, group, number][row].as_py()

    def _cache(self, key: tuple[Any, ...], array: pa.Array) -> None:
        if key not in self._cached:
            self._cached[key] = array
            self._bytes += array.nbytes
        while self._bytes > _CACHE_BYTES and len(self._cached) > 1:
            self._bytes -= self._cached.popitem(last=False)[1].nbytes


class _ArrowFile:
    """A file of an Arrow stream, as `datasets` saves it, with what is used of a ParquetFile; its groups are batches."""

    def __init__(self, path: str) -> None:
        reader = pa.ipc.open_stream(pa.memory_map(path))
        self.schema_arrow, self._batches, self.metadata = reader.schema, list(reader), self
        self.num_rows, self.num_row_groups = sum(map(len, self._batches)), len(self._batches)

    def __enter__(self) -> _ArrowFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to close: the file stays mapped for the next request."""

    def row_group(self, number: int) -> pa.RecordBatch:
        """The batch of a number."""
        return self._batches[number]

    def iter_batches(
        self, size: int, columns: Sequence[str], row_groups: Sequence[int] | None = None, use_threads: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """The rows of these groups (None: of all), at most `size` in a batch, without a copy."""
        for whole in self._batches if row_groups is None else map(self._batches.__getitem__, row_groups):
            batch = whole.select(list(columns))
            batch.validate(full=True)  # offsets of a corrupt file may lead anywhere, or be as many as memory holds
            for start in range(0, len(batch), size):
                yield batch.slice(start, size)


@functools.lru_cache(64)
def _mapped(path: str, *version: int) -> _ArrowFile:  # opening one reads a page of each batch
    return _ArrowFile(path)


def _open(path: str) -> pyarrow.parquet.ParquetFile | _ArrowFile:
    if path.endswith(".arrow"):
        status = os.stat(path)
        file = _mapped(path, status.st_mtime_ns, status.st_size)
    else:
        file = pyarrow.parquet.ParquetFile(path, memory_map=False, buffer_size=1 << 20)
    if file.metadata.num_rows > _MAX_ROWS:
        raise ValueError(f"claims {file.metadata.num_rows:,} rows; at most {_MAX_ROWS:,} are read")
    return file


def _sizes(file: pyarrow.parquet.ParquetFile) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + max(0, column.total_uncompressed_size)
    return sizes


def _parts(path: str, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    most, size, held = _TEXT_BASE + _TEXT_SHARE * os.stat(path).st_size, 0, 0
    part: dict[str, list[Any]] = {}
    with _open(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(columns), use_threads=False):
            size, held = size + batch.nbytes, held + batch.nbytes
            if size > most:
                raise ValueError(f"its text unpacks to more than {most:,} bytes, for {_TEXT_SHARE} of each in the file")
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                part.setdefault(name, []).extend(_values(column))
            if held > _PART_BYTES:
                yield part
                part, held = {}, 0
    if part:
        yield part


def _is_full(file: pyarrow.parquet.ParquetFile, name: str) -> bool:
    """Whether every row of a column of bytes, or of long texts, has a value, by the file's own statistics."""
    field = file.schema_arrow.field(name)
    rows = max(1, file.metadata.num_rows)
    if _kind(field.type) == "text" and _sizes(file).get(name, 0) < _LONG * rows:
        return False  # it may hold empty texts, and is read in no time
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == name:
                statistics = column.statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count:
                    return False
            elif column.path_in_schema.startswith(f"{name}."):
                return False
    return True


def _smallest_leaf(file: pyarrow.parquet.ParquetFile, name: str) -> str:
    """What to read of a column to count its items: of structs another part than the bytes, where there is one."""
    paths = [file.schema.column(number).path for number in range(len(file.schema.names))]
    return next((path for path in paths if path.startswith(f"{name}.") and not path.endswith(".bytes")), name)


def _values(column: pa.Array) -> list[Any]:
    """As Python's values; numbers that stand for a missing one (nan) are None."""
    values = column.to_pylist()
    if types.is_floating(column.type):
        return [None if value is None or math.isnan(value) else value for value in values]
    return values


def _counts(column: pa.Array) -> list[int]:
    column = _decoded(column)
    if _is_list(column.type):
        return pc.fill_null(pc.call_function("list_value_length", [column]), 0).to_pylist()
    if types.is_string(column.type) or types.is_large_string(column.type):
        held = pc.call_function("greater", [pc.call_function("binary_length", [column]), 0])
        return pc.fill_null(held, False).cast(pa.int8()).to_pylist()
    return column.is_valid().cast(pa.int8()).to_pylist()


def _decoded(column: pa.Array) -> pa.Array:
    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _kind(kind: pa.DataType) -> str:
    """ "struct" of {bytes, path}, "bytes", "text", each also as lists; everything else is "other"."""
    while types.is_dictionary(kind) or _is_list(kind):
        if _is_list(kind) and _is_list(kind.value_type):
            return "other"  # rows of pixels, perhaps
        kind = kind.value_type
    if types.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return "struct" if "bytes" in names or names == {"path"} else "other"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "bytes"
    return "text" if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind) else "other"


if __name__ == "__main__":
    raise SystemExit(main())
