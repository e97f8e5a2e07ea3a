"""What an update changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from qwenla_jax.model.lora import adapted_kernels, joined
from qwenla_jax.model.trainable import trainable_labels, trained_part
from qwenla_jax.parallel.sharding import like_params, replicated


@struct.dataclass
class TrainState:
    """Parameters, optimizer state, and the number of updates made so far (int32 scalar)."""

    step: jax.Array
    params: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update. Moments are float32 whatever the parameters are."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(as_float32(params)))


def as_float32(tree: Any) -> Any:
    """All arrays of a tree in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def state_shardings(
    params: Any, param_shardings: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shardings of a whole state: moments are sharded as their parameters, everything else is replicated."""
    abstract = jax.eval_shape(lambda params: create(params, optimizer), params)
    return TrainState(
        step=cast(Any, replicated(mesh)),  # a state of shardings
        params=param_shardings,
        opt_state=like_params(abstract.opt_state, params, param_shardings, mesh),
    )


def to_keep(state: TrainState, rules: Sequence[tuple[str, str]]) -> TrainState:
    """What a checkpoint holds: with adapters only what is trained, since the rest never changes."""
    if not adapted_kernels(state.params):
        return state
    return dataclasses.replace(state, params=trained_part(state.params, trainable_labels(state.params, rules)))


def whole(kept: TrainState, params: Any) -> TrainState:
    """The inverse of `to_keep`: what was not kept is taken from the parameters that the run started from."""
    return dataclasses.replace(kept, params=joined(params, kept.params))


def fingerprint(tree: Any) -> int:
    """A 32-bit hash of the bits of all arrays, on the host.

    It sums integers, so it does not depend on how the arrays are sharded.
    """

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):  # two elements must not be interchangeable
            place = place * jnp.uint32(0x01000193) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (bits.astype(jnp.uint32) ^ place) * jnp.uint32(0x9E3779B1)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    sums = jax.device_get(jax.jit(lambda leaves: [of(x) for x in leaves])(jax.tree.leaves(tree)))
    total = 0
    for value in sums:
        total = (total * 0x01000193 + int(value)) % 2**32
    return total


Metrics = dict[str, jax.Array]
Gradient = Callable[..., tuple[Any, Metrics]]  # (parameters, batch ...) -> gradient, metrics
Update = Callable[..., tuple["TrainState", Metrics]]  # (state, batch ...) -> new state, metrics


def make_update(gradient: Gradient, optimizer: optax.GradientTransformation) -> Update:
    """A stage's update, to be jitted with the run's shardings.

    It leaves the state unchanged where `loss` or the gradient is not finite, or `num_tokens` is 0.
    """

    def update(state: TrainState, *batch: Any) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, *batch)
        usable = jnp.isfinite(metrics["loss"]) & (metrics["num_tokens"] > 0)
        state, own = apply_gradients(state, grads, optimizer, usable)
        return state, own | metrics

    return update


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, usable: jax.Array | bool = True
) -> tuple[TrainState, Metrics]:
    """One update, or none at all.

    Args:
      state: before the update.
      grads: as the parameters, or of some of them: the others stay as they are.
      optimizer: the run's.
      usable: whether any token of the batch counts, and its loss is finite.

    Returns:
      the new state, which is the old one bit for bit where `usable` is false or the gradient's norm is not finite; and
      metrics: `grad_norm`, the gradient's global norm before clipping, and `skipped`, 1 where nothing was updated.
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & usable
    updates, opt_state = optimizer.update(as_float32(grads), state.opt_state, as_float32(state.params))
    # Frozen arrays are passed through, not added 0 to: no pass over them, and no bit changes.
    flat, moved = flatten_dict(state.params), flatten_dict(updates)
    part = unflatten_dict({path: flat[path] for path in moved})
    old = TrainState(state.step, part, state.opt_state)
    new = TrainState(state.step + 1, optax.apply_updates(part, updates), opt_state)
    new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
    state = dataclasses.replace(new, params=unflatten_dict(flat | flatten_dict(new.params)))
    return state, {"grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}
