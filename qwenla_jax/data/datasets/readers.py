"""Datasets by the name that a config gives: the one list of them. A reader is imported when it is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenla_jax.data.datasets.raw_record import Dataset

READERS: Mapping[str, Callable[[str | Path], Dataset]] = MappingProxyType(
    {
        "we_math": lambda path: importlib.import_module("qwenla_jax.data.datasets.we_math").we_math(path),
        "mathvision": lambda path: importlib.import_module("qwenla_jax.data.datasets.mathvision").mathvision(path),
        "scemqa": lambda path: importlib.import_module("qwenla_jax.data.datasets.scemqa").scemqa(path),
        "polymath": lambda path: importlib.import_module("qwenla_jax.data.datasets.polymath").polymath(path),
        "geometry3k": lambda path: importlib.import_module("qwenla_jax.data.datasets.geometry3k").geometry3k(path),
        "llava_cot": lambda path: importlib.import_module("qwenla_jax.data.datasets.llava_cot").llava_cot(path),
        "parquet": lambda path: importlib.import_module("qwenla_jax.data.datasets.parquet").parquet_questions(path),
    }
)
