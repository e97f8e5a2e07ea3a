"""Meshes of devices that are not there: chips of a torus, as the TPU runtime describes them."""

import dataclasses
import itertools

import pytest

from qwenla_jax.config.shared_options import MeshOptions
from qwenla_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def torus(*sizes):
    places = itertools.product(*(range(size) for size in reversed(sizes)))
    return [Chip(i, tuple(reversed(place))) for i, place in enumerate(places)]


@pytest.mark.parametrize(
    ("sides", "sizes"),
    [((2, 2, 4), (1, 16, 1)), ((2, 2, 4), (2, 4, 2)), ((4, 8, 8), (16, 16, 1)), ((8, 8, 16), (64, 16, 1))],
)
def test_axes_need_not_be_those_of_the_torus(sides, sizes):
    chips = torus(*sides)
    mesh = make_mesh(MeshOptions(*sizes), devices=chips)
    assert mesh.devices.shape == sizes
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(len(chips)))
    # Chips of one fsdp group stand in a box that holds no others.
    for group in mesh.devices.transpose(0, 2, 1).reshape(-1, sizes[1]):
        spans = [max(c) - min(c) + 1 for c in zip(*(chip.coords for chip in group), strict=True)]
        assert spans[0] * spans[1] * spans[2] == sizes[1]
