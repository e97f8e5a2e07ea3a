"""Low-rank adapters (LoRA, Hu et al. 2021) on linear layers: y = x W + scale (x A) B, with W left as it is.

An adapter is three leaves beside its kernel in the parameters' tree, and a layer whose tree holds them applies them
(`layers.Dense`). The tree decides, not the config, so that one model serves three uses: the policy takes the
whole tree, the reference the same arrays without these leaves (`base_of`), and an export the merged ones. The scale is
a leaf too, so that it cannot be left out.

    lora_a      [L, in, r]    initialised as in PEFT
    lora_b      [L, r, out]   zero at first, so that the model begins as the base model, bit for bit
    lora_scale  [L]           alpha / r, a constant; L only where the kernel has layers

Paper silent: it trains all parameters of the decoder.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import table
from qwenla_jax.model.layers import LORA_A, LORA_B, LORA_SCALE

LEAVES = (LORA_A, LORA_B, LORA_SCALE)
RANK_AXIS = "lora"  # logical name of the axis r
_HEAD = "decoder/lm_head/kernel"


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is one of an adapter's leaves."""
    return path.rpartition("/")[2] in LEAVES


def adapted_kernels(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of the kernels that have an adapter in this tree, in the tree's order."""
    paths = (path.rpartition("/") for path in flatten_dict(params, sep="/"))
    return tuple(sorted(f"{layer}/kernel" for layer, _, name in paths if name == LORA_A))


def base_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree, and the same arrays, without adapters."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: leaf for path, leaf in flat.items() if not is_adapter(path)}, sep="/")


def only_adapters(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of the adapters' leaves alone."""
    flat = flatten_dict(tree, sep="/")
    return unflatten_dict({path: leaf for path, leaf in flat.items() if is_adapter(path)}, sep="/")


def kernels_for(config: ModelConfig, modules: Sequence[str]) -> tuple[str, ...]:
    """Paths of the kernels that get an adapter, in the order of the checkpoint's table.

    `modules` are regular expressions of whole parameter paths.

    Raises:
      ValueError: an expression that matches nothing (the nearest paths are named), or that matches a parameter which is
        no kernel of a linear layer within the model.
    """
    paths = [path for entry in table(config) for path in entry.paths]
    able = [path for e in table(config) if e.kind == "linear" for path in e.paths if path.endswith("/kernel")]
    able = [path for path in able if path != _HEAD]
    chosen: set[str] = set()
    for pattern in modules:
        matching = [path for path in paths if re.fullmatch(pattern, path)]
        if not matching:
            # Without its operators an expression resembles the path that it was meant to match.
            plain = re.sub(r"[^\w/]+", "", pattern)
            near = difflib.get_close_matches(plain, able, n=3, cutoff=0.0)
            raise ValueError(f"config.lora.modules: {pattern!r} matches no parameter; near are {', '.join(near)}")
        if wrong := [path for path in matching if path not in able]:
            raise ValueError(
                f"config.lora.modules: {pattern!r} matches {_few(wrong)}, which can have no adapter: only kernels of "
                f"linear layers can, as {able[0]} (not the head, and not the patches' convolution)"
            )
        chosen.update(matching)
    return tuple(path for path in able if path in chosen)


def adapters(
    shapes: Mapping[str, Any], kernels: Iterable[str], rank: int, alpha: float, key: jax.Array, dtype: str
) -> dict[str, Any]:
    """New adapters, to be compiled with the run's shardings.

    A is uniform in +-1 / sqrt(in), which equals PEFT's `kaiming_uniform_(a=sqrt(5))`; its numbers depend on
    the key and the kernel's path alone, not on which other kernels have adapters.

    Args:
      shapes: the base parameters, or their abstract values.
      kernels: from `kernels_for`.
      rank: r, at least 1.
      alpha: the scale is alpha / r.
      key: random key.
      dtype: type of A and B; the scale is float32.

    Returns:
      A tree of the adapters' leaves alone.
    """
    flat, made = cast(dict[str, Any], flatten_dict(shapes, sep="/")), {}
    for path in kernels:
        *layers, into, out = flat[path].shape
        path_key, bound = jax.random.fold_in(key, zlib.crc32(path.encode())), into**-0.5
        layer = path.removesuffix("kernel")
        a = jax.random.uniform(path_key, (*layers, into, rank), jnp.float32, -bound, bound)
        made[layer + LORA_A] = a.astype(dtype)
        made[layer + LORA_B] = jnp.zeros((*layers, rank, out), dtype)
        made[layer + LORA_SCALE] = jnp.full(layers, alpha / rank, jnp.float32)
    return unflatten_dict(made, sep="/")


def adapter_specs(specs: Mapping[str, Any], kernels: Iterable[str]) -> dict[str, Any]:
    """Logical axes of the adapters of `kernels`, from those of the base (`qwen_vl.logical_specs`); r is `RANK_AXIS`."""
    flat, made = cast(dict[str, Any], flatten_dict(specs, sep="/")), {}
    for path in kernels:
        *layers, into, out = flat[path]
        layer = path.removesuffix("kernel")
        made[layer + LORA_A] = PartitionSpec(*layers, into, RANK_AXIS)
        made[layer + LORA_B] = PartitionSpec(*layers, RANK_AXIS, out)
        made[layer + LORA_SCALE] = PartitionSpec(*layers)
    return unflatten_dict(made, sep="/")


def joined(params: Mapping[str, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of all trees in one; of leaves with the same path the last is taken."""
    flat = flatten_dict(params, sep="/")
    for part in parts:
        flat |= flatten_dict(part, sep="/")
    return unflatten_dict(flat, sep="/")


def adapter_of(params: Mapping[str, Any], path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A, B and scale of a kernel on the host, with the layers' axis; None of a parameter that has no adapter."""
    node: Any = params
    for name in path.split("/")[:-1]:
        node = node.get(name, {})
    if LORA_A not in node or not path.endswith("/kernel"):
        return None
    a, b, scale = (np.asarray(jax.device_get(node[name])) for name in LEAVES)
    return a, b, scale


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """W + scale A B in float32, [in, out], not yet rounded to any other type."""
    return kernel.astype(np.float32) + np.float32(scale) * (a.astype(np.float32) @ b.astype(np.float32))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
