"""The frozen reference model of BRPO and its shardings."""

from __future__ import annotations

from typing import Any

import jax

from qwenla_jax.model.lora import adapted_kernels, base_of
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.model.trainable import trainable_labels, trained_part
from qwenla_jax.train.sft.update import Rules
from qwenla_jax.train.train_runtime import TrainRuntime


def make_reference(runtime: TrainRuntime, params: Params) -> Params | None:
    """The frozen reference: the parameters a BRPO run starts from, in the type they are computed in; None if unused.

    With `config.brpo.reference` "host" it is in the host's memory, and each update copies it to the devices. Where that
    type is the parameters' own, it is the same arrays: they must not be donated. Where the parameters have adapters,
    the reference is the state's base, and only the trained part of the base is copied here.
    """
    if runtime.options.stage != "brpo" or not runtime.options.brpo.beta:
        return None
    if not adapted_kernels(params) and runtime.options.dtype == runtime.options.param_dtype:
        on_host = runtime.options.brpo.reference == "host"
        return jax.device_put(params, stored_reference_shardings(runtime)) if on_host else params
    return reference_program(runtime)(params)


def reference_program(runtime: TrainRuntime) -> Any:
    """The jitted function of the parameters that makes the reference: a copy, in the compute type, of what changes."""
    dtype, rules = runtime.options.dtype, runtime.options.optim.trainable

    def copy(params: Params) -> Params:
        if adapted_kernels(params):
            return jax.tree.map(lambda x: x.astype(dtype) + 0, _moving_base(params, rules))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return jax.jit(copy, out_shardings=stored_reference_shardings(runtime))


def _moving_base(tree: Any, rules: Rules) -> Any:
    """The trained part of the base, from a tree shaped as parameters with adapters."""
    return base_of(trained_part(tree, trainable_labels(tree, rules)))


def reference_shardings(runtime: TrainRuntime) -> Any:
    """Shardings of the reference during an update."""
    if adapted_kernels(runtime.shardings):
        return _moving_base(runtime.shardings, runtime.options.optim.trainable)
    return runtime.shardings


def stored_reference_shardings(runtime: TrainRuntime) -> Any:
    """Shardings of the reference between updates."""
    shardings = reference_shardings(runtime)
    if runtime.options.brpo.reference == "device":
        return shardings
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)
