"""Settings by name: `--config=brpo:7b` is preset 7b of qwenla_jax/recipes/brpo.py, `--config=FILE.json` a file's."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ml_collections import config_dict

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError, build, to_config_dict
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.recipes import base, brpo, cold_start, distill, sft_copy, sft_route
from qwenla_jax.utils import json_files

RECIPES = {
    "base": base,
    "brpo": brpo,
    "cold_start": cold_start,
    "distill": distill,
    "sft_copy": sft_copy,
    "sft_route": sft_route,
}


def get_config(name: str, preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a recipe's preset, or of a JSON file, in which keys that are left out have their defaults.

    Raises:
      ConfigError: the file cannot be read, or has unknown keys or impossible values.
      ValueError, KeyError: there is no such preset; no such recipe.
    """
    if not name.endswith(".json"):
        return RECIPES[name].get_config(preset)
    try:
        saved, problem = json_files.read_object(Path(name)), None
    except (ValueError, OSError) as error:
        saved, problem = {}, str(error)
    if problem is not None:  # raised here, not above: the command line shows the innermost error
        raise ConfigError(f"--config: {problem}")
    return to_config_dict(build(DistillOptions if "sampling" in saved else RunOptions, saved))


def recipe_path(name: str, preset: str) -> str:
    """What `--config=NAME:PRESET` opens, as PATH:ARGUMENT: of a recipe or a JSON file, else as it is."""
    if name.endswith(".json") and Path(name).is_file():
        return f"{__file__}:{name}"
    path = Path(__file__).with_name(f"{name}.py") if name in RECIPES and not Path(name).is_file() else name
    return f"{path}:{preset}" if preset else str(path)


def listing() -> str:
    """Every recipe with its presets and what it is for, a line each."""
    lines = []
    for name, recipe in RECIPES.items():
        summary = textwrap.shorten((recipe.__doc__ or "").partition("\n\n")[0], 100, placeholder=" ...")
        lines.append(f"{name:<12}{', '.join(recipe.PRESETS)}\n{'':<12}{summary}")
    return "\n".join(lines)
