"""The recipes by name: `--config=brpo:7b` is preset 7b of qwenla_jax/recipes/brpo.py."""

from __future__ import annotations

from pathlib import Path

from ml_collections import config_dict

from qwenla_jax.recipes import base, brpo, cold_start, distill, sft_copy, sft_route

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


def recipe_file(name: str) -> Path | None:
    """The file of a recipe; None for a name that is none."""
    return Path(__file__).with_name(f"{name}.py") if name in RECIPES else None
