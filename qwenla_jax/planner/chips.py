"""Accelerators in numbers, and the slices they come in."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

from qwenla_jax.utils.libtpu import environment


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, by its maker's data sheet.

    Attributes:
      name: as in a topology's name.
      hbm_bytes: memory.
      flops: bfloat16 operations a second, dense, at the peak.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that it sends to its neighbours, all links together; half of what the sheets give
        for both directions.
      slices: topologies that can be had, ascending; for GPUs counts of devices.
      source: where the numbers are from.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    slices: tuple[str, ...]
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether programs can be compiled for it without one."""
        return self.name.startswith("v")


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_COUNTS = ("1", "2", "4", "8", "16", "32", "64", "128", "256")
CHIPS = (
    Chip("v5e", 16e9, 197e12, 819e9, 200e9, _FLAT, "https://cloud.google.com/tpu/docs/v5e"),
    Chip("v5p", 95 * 2**30, 459e12, 2765e9, 600e9, _CUBE, "https://cloud.google.com/tpu/docs/v5p"),
    Chip("v6e", 32e9, 918e12, 1638e9, 400e9, _FLAT, "https://cloud.google.com/tpu/docs/v6e"),
    Chip("h100", 80e9, 989e12, 3350e9, 450e9, _COUNTS, "https://www.nvidia.com/en-us/data-center/h100/"),
    Chip("h200", 141e9, 989e12, 4800e9, 450e9, _COUNTS, "https://www.nvidia.com/en-us/data-center/h200/"),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind that work together; `shape` is `2x2x4`, or a count of GPUs."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        """As it is written on a command line."""
        return f"{self.chip.name}:{self.shape}"

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(int(side) for side in self.shape.split("x"))


def chip(name: str) -> Chip:
    """The chip of a name. Raises ValueError where there is none."""
    for one in CHIPS:
        if one.name == name:
            return one
    raise ValueError(f"topology: no chip {name!r} is known; valid: {', '.join(one.name for one in CHIPS)}")


def parse_topology(text: str) -> Topology:
    """`v5p:2x2x4` or `h200:8`. Raises ValueError naming what is wrong with any other text."""
    name, colon, shape = text.partition(":")
    sides = shape.split("x")
    if not colon or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"topology: got {text!r}, expected CHIP:SHAPE such as v5p:2x2x4, or h200:8")
    one = chip(name)
    wanted = len(one.slices[0].split("x"))
    if len(sides) != wanted:
        example = f"{name}:{one.slices[2]}"
        raise ValueError(f"topology: {text!r} has {len(sides)} sides, but {name} slices have {wanted}, as {example}")
    return Topology(one, shape)


def slices(one: Chip) -> list[Topology]:
    """The slices of a chip, the smallest first."""
    return [Topology(one, shape) for shape in one.slices]


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, none of which need exist: programs can be compiled for them, not run.

    Raises:
      ModuleNotFoundError: the TPU compiler is not installed.
      ValueError: the compiler does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for a TPU needs its compiler: pip install 'qwenla_jax[fit]'")
    # Without these the library asks a metadata server, which only a TPU's machine has, and waits.
    message = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    message |= {"TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{topology.chips}"}
    # It is to compile and opens no TPU, so it needs no lock, which one process of a machine could hold.
    unlocked = {"TPU_LOAD_LIBRARY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    try:
        with environment({name: os.environ.get(name, value) for name, value in message.items()} | unlocked):
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:  # the runtime's own type
        raise ValueError(f"topology: {topology.name} is not known to the TPU compiler: {error}") from error
