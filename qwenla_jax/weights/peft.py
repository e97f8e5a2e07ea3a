"""Adapters alone, as a folder that the package PEFT loads onto the base model: adapter_config.json and safetensors.

Names are those of the modules as transformers 5 holds them (`model.language_model.layers.0.self_attn.q_proj`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qwenla_jax.model import lora
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import Entry, module_name, table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Adapter = tuple[np.ndarray, np.ndarray, np.ndarray]


def save_adapters(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    base: str | None = None,
    overwrite: bool = False,
    card: str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes the adapters of a tree. The vision tower's query, key and value are one module there and three here:
    their adapters become one of their ranks' sum, whose B is zero outside its blocks.

    Args:
      path: the folder to write.
      config: of the model.
      params: a tree with adapters.
      base: name or folder of the base model, for the record.
      overwrite: replace what stands at `path`.
      card: text of README.md; None: no such file.
      revision: of the base model, where that is one of the Hub.

    Returns:
      The folder.

    Raises:
      FileExistsError: there is something at `path` and overwrite is False.
      ValueError: the tree has no adapters.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: already exists; pass overwrite=True to replace it")
    tensors: dict[str, np.ndarray] = {}
    sizes: dict[str, tuple[int, float]] = {}  # expression of the modules -> rank, alpha
    for entry in table(config):
        if entry.kind != "linear":
            continue
        result = [lora.adapter_of(params, own) for own in entry.paths]
        if not any(result):
            continue
        for layer, name in enumerate(entry.names):
            at = ... if entry.layers is None else layer
            a, b = _one_module(entry, [own and (own[0][at], own[1][at]) for own in result])
            module = f"base_model.model.{module_name(name).removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
        scale = float(next(np.ravel(own[2])[0] for own in result if own))
        sizes[_expression(entry)] = (len(a), scale * len(a))
    if not sizes:
        raise ValueError(f"{target}: the parameters have no adapters to write")
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    work.mkdir(parents=True)
    try:
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(_config(sizes, base, revision), indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (work / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target


def _one_module(entry: Entry, parts: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> tuple[np.ndarray, np.ndarray]:
    """A [R, in] and B [out, R] of the module that holds the parts one below the other."""
    have = [part for part in parts if part]
    into, rank, rows = have[0][0].shape[0], have[0][0].shape[1], entry.shape[0] // len(parts)
    a = np.zeros((rank * len(have), into), have[0][0].dtype)
    b = np.zeros((rows * len(parts), rank * len(have)), have[0][1].dtype)
    column = 0
    for row, part in enumerate(parts):
        if part:
            a[column : column + rank] = part[0].T
            b[row * rows : (row + 1) * rows, column : column + rank] = part[1].T
            column += rank
    return a, b


def _expression(entry: Entry) -> str:
    """What matches the names of an entry's modules."""
    name = re.escape(module_name(entry.name).removesuffix(".weight"))
    return name.replace(re.escape("{}"), r"\d+")


def _config(sizes: Mapping[str, tuple[int, float]], base: str | None, revision: str | None) -> dict[str, Any]:
    rank, alpha = min(sizes.values())
    others = {name: size for name, size in sizes.items() if size[0] != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": "|".join(sizes),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: size[0] for name, size in others.items()},
        "alpha_pattern": {name: size[1] for name, size in others.items()},
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
