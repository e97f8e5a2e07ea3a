"""The recipes by name: `--config=brpo:7b` is preset 7b of qwenla_jax/recipes/brpo.py."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path

from ml_collections import config_dict

from qwenla_jax.recipes import base, brpo, cold_start, distill, settings_file, sft_copy, sft_route
from qwenla_jax.recipes.presets import SIZES

RECIPES = {
    "base": base,
    "brpo": brpo,
    "cold_start": cold_start,
    "distill": distill,
    "sft_copy": sft_copy,
    "sft_route": sft_route,
}


def get_config(name: str, preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a recipe's preset. Raises ValueError for a preset, and KeyError for a name, that is none."""
    return RECIPES[name].get_config(preset)


def recipe_path(name: str, preset: str) -> str:
    """What `--config=NAME:PRESET` opens, as PATH:ARGUMENT: of a recipe or a JSON file, else as it is."""
    if name.endswith(".json") and Path(name).is_file():
        return f"{settings_file.__file__}:{name}"
    path = Path(__file__).with_name(f"{name}.py") if name in RECIPES and not Path(name).is_file() else name
    return f"{path}:{preset}" if preset else str(path)


def listing() -> str:
    """Every recipe with its presets and what it is for, a line each."""
    lines = []
    for name, recipe in RECIPES.items():
        presets = []
        for preset in SIZES:
            with contextlib.suppress(ValueError):
                recipe.get_config(preset)
                presets.append(preset)
        summary = textwrap.shorten((recipe.__doc__ or "").partition("\n\n")[0], 100, placeholder=" ...")
        lines.append(f"{name:<12}{', '.join(presets)}\n{'':<12}{summary}")
    return "\n".join(lines)
