"""AdamW with warm-up, and which parameters it may touch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

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


def param_paths(params: Any) -> list[str]:
    """Names of all parameters, `decoder/layers/attn/q/kernel`, in the tree's order."""
    return ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def trainable_labels(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """"train" or "freeze" for every parameter, by the first rule whose expression matches its whole name.

    Raises:
      ValueError: parameters that no rule covers, or a rule that covers nothing; each is named.
    """
    paths = param_paths(params)
    compiled = [(re.compile(pattern), pattern, mode) for pattern, mode in rules]
    labels, used = [], set()
    for path in paths:
        hit = next(((pattern, mode) for expr, pattern, mode in compiled if expr.fullmatch(path)), None)
        labels.append(None if hit is None else hit[1])
        if hit:
            used.add(hit[0])
    missing = [path for path, label in zip(paths, labels, strict=True) if label is None]
    if missing:
        raise ValueError(f"config.optim.trainable: no rule covers {', '.join(missing)}; add ('.*', 'freeze'), say")
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ValueError(f"config.optim.trainable: {unused} cover no parameter; names look like {paths[0]!r}")
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def stop_frozen(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """The parameters, with no gradient to the frozen ones: what only they would need is not computed."""
    labels = trainable_labels(params, rules)
    return jax.tree.map(lambda p, label: p if label == "train" else jax.lax.stop_gradient(p), params, labels)


def make_optimizer(options: OptimOptions, steps: int, params: Any) -> optax.GradientTransformation:
    """The optimizer of a run; frozen parameters have no moments and no update.

    Args:
      options: settings; the paper's are AdamW with (b1, b2, eps) by stage.
      steps: optimizer steps of the whole run, which the schedule spans.
      params: the parameters or their abstract values.
    """
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule(options, steps), options.b1, options.b2, options.eps, weight_decay=options.weight_decay
    )
    labels = trainable_labels(params, options.trainable)
    return optax.partition({"train": optax.chain(clip, adamw), "freeze": optax.set_to_zero()}, labels)
