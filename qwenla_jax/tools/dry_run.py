"""Describes a run without loading anything: model, trained and frozen parameters, tokens a step, memory, data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.inference.load import model_config
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.lora import is_adapter
from qwenla_jax.model.trainable import VOCABULARY_AXIS, param_paths, trainable_labels
from qwenla_jax.parallel.sharding import param_shapes
from qwenla_jax.text.special_tokens import TAGS
from qwenla_jax.train.adapters import kernels_to_adapt
from qwenla_jax.train.train_runtime import make_run_source

BYTES = {"float32": 4, "bfloat16": 2}


def parameter_counts(options: RunOptions, config: ModelConfig) -> dict[str, int]:
    """Number of parameters by label: `train`, `freeze`, and of embedding and head the `tags` rows.

    In a run with adapters also `adapters`, which the others do not include.
    """
    counts = {"train": 0, "freeze": 0, "tags": 0}
    for path, leaf, label in _labelled(options, config):
        size = int(np.prod(leaf.shape))
        if is_adapter(path):
            # The scale does not count as a parameter.
            counts["adapters"] = counts.get("adapters", 0) + (size if label == "train" else 0)
            continue
        rows = size // leaf.shape[VOCABULARY_AXIS[path]] * len(TAGS) if label == "tags" else 0
        counts["tags"] += rows
        counts["freeze" if label == "tags" else label] += size - rows
    return counts


def _labelled(options: RunOptions, config: ModelConfig) -> Iterator[tuple[str, jax.ShapeDtypeStruct, str]]:
    """Path, abstract value and label of every parameter."""
    shapes = param_shapes(config, kernels_to_adapt(options, config), options.lora.rank or 1)
    labels = jax.tree.leaves(trainable_labels(shapes, options.optim.trainable))
    yield from zip(param_paths(shapes), jax.tree.leaves(shapes), labels, strict=True)


def describe_run(options: RunOptions) -> list[str]:
    """The description, line by line.

    Raises:
      ValueError, OSError, ModuleNotFoundError: settings or files that cannot be used.
    """
    config = model_config(options.inference)
    counts = parameter_counts(options, config)
    total = sum(counts.values())
    text, vision = config.text, config.vision
    data, brpo = options.data, options.brpo
    source = make_run_source(options, "cold_start" if options.stage == "sft" else "train")
    seen = options.steps * data.batch_size
    lines = [
        f"stage {options.stage}, preset {options.preset}, from {options.init_from}",
        f"model: {text.num_layers} decoder layers of width {text.hidden_size} ({text.num_heads} heads, "
        f"{text.num_kv_heads} for keys and values), {vision.depth} vision blocks of width {vision.hidden_size}, "
        f"vocabulary {text.vocab_size:,}",
        f"parameters: {total:,}, of them trained {total - counts['freeze']:,} (rows of the tags "
        f"{counts['tags']:,}), frozen {counts['freeze']:,}",
        *_adapters(options, config, counts),
        f"data: {data.source}, {len(source):,} questions; {options.steps:,} steps of {data.batch_size} are {seen:,}, "
        f"{seen / len(source):.2f} of them",
        _tokens(options),
        *(_adapter_memory(options, config) if options.lora.rank else _memory(options, counts)),
    ]
    rows = f"{brpo.group_size} responses each, " if options.stage == "brpo" else ""
    lines.append(
        f"update: {rows}{options.optim.accumulation} parts, AdamW {options.optim.learning_rate:g} "
        f"({options.optim.schedule}, {max(1, round(options.optim.warmup_ratio * options.steps))} steps of warm-up)"
    )
    return lines


def _tokens(options: RunOptions) -> str:
    data = options.data
    prompts, responses = data.batch_size * data.max_prompt_tokens, data.batch_size * data.max_response_tokens
    if options.stage == "sft":
        return f"tokens a step: at most {prompts + responses:,}, of which {responses:,} of responses"
    sampled = responses * options.brpo.group_size
    return f"tokens a step: at most {prompts:,} of prompts, {sampled:,} sampled"


def _adapters(options: RunOptions, config: ModelConfig, counts: dict[str, int]) -> list[str]:
    if not options.lora.rank:
        return []
    kernels = kernels_to_adapt(options, config)
    return [
        f"adapters: rank {options.lora.rank}, alpha {options.lora.alpha:g}, on {', '.join(kernels)}: "
        f"{counts['adapters']:,} parameters, {counts['adapters'] / sum(counts.values()):.2%} of all"
    ]


def _adapter_memory(options: RunOptions, config: ModelConfig) -> list[str]:
    """As `_memory`, where the base model is frozen, stored in the compute type, and serves as reference too."""
    stored, computed = BYTES[options.param_dtype], BYTES[options.dtype]
    sizes = {"frozen": 0, "moving": 0, "base": 0}  # frozen, trained, and of the latter the base's
    for path, leaf, label in _labelled(options, config):
        size = int(np.prod(leaf.shape))
        sizes["frozen" if label == "freeze" else "moving"] += size
        sizes["base"] += size if label != "freeze" and not is_adapter(path) else 0
    parts: dict[str, float] = {
        "frozen parameters": sizes["frozen"] * computed,
        "trained ones": sizes["moving"] * stored,
        "gradient": sizes["moving"] * stored,
        "moments": sizes["moving"] * 8,
    }
    if options.stage == "brpo" and options.brpo.beta:
        parts["reference beside the frozen parameters"] = sizes["base"] * computed
    return [_memory_line(options, parts)]


def _memory(options: RunOptions, counts: dict[str, int]) -> list[str]:
    """Memory that stays on the devices, by arithmetic; activations and the cache come on top."""
    total = sum(counts.values())
    stored, computed = BYTES[options.param_dtype], BYTES[options.dtype]
    # Moments exist for whole parameters: of a "tags" parameter too.
    moving = counts["train"] + counts["tags"]
    parts: dict[str, float] = {"parameters": total * stored, "gradient": moving * stored, "moments": moving * 8}
    if options.stage == "brpo" and options.brpo.beta:
        parts["reference"] = total * computed
    if options.dtype != options.param_dtype:
        parts["parameters as computed"] = total * computed
    return [_memory_line(options, parts)]


def _memory_line(options: RunOptions, parts: dict[str, float]) -> str:
    message = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    mesh: Any = options.mesh
    split = "split over the devices of mesh axes fsdp and tensor"
    return f"memory that stays: {sum(parts.values()) / 1e9:.2f} GB ({message}), {split} ({mesh.fsdp} x {mesh.tensor})"
