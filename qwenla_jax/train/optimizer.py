"""AdamW with warm-up, on the trained parameters only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwenla_jax.config.run_options import OptimOptions
from qwenla_jax.model.trainable import VOCABULARY_AXIS, param_name, trainable_labels, trained_part


def schedule(options: OptimOptions, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Learning rate by optimizer step: a linear rise, then constant or a fall to 0 by cosine or line."""
    warmup = max(1, round(options.warmup_ratio * steps))
    rise = optax.linear_schedule(0.0, options.learning_rate, warmup)
    rest = max(1, steps - warmup + 1)  # the last update has a rate above 0
    after = {
        "constant": optax.constant_schedule(options.learning_rate),
        "cosine": optax.cosine_decay_schedule(options.learning_rate, rest),
        "linear": optax.linear_schedule(options.learning_rate, 0.0, rest),
    }[options.schedule]
    # The first update must have a rate above 0: count from 1.
    joined = optax.join_schedules([rise, after], [warmup])
    return lambda count: cast(jax.Array, joined(count + 1))


def _on_part(inner: optax.GradientTransformation, labels: Any) -> optax.GradientTransformation:
    """`inner` for the trained part: takes whole trees or trained parts, and returns updates of the part."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        params = None if params is None else trained_part(params, labels)
        return inner.update(trained_part(updates, labels), state, params)

    return optax.GradientTransformation(lambda params: inner.init(trained_part(params, labels)), update)


def only_rows(labels: Any, rows: Sequence[int]) -> optax.GradientTransformation:
    """Zeroes, in parameters labelled "tags", whatever does not belong to the given rows of the vocabulary."""
    index = np.asarray(rows, np.int32)

    def keep(path: Any, update: jax.Array, label: str) -> jax.Array:
        if label != "tags":
            return update
        axis = VOCABULARY_AXIS[param_name(path)]
        trained_V = np.isin(np.arange(update.shape[axis]), index)
        return jnp.where(trained_V[:, None] if axis == 0 else trained_V[None, :], update, 0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(keep, updates, labels))


def make_optimizer(
    options: OptimOptions, steps: int, params: Any, tag_rows: Sequence[int] = ()
) -> optax.GradientTransformation:
    """The optimizer of a run; frozen parameters have no moments and no update.

    Args:
      options: settings; the paper's are AdamW with (b1, b2, eps) by stage.
      steps: optimizer steps of the whole run, which the schedule spans.
      params: the parameters or their abstract values.
      tag_rows: ids of the tags: the rows of the vocabulary that a "tags" rule trains (paper, stage 4). Gradients,
        moments, weight decay and updates of all other rows are zero.

    Raises:
      ValueError: see `trainable_labels`; or a "tags" rule and no ids.
    """
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule(options, steps), options.b1, options.b2, options.eps, weight_decay=options.weight_decay
    )
    every = trainable_labels(params, options.trainable)
    labels = trained_part(every, every)
    if "tags" not in jax.tree.leaves(labels):
        parts = optax.partition({"train": optax.chain(clip, adamw), "freeze": optax.set_to_zero()}, labels)
        return _on_part(parts, every)
    if not len(tag_rows):
        raise ValueError("config.optim.trainable: a 'tags' rule needs the ids of the tags")
    rows = only_rows(labels, tag_rows)
    moves = jax.tree.map(lambda label: "train", labels)
    parts = optax.partition({"train": optax.chain(clip, adamw), "freeze": optax.set_to_zero()}, moves)
    # Rows first, so that untrained rows count in no norm; and last, so that they get no weight decay.
    return _on_part(optax.chain(rows, parts, rows), every)
