"""What a recipe offers by preset: the embedded size, the paper's settings at the released sizes, and others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

from qwenla_jax.config.schema import to_config_dict

SIZES = ("3b", "7b", "32b", "72b", "qwen3vl-2b", "qwen3vl-4b", "qwen3vl-8b", "qwen3vl-32b")
Presets = Mapping[str, Callable[[], Any]]


def presets(tiny: Callable[[], Any], large: Callable[[str], Any] | None = None, **others: Callable[[], Any]) -> Presets:
    """What makes the settings of each preset.

    Args:
      tiny: makes those of the embedded size.
      large: makes those of one of `SIZES`; None where there are none.
      **others: make those of further presets.
    """
    sizes = {size: functools.partial(large, size) for size in SIZES} if large else {}
    return {"tiny": tiny, **sizes, **others}


def pick(recipe: str, known: Presets, preset: str) -> config_dict.ConfigDict:
    """The settings of a recipe's preset. Raises ValueError for a preset that is none."""
    if preset not in known:
        raise ValueError(f"recipe {recipe}: there is no preset {preset!r}; valid: {', '.join(known)}")
    return to_config_dict(known[preset]())
