"""From the model's logical axes to the mesh: one table, and the shardings that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwenla_jax.model import lora
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import table
from qwenla_jax.model.qwen_vl import abstract_params, logical_specs

# Logical axis -> mesh axes. The model names the left side only; None is replicated.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("frames", ("data", "fsdp")),
    ("tokens", None),
    ("patches", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("patch", None),
    ("norm", None),
    (lora.RANK_AXIS, None),
)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of a batch: its row axis, which `leading` other axes precede, over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))


def row_shards() -> int:
    """Devices that the rows of a batch are sharded over, in the mesh that a program is traced for; 1 without one."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, adapted: Sequence[str] = (), rank: int = 1) -> Any:
    """A sharding for every parameter, from its logical axes.

    An axis that does not divide over its devices is replicated. Heads must divide whole: half a head on a device would
    need communication in every layer. Leaves of the adapters of the kernels `adapted` get shardings too.
    """
    table = dict(RULES)
    shapes = param_shapes(config, adapted, rank)
    specs = logical_specs(config)
    specs = lora.joined(specs, lora.adapter_specs(specs, adapted))
    text_heads = {"heads": config.text.num_heads, "kv_heads": config.text.num_kv_heads}

    def sharding_of(path: Any, spec: PartitionSpec, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        heads = {"heads": config.vision.num_heads} if path[0].key == "visual" else text_heads
        names = []
        for size, logical in zip(shape.shape, spec, strict=True):
            axis = table[logical]
            names.append(axis if axis is None or heads.get(logical, size) % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*names))

    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree_util.tree_map_with_path(sharding_of, specs, shapes, is_leaf=is_spec)


def param_shapes(config: ModelConfig, adapted: Sequence[str] = (), rank: int = 1, dtype: str | None = None) -> Any:
    """Abstract values of the parameters, with adapters of type `dtype` (default: the parameters')."""

    def make(boxed: Any) -> Any:
        params = nn.meta.unbox(boxed)
        added = lora.adapters(params, adapted, rank, 1.0, jax.random.key(0), dtype or config.param_dtype)
        return lora.joined(params, added)

    return jax.eval_shape(make, abstract_params(config))


def mesh_chunks(config: ModelConfig, fsdp: int, tensor: int) -> dict[str, tuple[int, ...]]:
    """Path of every parameter -> the shape of a device's part of it, one layer at a time; no device is needed.

    `fsdp` and `tensor` devices lie along these axes of the mesh; those along data hold the same.
    """
    mesh = AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
    shardings = jax.tree_util.tree_flatten_with_path(param_shardings(config, mesh))[0]
    by_path = {"/".join(key.key for key in path): sharding for path, sharding in shardings}
    chunks = {}
    for entry in table(config):
        for path in entry.paths:
            part = by_path[path].shard_shape(entry.param_shape)
            chunks[path] = part if entry.layers is None else (1, *part[1:])
    return chunks


def gathered(shardings: Any) -> Any:
    """The shardings without the axis fsdp: what it splits is whole on each of its devices."""

    def without(sharding: NamedSharding) -> NamedSharding:
        spec = (None if name == "fsdp" else name for name in sharding.spec)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    return jax.tree.map(without, shardings)


def like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree with copies of the parameters' tree (optimizer moments) among other, replicated values.

    `tree` and `params` may be abstract; `shardings` are those of `params`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    pairs = zip(leaves, jax.tree.leaves(shardings), strict=True)
    by_path = {tuple(map(str, path)): (leaf.shape, sharding) for (path, leaf), sharding in pairs}

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for start in range(len(names)):
            match = by_path.get(names[start:])
            if match and match[0] == leaf.shape:
                return match[1]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def activation_rules() -> Any:
    """A context in which the model's logical constraints on activations mean the table's mesh axes."""
    return nn.logical_axis_rules(RULES)
