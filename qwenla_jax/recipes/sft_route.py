"""Stage 4 with ROUTE: as `configs/sft_copy.py`, with the half of the visual tokens that the answer so far attended to
most (paper, section Visual re-attention).
"""

from ml_collections import config_dict

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.recipes import sft_copy
from qwenla_jax.recipes.presets import pick

PRESETS = sft_copy.presets_with(ReattentionOptions(mode="route", keep_ratio=0.5))


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none."""
    return pick("sft_route", PRESETS, preset)
