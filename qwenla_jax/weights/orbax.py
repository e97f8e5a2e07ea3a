"""Parameters as an Orbax checkpoint whose chunks are, byte for byte, the tensors of a Hugging Face checkpoint.

A zarr array may order its chunks as Fortran does: the bytes of such a chunk of shape [in, out] are those of a tensor
[out, in] in C order, which is how the released files store a linear layer. With one chunk a layer, converting a
checkpoint either way is copying bytes: nothing is decoded, transposed or held in memory. Orbax reads the result as any
other of its checkpoints (`use_ocdbt=False`), sharded onto any mesh.

For a mesh the chunks are cut further, as its devices share the arrays, so that a machine reads only its own part. A cut
along the rows of a tensor is a run of its bytes still; one along its columns is read row by row.

A folder holds `params/` (the arrays), `layout.json` (the files that the tensors came from, with their headers as they
were), and the small files of the Hugging Face checkpoint: config.json, tokenizer, image processor.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 once this is imported)
import numpy as np
import orbax.checkpoint as ocp

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import Entry, canonical, table
from qwenla_jax.utils.json_files import loads, read_object
from qwenla_jax.utils.json_section import Section, plain_name

PARAMS, LAYOUT = "params", "layout.json"
_METADATA = "_METADATA"
_ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2"}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own bound
_COPY = 64 * 2**20  # bytes that are copied at once


@dataclasses.dataclass(frozen=True)
class Piece:
    """A chunk of an array and the bytes of a file that it is made of.

    Attributes:
      chunk: the chunk's path below `params`.
      name: canonical name of the tensor.
      file: where its bytes are.
      offset: the first of them; the tensor itself begins at `base`.
      rows, cols: shape of the chunk as the tensor's bytes lie, rows of columns.
      width: columns of the tensor; the chunk is one run of bytes where it has them all.
      dtype: what the bytes are.
    """

    chunk: str
    name: str
    file: Path
    offset: int
    base: int
    rows: int
    cols: int
    width: int
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.cols * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    """The head of a safetensors file.

    Attributes:
      file: its path.
      text: the JSON, padding included, as it stands in the file.
      tensors: canonical name -> (dtype, shape, first byte in the file, bytes).
    """

    file: Path
    text: bytes
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def read_header(file: Path) -> Header:
    """The head of a safetensors file.

    Raises:
      ValueError: it is none, or shorter than its head says; names the file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError(f"its head has {length} bytes, the file {size}")
            text = stream.read(length)
        tensors = {
            canonical(name): (dtype, shape, 8 + length + begin, end - begin)
            for name, dtype, shape, begin, end in _entries(loads(text, f"{file}: its head"))
        }
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    most = max((begin + size for _, _, begin, size in tensors.values()), default=0)
    if size < most:
        raise ValueError(f"{file}: cut off: {size} bytes, its head speaks of {most}")
    return Header(file, text, tensors)


def _entries(head: Any) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """(name, dtype, shape, begin, end) of every tensor in the head of a safetensors file, in the order of the bytes.

    Raises:
      ValueError: it is no such head, or its tensors are not one after the other.
    """
    if not isinstance(head, dict):
        raise ValueError(f"the head is a {type(head).__name__}; it must be an object")
    result = []
    for name in head.keys() - {"__metadata__"}:
        entry = Section(head, "the head").section(name)
        begin, end = (*entry.wholes("data_offsets"), 0, 0)[:2]
        result.append((name, str(entry.get("dtype")), entry.wholes("shape"), begin, end))
    result.sort(key=lambda each: each[3:])
    if any(begin > end for *_, begin, end in result) or [0, *(e[4] for e in result[:-1])] != [e[3] for e in result]:
        raise ValueError("the tensors' data_offsets do not follow each other")
    return result


@dataclasses.dataclass(frozen=True)
class Span:
    """A chunk as a part of its tensor, which is rows of `width` columns: see `Piece`.

    Attributes:
      chunk: the chunk's path below `params`.
      row, col: the first, counted in the tensor.
      rows, cols, width: as in `Piece`.
    """

    chunk: str
    row: int
    col: int
    rows: int
    cols: int
    width: int


def spans(entry: Entry, layer: int, chunks: Mapping[str, Sequence[int]]) -> list[Span]:
    """The chunks that hold a tensor, in the order of its bytes.

    Args:
      entry: of the table.
      layer: which of its layers; 0 where it has none.
      chunks: path -> shape of a chunk of that parameter, `param_shape`s divided evenly; see `whole_chunks`.
    """
    result = []
    for index, path in enumerate(entry.paths):
        own, shape = list(chunks[path]), list(entry.param_shape)
        head = [str(layer)] if entry.layers is not None else []
        own, shape = own[len(head) :], shape[len(head) :]
        # Rows and columns of the tensor are the second and the first axis of a kernel.
        turn = slice(None) if entry.kind == "same" else slice(None, None, -1)
        (height, width), (rows, cols) = ([*axes[turn], 1][:2] for axes in (shape, own))
        for row in range(height // rows):
            for col in range(width // cols):
                keys = [str(number) for number in (row, col)[: len(shape)][turn]]
                chunk = f"{array_name(path)}/{'.'.join([*head, *keys])}"
                result.append(Span(chunk, index * height + row * rows, col * cols, rows, cols, width))
    return result


def whole_chunks(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a chunk where each is a layer of a parameter."""
    return {
        path: (1, *entry.param_shape[1:]) if entry.layers is not None else entry.param_shape
        for entry in table(config)
        for path in entry.paths
    }


def chunks_of(folder: Path, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a chunk, as a folder's arrays have them."""
    result = {}
    for entry in table(config):
        for path in entry.paths:
            file = folder / PARAMS / array_name(path) / ".zarray"
            result[path] = Section(read_object(file, _MAX_HEADER), str(file)).wholes("chunks")
            shape = entry.param_shape
            if len(result[path]) != len(shape) or any(c < 1 or s % c for s, c in zip(shape, result[path], strict=True)):
                raise ValueError(f"{file}: chunks are {list(result[path])}; they must divide {list(shape)}")
            if entry.layers is not None and result[path][0] != 1:
                raise ValueError(f"{file}: chunks are {list(result[path])}; the first must be 1, a layer")
    return result


def pieces(config: ModelConfig, headers: list[Header], chunks: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Every chunk of a checkpoint in the table's order. The tensors must have been checked against the config."""
    where = {name: (header.file, *entry) for header in headers for name, entry in header.tensors.items()}
    result = []
    for entry in table(config):
        for layer, name in enumerate(entry.names):
            file, stored, _, begin, _ = where[name]
            dtype = _STORED[stored]
            for s in spans(entry, layer, chunks):
                offset = begin + (s.row * s.width + s.col) * np.dtype(dtype).itemsize
                result.append(Piece(s.chunk, name, file, offset, begin, s.rows, s.cols, s.width, dtype))
    return result


def array_name(path: str) -> str:
    """A parameter's folder below `params`: its keys joined by dots, as Orbax names it."""
    return path.replace("/", ".")


def write_arrays(
    folder: Path, config: ModelConfig, dtypes: Mapping[str, str], chunks: Mapping[str, Sequence[int]]
) -> None:
    """Writes what tells Orbax of the arrays, but no chunk.

    Args:
      folder: `params`.
      config: of the model.
      dtypes: type of every parameter by its path.
      chunks: shape of its chunks likewise.
    """
    tree: dict[str, Any] = {}
    for entry in table(config):
        shape = list(entry.param_shape)
        for path in entry.paths:
            place = folder / array_name(path)
            place.mkdir(parents=True, exist_ok=True)
            array = {
                "chunks": list(chunks[path]),
                "compressor": None,
                "dimension_separator": ".",
                "dtype": _ZARR_DTYPES[dtypes[path]],
                "fill_value": None,
                "filters": None,
                "order": "C" if entry.kind == "same" else "F",
                "shape": shape,
                "zarr_format": 2,
            }
            (place / ".zarray").write_text(json.dumps(array), encoding="utf-8")
            keys = tuple(path.split("/"))
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(chunks[path])}
            tree[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": value,
            }
    record = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / _METADATA).write_text(json.dumps(record), encoding="utf-8")


def copy_piece(piece: Piece, target: Path, dtype: str, values: np.ndarray | None = None) -> None:
    """Writes a chunk, whole or not at all.

    Args:
      piece: what it is made of.
      target: the chunk's file.
      dtype: type to store; bytes are copied as they are where it is the piece's own.
      values: the tensor's numbers [rows, columns] where they are not those of the file.
    """
    fresh = target.with_name(target.name + ".new")
    kind = np.dtype(piece.dtype)
    if dtype == piece.dtype and values is None and piece.cols == piece.width:
        with piece.file.open("rb") as source, fresh.open("wb") as sink:
            copy_bytes(source.fileno(), piece.offset, piece.size, sink.fileno())
    else:
        row, col = divmod((piece.offset - piece.base) // kind.itemsize, piece.width)
        if values is None:
            begin = piece.base + row * piece.width * kind.itemsize
            values = np.memmap(piece.file, kind, "r", begin, (piece.rows, piece.width))
            row = 0
        part = values[row : row + piece.rows, col : col + piece.cols]
        np.ascontiguousarray(part).astype(dtype, copy=False).tofile(fresh)
    os.replace(fresh, target)


def put_chunk(chunk: Path, span: Span, sink: Path, offset: int, itemsize: int) -> None:
    """Writes a chunk's bytes to their places in a file that is long enough: the inverse of `copy_piece`.

    Args:
      chunk: the chunk's file.
      span: its place in the tensor.
      sink: the file.
      offset: where the tensor begins in it.
      itemsize: bytes of a number.

    Raises:
      ValueError: the chunk has not the bytes that it should have.
    """
    want, has = span.rows * span.cols * itemsize, chunk.stat().st_size
    if want != has:
        raise ValueError(f"{chunk} has {has} bytes, should have {want}")
    begin = offset + span.row * span.width * itemsize
    if span.cols == span.width:
        with chunk.open("rb") as source, sink.open("r+b") as stream:
            stream.seek(begin)
            copy_bytes(source.fileno(), 0, want, stream.fileno())
        return
    kind = np.dtype(f"V{itemsize}")
    rows = np.memmap(sink, kind, "r+", begin, (span.rows, span.width))
    rows[:, span.col : span.col + span.cols] = np.fromfile(chunk, kind).reshape(span.rows, span.cols)
    rows.flush()


def copy_bytes(source: int, offset: int, size: int, sink: int) -> None:
    """Copies bytes between open files within the kernel. Raises OSError where the source ends too early."""
    while size:
        try:
            done = os.copy_file_range(source, sink, min(size, _COPY), offset)
        except OSError:  # not between these file systems
            done = os.write(sink, os.pread(source, min(size, _COPY), offset))
        if not done:
            raise OSError(f"the file ends {size} bytes too early")
        offset, size = offset + done, size - done


def is_orbax(folder: Path) -> bool:
    """Whether a folder holds parameters as this module writes them."""
    return (folder / PARAMS / _METADATA).is_file()


def load_arrays(folder: Path, config: ModelConfig, shardings: Any = None) -> dict[str, Any]:
    """The parameters of a folder, read by Orbax.

    Args:
      folder: holds `params`.
      config: of the model; `param_dtype` is what the parameters come in.
      shardings: as in `hf.load_params`.

    Raises:
      ValueError: arrays that are missing, misshapen or cannot be read.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like: dict[str, Any] = {}
    for entry in table(config):
        for path in entry.paths:
            where = cast(Any, shardings if shardings is not None else here)
            node, *keys = like, *path.split("/")
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            for key in keys if isinstance(where, Mapping) else ():
                where = where[key]
            node[keys[-1]] = jax.ShapeDtypeStruct(entry.param_shape, config.param_dtype, sharding=where)
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore((folder / PARAMS).absolute(), like)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / PARAMS}: the parameters cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Layout:
    """What layout.json tells of the folder that a converted one came from.

    Attributes:
      files: of every weight file its name, its head as it was, and (tensor's canonical name, bytes) in the order of the
        bytes.
      dtypes: types that the files had.
      stored: the type that the parameters are stored in.
      index: name -> content of the index of the weight files; empty where there was none.
    """

    files: list[tuple[str, bytes, list[tuple[str, int]]]]
    dtypes: list[str]
    stored: str
    index: dict[str, bytes]


def read_layout(folder: Path) -> Layout:
    """Reads a folder's layout.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not as `write_layout` writes it, or names files that are not plain names; the message names it.
    """
    file = folder / LAYOUT
    record = Section(read_object(file), str(file))
    files = record.get("files")
    if not isinstance(files, list) or not all(isinstance(each, dict) for each in files):
        raise record.wrong("files", files, "a list of objects")
    result = []
    for number, each in enumerate(files):
        text = each.get("header")
        if not isinstance(text, str):
            raise record.wrong(f"files[{number}].header", text, "a text")
        name = plain_name(each.get("name"), ".safetensors", file)
        try:
            entries = _entries(loads(text, "header"))
            result.append((name, text.encode(), [(canonical(n), end - begin) for n, *_, begin, end in entries]))
        except ValueError as error:
            raise record.fail(f"files[{number}]", f"is not a safetensors file's: {error}") from error
    index = {}
    for name, text in record.section("index").content.items():
        try:
            index[plain_name(name, ".safetensors.index.json", file)] = text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise record.wrong(f"index.{name}", text, "a text") from error
    if len({name for name, *_ in result}) < len(result):
        raise record.fail("files", "names a file twice")
    dtypes, stored = record.get("dtype"), record.get("stored")
    for name, kinds in (("dtype", dtypes), ("stored", [stored])):
        if not isinstance(kinds, list) or any(kind not in _STORED.values() for kind in kinds):
            raise record.wrong(name, kinds, f"of {', '.join(_STORED.values())}")
    return Layout(result, dtypes, stored, index)
