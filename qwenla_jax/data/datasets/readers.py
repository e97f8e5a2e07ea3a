"""The readers of datasets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from qwenla_jax.data.datasets.geometry3k import geometry3k
from qwenla_jax.data.datasets.llava_cot import llava_cot
from qwenla_jax.data.datasets.mathvision import mathvision
from qwenla_jax.data.datasets.parquet import parquet_questions
from qwenla_jax.data.datasets.polymath import polymath
from qwenla_jax.data.datasets.raw_record import Dataset
from qwenla_jax.data.datasets.scemqa import scemqa
from qwenla_jax.data.datasets.we_math import we_math

READERS: Mapping[str, Callable[[str | Path], Dataset]] = MappingProxyType(
    {
        "we_math": we_math,
        "mathvision": mathvision,
        "scemqa": scemqa,
        "polymath": polymath,
        "geometry3k": geometry3k,
        "llava_cot": llava_cot,
        "parquet": parquet_questions,
    }
)
