"""Hugging Face checkpoints to Orbax and back, by copying bytes; see `orbax_io`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import Entry, table
from qwenla_jax.text.special_tokens import TAGS
from qwenla_jax.text.tokenizer import Tokenizer, in_folder
from qwenla_jax.utils.json_files import read_object
from qwenla_jax.weights import orbax
from qwenla_jax.weights.custom_generate import CODE_FOLDER
from qwenla_jax.weights.hf import check_tensors, weight_files

TAG_MODES = ("none", "mean", "pieces")
_SMALL = 50_000_000  # bytes; a larger file beside the weights is none of the small ones
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion before a byte is written.

    Attributes:
      config: of the model; `param_dtype` is what will be stored.
      headers: of the source's weight files.
      pieces: chunks in the order they are written.
      chunks: shape of every parameter's chunks, by its path.
      small: other files, which are copied as they are.
      tags: how the rows of the ten tags are initialised.
    """

    source: Path
    config: ModelConfig
    headers: list[orbax.Header]
    pieces: list[orbax.Piece]
    chunks: Mapping[str, Sequence[int]]
    small: list[Path]
    tags: str

    @property
    def size(self) -> int:
        """Bytes of the weights as they are stored in the source."""
        return sum(piece.size for piece in self.pieces)

    def __str__(self) -> str:
        text, vision = self.config.text, self.config.vision
        files = len(self.headers)
        return (
            f"{self.source}: {text.num_layers} decoder layers of width {text.hidden_size}, {vision.depth} vision "
            f"blocks of width {vision.hidden_size}, {sum(len(e.names) for e in table(self.config))} tensors in {files} "
            f"file{'s' if files > 1 else ''}, {self.size / 1e9:.2f} GB, to be stored as {self.config.param_dtype} in "
            f"{len(self.pieces)} chunks; tags: {self.tags}; beside them {', '.join(p.name for p in self.small)}"
        )


def plan_from_hf(
    source: Path, dtype: str | None = None, tags: str = "none", chunks: Mapping[str, Sequence[int]] | None = None
) -> Plan:
    """Reads heads and config, and checks every tensor's name, shape and type.

    Args:
      source: Hugging Face folder.
      dtype: "float32", "bfloat16" or "float16" to store; None: what config.json says.
      tags: "none" leaves the rows of the ten tags as they are; "mean" sets them to the mean of all rows that have a
        token, "pieces" to the mean of the rows of their words' pieces. Both write a tokenizer that knows the tags.
      chunks: parameter's path -> shape of its chunks (1 along layers); None: a layer is one chunk. They must divide.

    Raises:
      FileNotFoundError, ValueError: what is missing, unexpected or misshapen, all of it at once.
    """
    if tags not in TAG_MODES:
        raise ValueError(f"tags: got {tags!r}, expected one of {', '.join(TAG_MODES)}")
    config = ModelConfig.from_hf(source)
    check_tensors(source, config)
    headers = [orbax.read_header(file) for file in weight_files(source)]
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    if tags != "none" and not in_folder(source):
        raise FileNotFoundError(f"{source / 'tokenizer.json'}: no such file; tags={tags} needs the tokenizer")
    small = _small_files(source)
    chunks = orbax.whole_chunks(config) if chunks is None else chunks
    return Plan(source, config, headers, orbax.pieces(config, headers, chunks), chunks, small, tags)


def from_hf(
    plan: Plan, target: Path, note: Callable[[int], object] = lambda size: None, overwrite: bool = False
) -> Path:
    """Carries a plan out. What an interrupted conversion has written is taken over.

    Args:
      plan: from `plan_from_hf`.
      target: the folder to make; it appears when everything is in it.
      note: told the bytes of every chunk when it is there.
      overwrite: replace what stands at `target`.

    Raises:
      FileExistsError: there is something at `target` and overwrite is False.
      OSError: reading or writing failed; the same call continues from there.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: already exists; --overwrite replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.converting"
    stamp = work / "plan.json"
    wanted = json.dumps(_stamp(plan))
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(work, ignore_errors=True)
        (work / orbax.PARAMS).mkdir(parents=True)
        stamp.write_text(wanted, encoding="utf-8")
    dtype = plan.config.param_dtype
    arrays = work / orbax.PARAMS
    orbax.write_arrays(arrays, plan.config, {p: dtype for e in table(plan.config) for p in e.paths}, plan.chunks)
    changes = _tag_changes(plan)
    changed: dict[str, np.ndarray] = {}  # the embedding or the head: its chunks come one after the other
    for piece in plan.pieces:
        chunk = arrays / piece.chunk
        if not chunk.is_file():
            if piece.name in changes and piece.name not in changed:
                changed = {piece.name: _whole(piece, plan.config.text.vocab_size)}
                changes[piece.name](changed[piece.name])
            orbax.copy_piece(piece, chunk, dtype, changed.get(piece.name))
        note(piece.size)
    _copy(plan.small, plan.source, work)
    if plan.tags != "none":
        Tokenizer.from_folder(plan.source).with_tags().save(work)
    if dtype != ModelConfig.from_hf(plan.source).param_dtype:
        _set_dtype(work / "config.json", dtype)
    files = [{"name": h.file.name, "header": h.text.decode()} for h in plan.headers]
    record = {"files": files, "dtype": sorted({p.dtype for p in plan.pieces}), "stored": dtype, "tags": plan.tags}
    index = [p for p in plan.source.glob("*.safetensors.index.json")]
    record["index"] = {p.name: p.read_text(encoding="utf-8") for p in index}
    (work / orbax.LAYOUT).write_text(json.dumps(record), encoding="utf-8")
    stamp.unlink()
    if target.exists():
        shutil.rmtree(target)
    os.replace(work, target)
    return target


def to_hf(
    source: Path, target: Path, note: Callable[[int], object] = lambda size: None, overwrite: bool = False
) -> Path:
    """Writes the Hugging Face folder that `from_hf` read: the same files, byte for byte, where nothing was changed.

    Raises:
      FileExistsError: there is something at `target` and overwrite is False.
      ValueError: the folder does not hold parameters in this layout, or other types than the files had.
    """
    if not orbax.is_orbax(source) or not (source / orbax.LAYOUT).is_file():
        raise ValueError(f"{source}: holds no {orbax.PARAMS} and {orbax.LAYOUT} as from_hf writes them")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: already exists; --overwrite replaces it")
    layout = orbax.read_layout(source)
    if layout.dtypes != [layout.stored]:
        had = ", ".join(layout.dtypes)
        raise ValueError(f"{source}: stored as {layout.stored}, but the files had {had}; load it and save it")
    config = ModelConfig.from_hf(source)
    small = [file for file in _small_files(source) if file.name != orbax.LAYOUT]
    chunks = chunk_spans(config, orbax.chunks_of(source, config))
    if config.text.tie_word_embeddings:  # some writers store a tied head too
        chunks["lm_head.weight"] = chunks["model.embed_tokens.weight"]
    itemsize = np.dtype(layout.stored).itemsize
    sizes = {name: itemsize * sum(span.rows * span.cols for span in spans) for name, spans in chunks.items()}
    held = [tensor for _, _, tensors in layout.files for tensor in tensors]
    unknown = [name for name, _ in held if name not in chunks]
    if unknown:
        raise ValueError(f"{source}: the files held {', '.join(unknown)}, which is not kept; load it and save it")
    wrong = [f"{name} has {size} bytes, not {sizes[name]}" for name, size in held if size != sizes[name]]
    if wrong:
        raise ValueError(f"{source / orbax.LAYOUT}: {', '.join(wrong)}, as config.json wants")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.converting"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        for name, header, tensors in layout.files:
            offset = 8 + len(header)
            with (work / name).open("wb") as sink:
                sink.write(struct.pack("<Q", len(header)) + header)
                sink.truncate(offset + sum(size for _, size in tensors))
            for tensor, size in tensors:
                for span in chunks[tensor]:
                    chunk = source / orbax.PARAMS / span.chunk
                    orbax.put_chunk(chunk, span, work / name, offset, itemsize)
                offset += size
                note(size)
        for name, content in layout.index.items():
            (work / name).write_bytes(content)
        _copy(small, source, work)
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target


def _small_files(folder: Path) -> list[Path]:
    """The files beside the weights, which are copied as they are, and those of `custom_generate/`.

    Raises:
      ValueError: one is a link to something outside, which would be copied for whoever gets the result. Hugging Face's
        cache is made of links to its own store, `../../blobs`: these are followed.
    """
    code = folder / CODE_FOLDER
    inside = [folder.resolve(), folder.resolve() / CODE_FOLDER]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parents[1] / "blobs")
    result = []
    for file in sorted([*folder.iterdir(), *(code.iterdir() if code.is_dir() else ())]):
        if not file.is_file() or file.name.endswith(_WEIGHTS) or file.stat().st_size >= _SMALL:
            continue
        if file.resolve().parent not in inside:
            raise ValueError(f"{file}: a link out of the folder, to {file.resolve()}; put a copy of the file there")
        result.append(file)
    return result


def _copy(files: Sequence[Path], source: Path, target: Path) -> None:
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def chunk_spans(config: ModelConfig, chunks: Mapping[str, Sequence[int]]) -> dict[str, list[orbax.Span]]:
    """Tensor's canonical name -> the chunks that it is made of."""
    return {
        name: orbax.spans(entry, layer, chunks) for entry in table(config) for layer, name in enumerate(entry.names)
    }


def _whole(piece: orbax.Piece, rows: int) -> np.ndarray:
    """The numbers [rows, columns] of the tensor that a piece is of, a copy in memory."""
    values = np.fromfile(piece.file, np.dtype(piece.dtype), rows * piece.width, offset=piece.base)
    return values.reshape(rows, piece.width)


def _stamp(plan: Plan) -> dict[str, Any]:
    """What a conversion is of: a change of any of it makes what was written useless."""
    files = []
    for header in plan.headers:
        status = header.file.stat()
        files.append([str(header.file), status.st_size, status.st_mtime_ns, hashlib.sha256(header.text).hexdigest()])
    chunks = {path: list(shape) for path, shape in plan.chunks.items()}
    return {"files": files, "dtype": plan.config.param_dtype, "tags": plan.tags, "chunks": chunks}


def _tag_changes(plan: Plan) -> dict[str, Callable[[np.ndarray], None]]:
    """For the embedding and the head: what sets the tags' rows."""
    if plan.tags == "none":
        return {}
    plain = Tokenizer.from_folder(plan.source)
    tagged = plain.with_tags()
    rows = {tagged.ids.tags[tag]: plain.encode_plain(tag.strip("</>").lower()) for tag in TAGS}

    def change(table_VxD: np.ndarray) -> None:
        if tagged.vocab_size > len(table_VxD):
            raise ValueError(f"the tokenizer and the tags are {tagged.vocab_size} tokens, for {len(table_VxD)} rows")
        mean_D = table_VxD[: plain.vocab_size].astype(np.float32).mean(axis=0)
        for row, pieces in rows.items():
            own = table_VxD[pieces].astype(np.float32).mean(axis=0) if plan.tags == "pieces" else mean_D
            table_VxD[row] = own.astype(table_VxD.dtype)

    names = {e.name for e in table(plan.config) if _by_token(e)}
    return dict.fromkeys(names, change)


def _by_token(entry: Entry) -> bool:
    return entry.paths[0] in ("decoder/embed/embedding", "decoder/lm_head/kernel")


def _set_dtype(path: Path, dtype: str) -> None:
    content = read_object(path)
    for key in ("torch_dtype", "dtype"):
        if key in content:
            content[key] = dtype
    with contextlib.suppress(KeyError, TypeError):
        content["text_config"]["dtype"] = dtype
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
