"""The adapters that a run trains beside a frozen base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.inference.load import Start
from qwenla_jax.model import lora
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.model.trainable import trainable_labels
from qwenla_jax.parallel.sharding import param_shardings

# Separates the adapters' random numbers from those of the parameters.
ADAPTER_STREAM = 0x10A


def kernels_to_adapt(options: RunOptions, config: ModelConfig) -> tuple[str, ...]:
    """The kernels that a run gives an adapter to; see `model.lora.kernels_for` for what it raises."""
    return lora.kernels_for(config, options.lora.modules) if options.lora.rank else ()


def add_adapters(options: RunOptions, first: Start, mesh: Mesh) -> Start:
    """The loaded model with the run's adapters added to the base parameters."""
    config, params = first.model.config, first.params
    kernels, rank = kernels_to_adapt(options, config), options.lora.rank or 1
    if not kernels:
        return first
    shardings = param_shardings(config, mesh, kernels, rank)
    key = jax.random.fold_in(jax.random.key(options.seed), ADAPTER_STREAM)
    shapes = jax.eval_shape(lambda: params)
    make = lambda key: lora.adapters(shapes, kernels, rank, options.lora.alpha, key, options.param_dtype)  # noqa: E731
    added = jax.jit(make, out_shardings=lora.only_adapters(shardings))(key)
    params = _trained_in_param_dtype(options, lora.joined(params, added))
    return dataclasses.replace(first, params=params, shardings=shardings)


def with_adapters(options: RunOptions, params: Params, kernels: Sequence[str], key: jax.Array) -> Params:
    """The parameters with the adapters that a run starts with."""
    added = lora.adapters(params, kernels, options.lora.rank or 1, options.lora.alpha, key, options.param_dtype)
    return _trained_in_param_dtype(options, lora.joined(params, added))


def _trained_in_param_dtype(options: RunOptions, params: Params) -> Params:
    """Casts the trained part of the base to the adapters' type."""
    labels = trainable_labels(params, options.optim.trainable)
    return jax.tree.map(lambda x, label: x if label == "freeze" else x.astype(options.param_dtype), params, labels)
