"""The parameters as the engine's programs take them: in the compute type or in int8, and laid out for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwenla_jax.model.decoder import is_apart, layers_apart
from qwenla_jax.model.layers import KERNEL_SCALE
from qwenla_jax.model.qwen_vl import Params

# Bytes of the decoder's layers from which, and up to which, they are laid out one by one on CPU. Smaller ones fit into
# the cores' caches and are copied quickly; of larger ones a second copy may not fit into memory.
LEAST_APART, MOST_APART = 2**25, 2**32


def cast(params: Params, dtype: str, int8: bool = False) -> Params:
    """The parameters in the compute type and, with `int8`, the decoder's kernels in int8 (paper silent).

    A kernel w [.., in, out] becomes w / s, rounded, and s beside it: one scale for each output, its largest magnitude /
    127. Products are in the compute type. Embedding, head, norms, biases, adapters and the tower stay in that type.

    Args:
      params: as `init_params` makes them.
      dtype: the compute type.
      int8: whether the decoder's kernels are rounded.
    """
    if int8:
        layers = _each_dense(params["decoder"]["layers"], lambda dense: _rounded(dense, dtype))
        params = params | {"decoder": params["decoder"] | {"layers": layers}}
    return jax.tree.map(lambda x: x if x.dtype in (jnp.dtype(dtype), jnp.int8) else x.astype(dtype), params)


def cast_shardings(shardings: Any, int8: bool = False) -> Any:
    """The shardings of what `cast` returns, from those of its parameters."""
    if not int8:
        return shardings

    def with_scale(dense: dict[str, Any]) -> dict[str, Any]:
        *stacked, _, outputs = dense["kernel"].spec
        return dense | {KERNEL_SCALE: NamedSharding(dense["kernel"].mesh, PartitionSpec(*stacked, outputs))}

    decoder = shardings["decoder"]
    return shardings | {"decoder": decoder | {"layers": _each_dense(decoder["layers"], with_scale)}}


def _rounded(dense: dict[str, Any], dtype: str) -> dict[str, Any]:
    kernel = dense["kernel"].astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2), jnp.finfo(jnp.float32).tiny) / 127
    scale = scale.astype(dtype)
    rounded = jnp.clip(jnp.round(kernel / scale[..., None, :].astype(jnp.float32)), -127, 127).astype(jnp.int8)
    return dense | {"kernel": rounded, KERNEL_SCALE: scale}


def _each_dense(tree: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The tree with every linear layer changed."""
    if "kernel" in tree:
        return change(tree)
    return {name: _each_dense(part, change) if isinstance(part, dict) else part for name, part in tree.items()}


def for_cpu(params: Params) -> Params:
    """Parameters of `cast` with the decoder's layers one by one, see `layers_apart`, where that pays on CPU."""
    decoder = params["decoder"]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decoder["layers"]))
    if is_apart(decoder) or not LEAST_APART <= size <= MOST_APART:
        return params
    return params | {"decoder": layers_apart(decoder)}
