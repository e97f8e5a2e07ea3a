"""What a recipe offers by preset: the embedded size, and the paper's settings at the released sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from qwenla_jax.config.schema import to_config_dict

SIZES = ("tiny", "3b", "7b", "32b", "72b")


def settings_of(
    recipe: str, preset: str, tiny: Callable[[], Any], large: Callable[[str], Any] | None = None
) -> config_dict.ConfigDict:
    """The settings of a recipe's preset.

    Args:
      recipe, preset: their names.
      tiny: makes the settings of the preset tiny.
      large: makes those of the others; None where there are none.

    Raises:
      ValueError: a preset that the recipe does not have.
    """
    valid = SIZES if large else SIZES[:1]
    if preset not in valid:
        raise ValueError(f"recipe {recipe}: there is no preset {preset!r}; valid: {', '.join(valid)}")
    return to_config_dict(large(preset) if large and preset != "tiny" else tiny())
