"""The device mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qwenla_jax.config.shared_options import MeshOptions

AXES = ("data", "fsdp", "tensor")


def make_mesh(options: MeshOptions, num_devices: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices.

    The axes are Auto: the compiler derives shardings from the table `sharding.RULES`.

    Args:
      options: the axes' sizes.
      num_devices: only the first so many devices.
      devices: other devices, such as those of a topology that programs are compiled for.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices()[:num_devices] if devices is None else devices
    # `jax.make_mesh` raises where an axis covers a part of a torus's axis, as 16 of 4 x 8 x 8 chips.
    placed = mesh_utils.create_device_mesh(mesh_sizes(options, len(devices)), devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(options: MeshOptions, total: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor, -1 resolved. Raises ValueError where they do not multiply to `total`."""
    sizes = [options.data, options.fsdp, options.tensor]
    if -1 in sizes:
        rest = -math.prod(sizes)
        if total % rest:
            raise ValueError(f"config.mesh: {total} devices do not divide by {rest} (data, fsdp, tensor = {sizes})")
        sizes[sizes.index(-1)] = total // rest
    if math.prod(sizes) != total:
        raise ValueError(f"config.mesh: data, fsdp, tensor = {sizes} do not multiply to the {total} devices there are")
    return sizes[0], sizes[1], sizes[2]
