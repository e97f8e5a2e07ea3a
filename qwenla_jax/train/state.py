"""What an update changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from qwenla_jax.train.sharding import like_params, replicated


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


def state_shardings(params: Any, param_layouts: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Layouts of a whole state: moments lie as their parameters do, everything else is replicated."""
    abstract = jax.eval_shape(lambda: create(params, optimizer))
    return TrainState(
        step=replicated(mesh),
        params=param_layouts,
        opt_state=like_params(abstract.opt_state, params, param_layouts, mesh),
    )


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Returns the new state and the gradient's global norm before clipping."""
    updates, opt_state = optimizer.update(as_float32(grads), state.opt_state, as_float32(state.params))
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"grad_norm": optax.tree.norm(grads)}
