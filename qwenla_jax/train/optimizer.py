"""AdamW with warm-up, and which parameters it may touch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from qwenla_jax.model.layers import LORA_SCALE
from qwenla_jax.model.lora import adapted_kernels, is_adapter
from qwenla_jax.train.options import OptimOptions


def schedule(options: OptimOptions, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: a linear rise, then constant or a fall to 0 by cosine or line."""
    warmup = max(1, round(options.warmup_ratio * steps))
    rise = optax.linear_schedule(0.0, options.learning_rate, warmup)
    rest = max(1, steps - warmup + 1)  # the last update still moves; 0 would come after it
    after = {
        "constant": optax.constant_schedule(options.learning_rate),
        "cosine": optax.cosine_decay_schedule(options.learning_rate, rest),
        "linear": optax.linear_schedule(options.learning_rate, 0.0, rest),
    }[options.schedule]
    # The first update must move: count from the end of the rise's first step.
    joined = optax.join_schedules([rise, after], [warmup])
    return lambda count: joined(count + 1)


# The rule for what no other rule covers.
REST = (".*", "train")
# Parameters with a row for each token, and the axis of these rows.
VOCABULARY_AXIS = {"decoder/embed/embedding": 0, "decoder/lm_head/kernel": 1}


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path)


def param_paths(params: Any) -> list[str]:
    """Names of all parameters, `decoder/layers/attn/q/kernel`, in the tree's order."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def trainable_labels(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """"train", "freeze" or "tags" for every parameter, by the first rule whose expression matches its whole name.

    Adapters are trained, whatever the rules say: these are for the base model. Where there are adapters, the rule
    `(".*", "train")`, which is there for what no other rule covers, leaves the base model as it is.

    Args:
      params: the parameters, or any tree shaped as they are.
      rules: of `config.optim.trainable`.

    Raises:
      ValueError: parameters that no rule covers, a rule that covers nothing, "tags" for a parameter without a
        vocabulary axis, or "train" for a kernel that has an adapter; each is named.
    """
    paths = param_paths(params)
    adapted = adapted_kernels(params)
    compiled = [(re.compile(pattern), pattern, mode) for pattern, mode in rules]
    labels, used = [], set()
    for path in paths:
        if is_adapter(path):
            labels.append("freeze" if path.endswith(LORA_SCALE) else "train")
            continue
        hit = next(((pattern, mode) for expr, pattern, mode in compiled if expr.fullmatch(path)), None)
        if hit == REST and adapted:
            labels.append("freeze")
        else:
            labels.append(None if hit is None else hit[1])
        if hit:
            used.add(hit[0])
    missing = [path for path, label in zip(paths, labels, strict=True) if label is None]
    if missing:
        raise ValueError(f"config.optim.trainable: no rule covers {', '.join(missing)}; add ('.*', 'freeze'), say")
    wrong = [p for p, label in zip(paths, labels, strict=True) if label == "tags" and p not in VOCABULARY_AXIS]
    if wrong:
        raise ValueError(
            f"config.optim.trainable: 'tags' for {', '.join(wrong)}; only {', '.join(VOCABULARY_AXIS)} have such rows"
        )
    both = [p for p, label in zip(paths, labels, strict=True) if p in adapted and label != "freeze"]
    if both:
        raise ValueError(f"config.optim.trainable: 'train' for {', '.join(both)}, but config.lora gives it an adapter")
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ValueError(f"config.optim.trainable: {unused} cover no parameter; names look like {paths[0]!r}")
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def trained_part(tree: Any, labels: Any) -> Any:
    """The leaves whose label is not "freeze", as a tree of them alone: gradients and moments are of nothing else.

    Args:
      tree: shaped as the labels, or such a part already.
      labels: from `trainable_labels`.
    """
    kind = flatten_dict(labels)
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if kind[path] != "freeze"})


def _on_part(inner: optax.GradientTransformation, labels: Any) -> optax.GradientTransformation:
    """`inner` for the trained part: parameters and gradients may come whole, and updates are of the part alone."""

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
        axis = VOCABULARY_AXIS[_name(path)]
        kept_V = np.isin(np.arange(update.shape[axis]), index)
        return jnp.where(kept_V[:, None] if axis == 0 else kept_V[None, :], update, 0)

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
    # Rows first, so that what is not trained counts in no norm; and last, so that no weight decays that is not trained.
    return _on_part(optax.chain(rows, parts, rows), every)
