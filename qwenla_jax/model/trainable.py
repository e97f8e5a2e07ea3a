"""Which parameters train: labels by regular expression, and the trained part of a tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from qwenla_jax.model.layers import LORA_SCALE
from qwenla_jax.model.lora import adapted_kernels, is_adapter

# The default rule, for what no other rule covers.
REST = (".*", "train")

# Parameters with a row for each token, and the axis of these rows.
VOCABULARY_AXIS = {"decoder/embed/embedding": 0, "decoder/lm_head/kernel": 1}


def param_name(path: Any) -> str:
    """A key path of a parameter tree as `decoder/layers/attn/q/kernel`."""
    return "/".join(str(key.key) for key in path)


def param_paths(params: Any) -> list[str]:
    """Names of all parameters, `decoder/layers/attn/q/kernel`, in the tree's order."""
    return [param_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def trainable_labels(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """ "train", "freeze" or "tags" for every parameter, by the first rule whose expression matches its whole name.

    Adapters are trained, whatever the rules say: these are for the base model. Where there are adapters, the rule
    `(".*", "train")`, the default for what no other rule covers, freezes the base model.

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
        labels.append("freeze" if hit == REST and adapted else hit and hit[1])
        if hit:
            used.add(hit[0])
    if missing := [path for path, label in zip(paths, labels, strict=True) if label is None]:
        raise ValueError(f"config.optim.trainable: no rule covers {', '.join(missing)}; add ('.*', 'freeze'), say")
    if wrong := [p for p, label in zip(paths, labels, strict=True) if label == "tags" and p not in VOCABULARY_AXIS]:
        raise ValueError(
            f"config.optim.trainable: 'tags' for {', '.join(wrong)}; only {', '.join(VOCABULARY_AXIS)} have such rows"
        )
    if both := [p for p, label in zip(paths, labels, strict=True) if p in adapted and label != "freeze"]:
        raise ValueError(f"config.optim.trainable: 'train' for {', '.join(both)}, but config.lora gives it an adapter")
    if unused := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(f"config.optim.trainable: {unused} cover no parameter; names look like {paths[0]!r}")
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def trained_part(tree: Any, labels: Any) -> Any:
    """The leaves of a tree, or of such a part, whose label is not "freeze": what has gradients and moments."""
    kind = flatten_dict(labels)
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if kind[path] != "freeze"})
