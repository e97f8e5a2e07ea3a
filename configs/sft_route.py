"""Stage 4 with ROUTE: as `configs/sft_copy.py`, with the half of the visual tokens that the answer so far attended to
most (paper, section Visual re-attention).
"""

import importlib.util
from pathlib import Path

from ml_collections import config_dict

from qwenla_jax.train.options import ReattentionOptions


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none."""
    spec = importlib.util.spec_from_file_location("sft_copy", Path(__file__).with_name("sft_copy.py"))
    sft_copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sft_copy)
    return sft_copy.options(preset, ReattentionOptions(mode="route", share=0.5), "sft_route.py")
