"""Reads and writes Hugging Face folders: config.json, safetensors, tokenizer, image processor. No torch, no pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 once this is imported)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.model import lora
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import Entry, canonical, compare, is_ignored, stored_name, table
from qwenla_jax.model.qwen_vl import QwenVL
from qwenla_jax.text import special_tokens as st
from qwenla_jax.text.tokenizer import Tokenizer, in_folder
from qwenla_jax.utils.json_files import read_object
from qwenla_jax.utils.json_section import plain_name
from qwenla_jax.weights import orbax
from qwenla_jax.weights.custom_generate import write_custom_generate
from qwenla_jax.weights.hub import local_folder

Params = dict[str, Any]
FolderPath = str | os.PathLike[str]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_INDEX = 100 << 20  # bytes; that of a released model has 100 thousand
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds. Unpacks as `model, params = load(path)`.

    Attributes:
      model: the Linen module; `model.config` is the `ModelConfig`.
      params: its parameters, the tree that `model.apply({"params": params}, ...)` takes.
      tokenizer: None where the folder has none.
      processor: the image processor's settings, None where the folder has none.
    """

    model: QwenVL
    params: Params
    tokenizer: Tokenizer | None
    processor: ProcessorSettings | None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    def __iter__(self) -> Iterator[Any]:
        """Model and parameters."""
        return iter((self.model, self.params))


def load(path: FolderPath, *, dtype: str | None = None, shardings: Any = None, **changes: Any) -> Checkpoint:
    """Reads a checkpoint, a folder or a model of the Hugging Face Hub; see `load_params` for arguments and errors.

    The folder's tokenizer and image processor are read first, so that a broken small file is reported at once.
    """
    folder = local_folder(path)
    tokenizer = Tokenizer.from_folder(folder) if in_folder(folder) else None
    settings = [folder / name for name in _PROCESSOR_FILES if (folder / name).is_file()]
    processor = ProcessorSettings.from_json(settings[0]) if settings else None
    config, params = load_params(folder, dtype=dtype, shardings=shardings, **changes)
    return Checkpoint(QwenVL(config), params, tokenizer, processor)


def load_params(
    path: FolderPath, *, dtype: str | None = None, shardings: Any = None, **changes: Any
) -> tuple[ModelConfig, Params]:
    """Reads config.json and the weights, one parameter at a time.

    All names and shapes are checked before the first weight is read. Host memory holds one parameter (all its layers)
    at a time beside what is already placed.

    Args:
      path: the folder, with model.safetensors or shards and their index, or with `params` as `convert/from_hf.py`
        writes it; or another name that `hub.local_folder` takes, such as Qwen/Qwen2.5-VL-3B-Instruct or tiny.
      dtype: "float32", "bfloat16" or "float16" for parameters and computation; None takes config.json's. Weights that
        are stored in another one are converted.
      shardings: where the parameters go: one `jax.sharding.Sharding` for all, or a tree of them shaped as the
        parameters; None places all on the default device.
      **changes: other fields of `ModelConfig` to set, as `remat="dots"`.

    Returns:
      The config, whose param_dtype is that of the parameters, and the nested dict of jax arrays.

    Raises:
      FileNotFoundError: the folder or a file in it does not exist.
      ValueError: a bad config, or tensors that are missing, unexpected, misshapen or of an unknown dtype; one error
        lists them all.
    """
    folder = local_folder(path)
    config = ModelConfig.from_hf(folder)
    if dtype is not None:
        changes = {"dtype": dtype, "param_dtype": dtype, **changes}
    config = dataclasses.replace(config, **changes)
    if orbax.is_orbax(folder):
        return config, orbax.load_arrays(folder, config, shardings)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        tensors.check(config)
        params: Params = {}
        for entry in table(config):
            for leaf_path, leaf in zip(entry.paths, _read(entry, tensors, config.param_dtype), strict=True):
                where = _at(shardings, leaf_path) if isinstance(shardings, Mapping) else shardings
                _put(params, leaf_path, _place(leaf, where))
    return config, params


def save(
    path: FolderPath,
    model: QwenVL | ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    processor: ProcessorSettings | None = None,
    system: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    overwrite: bool = False,
    card: str | None = None,
    reattention: ReattentionOptions | None = None,
) -> Path:
    """Writes a folder that `from_pretrained` of the family's class of transformers loads unmodified, in the layout of
    the released files, which every release that has the class reads.

    All is written to a hidden folder beside `path` and renamed at the end, so `path` never holds half a checkpoint.
    Low-rank adapters are merged into their kernels, in float32 and rounded once.

    Args:
      path: the folder to write.
      model: the module or its config.
      params: the parameters, as `load` returns them, with or without adapters.
      tokenizer: written with a chat template that gives what it was trained on; see `Tokenizer.save`. Its stop tokens
        go into generation_config.json. One with the tags brings `custom_generate/`, re-attention for transformers.
      processor: written as preprocessor_config.json.
      system: text of the system turn that the model was trained with; None: it had no such turn.
      max_shard_bytes: a larger checkpoint is written in shards of at most this size (one tensor may exceed it).
      dtype: what the weights are stored in; None: `config.param_dtype`.
      overwrite: replace what stands at `path`.
      card: text of README.md; None: no such file.
      reattention: what the model was trained with; `custom_generate` takes it as its default. None: text-only.

    Returns:
      The folder.

    Raises:
      FileExistsError: there is something at `path` and overwrite is False.
      ValueError: parameters that are missing, unexpected or misshapen for this config, listed in one error; an unknown
        dtype; a max_shard_bytes below 1.
    """
    target = Path(path)
    config = model if isinstance(model, ModelConfig) else model.config
    config = dataclasses.replace(config, param_dtype=dtype or config.param_dtype)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be 1 or more")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: already exists; pass overwrite=True to replace it")
    entries = table(config)
    problems = compare(
        ((p, entry.param_shape) for entry in entries for p in entry.paths),
        ((p, tuple(leaf.shape)) for p, leaf in _leaves(lora.base_of(params))),
    )
    if problems:
        raise ValueError(_listing("the parameters do not fit the config", problems))
    ids = _token_ids(tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        _write_json(temporary / "config.json", config.to_hf(**ids))
        if tokenizer is not None:
            tokenizer.save(temporary, system)
        again = write_custom_generate(temporary, tokenizer, reattention)
        _write_json(temporary / "generation_config.json", {**ids, "do_sample": False, **again})
        if processor is not None:
            content = {**processor.to_dict(), "processor_class": config.family.processor}
            _write_json(temporary / "preprocessor_config.json", content)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        _write_weights(temporary, config, params, max_shard_bytes)
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or the one.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: the index cannot be read.
    """
    index = folder / _INDEX
    if index.is_file():
        result = read_object(index, _MAX_INDEX).get("weight_map")
        if not isinstance(result, dict) or not result:
            raise ValueError(f"{index}: not a safetensors index: weight_map must be an object, of tensors and files")
        return [folder / name for name in sorted({plain_name(name, ".safetensors", index) for name in result.values()})]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    raise FileNotFoundError(f"{folder}: has neither {_WEIGHTS} nor {_INDEX}")


def check_tensors(folder: FolderPath, config: ModelConfig) -> None:
    """Whether a folder's tensors are those of the config; see `load_params` for what it raises."""
    with contextlib.ExitStack() as stack:
        _Tensors(local_folder(folder), stack).check(config)


class _Tensors:
    """The tensors of a folder's safetensors files, by canonical name; files stay open until `stack` closes."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.handles: dict[str, tuple[Any, str]] = {}
        self.doubles: list[str] = []
        for file in weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{file}: no such file, though {_INDEX} names it") from error
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
            for name in handle.keys():
                if is_ignored(name):
                    continue
                if canonical(name) in self.handles:
                    self.doubles.append(f"given twice: {canonical(name)} (again in {file.name} as {name})")
                self.handles[canonical(name)] = (handle, name)

    def shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self.handles[name]
        return tuple(handle.get_slice(stored).get_shape())

    def read(self, name: str) -> np.ndarray:
        handle, stored = self.handles[name]
        return handle.get_tensor(stored)

    def check(self, config: ModelConfig) -> None:
        """One ValueError with everything that is wrong with the tensors."""
        expected = [(name, entry.shape) for entry in table(config) for name in entry.names]
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        problems = list(self.doubles)
        if config.text.tie_word_embeddings and head in self.handles and embedding in self.handles:
            # Some writers store a tied head too. Equal to the embedding it says nothing new; else the tie is wrong.
            if self.shape(head) == self.shape(embedding) and np.array_equal(self.read(head), self.read(embedding)):
                del self.handles[head]
            else:
                problems.append(f"contradiction: config.json ties the embeddings but {head} is another matrix")
                expected.append((head, self.shape(head)))
        problems += compare(expected, ((name, self.shape(name)) for name in self.handles))
        for name, (handle, stored) in self.handles.items():
            kind = handle.get_slice(stored).get_dtype()
            if kind not in _STORED_DTYPES:
                problems.append(f"dtype: {name} is {kind}, should be one of {', '.join(_STORED_DTYPES)}")
        if problems:
            raise ValueError(_listing(f"{self.folder}: the weights do not fit config.json", problems))


def _read(entry: Entry, tensors: _Tensors, dtype: str) -> list[np.ndarray]:
    """Our parameters of one table entry, layers stacked."""
    leaves = [np.empty(entry.param_shape, dtype) for _ in entry.paths]
    for layer, name in enumerate(entry.names):
        for leaf, part in zip(leaves, entry.split(tensors.read(name)), strict=True):
            leaf[... if entry.layers is None else layer] = part
    return leaves


def _place(leaf: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.numpy.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def _write_weights(folder: Path, config: ModelConfig, params: Mapping[str, Any], max_shard_bytes: int) -> None:
    entries, dtype = table(config), np.dtype(config.param_dtype)
    sizes = [(name, entry, int(np.prod(entry.shape)) * dtype.itemsize) for entry in entries for name in entry.names]
    shards: list[set[str]] = [set()]
    filled = 0
    for name, _, size in sizes:
        if filled and filled + size > max_shard_bytes:
            shards.append(set())
            filled = 0
        shards[-1].add(name)
        filled += size
    count = len(shards)
    files = [_WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    tensors, shard = {}, 0
    for entry in entries:
        leaves = [np.asarray(jax.device_get(_at(params, p))) for p in entry.paths]
        adapters = [lora.adapter_of(params, p) for p in entry.paths]
        for layer, name in enumerate(entry.names):
            if name not in shards[shard]:
                _write_tensors(folder / files[shard], tensors)
                tensors, shard = {}, shard + 1
            at = ... if entry.layers is None else layer
            parts = [leaf[at] for leaf in leaves]
            # One layer at a time: in float32 all of them would take several times the checkpoint's memory.
            parts = [
                part if own is None else lora.merged(part, *(x[at] for x in own))
                for part, own in zip(parts, adapters, strict=True)
            ]
            tensors[stored_name(config, name)] = entry.join(parts).astype(dtype)
    _write_tensors(folder / files[shard], tensors)
    if count > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {stored_name(config, name): file for file, names in pairs for name in sorted(names)}
        total = sum(size for _, _, size in sizes)
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for this mark
    path.chmod(mode)  # safetensors leaves a file that only its owner can read


def _swap(temporary: Path, target: Path) -> None:
    """Puts the finished folder at its place; what stood there is removed only after that."""
    old = target.parent / f"{temporary.name}.old"
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Ids that generation needs: a response ends with <|im_end|> or <|endoftext|>, and the latter pads."""
    if tokenizer is None:
        return {}
    end, pad = tokenizer.token_to_id(st.IM_END), tokenizer.token_to_id(st.ENDOFTEXT)
    stops = [i for i in (end, pad) if i is not None]
    return {"bos_token_id": pad, "eos_token_id": stops or None, "pad_token_id": pad}


def _listing(title: str, problems: list[str]) -> str:
    return f"{title} ({len(problems)} problems):\n  " + "\n  ".join(problems)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _at(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("/"):
        node = node[key]
    return node


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
