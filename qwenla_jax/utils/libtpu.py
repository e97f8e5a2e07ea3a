"""When JAX loads libtpu, the TPUs' runtime and compiler, which may be installed where there is no TPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_GOOGLE = "0x1ae0"  # the vendor of a PCI device, by which JAX too finds TPUs


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether this machine may have a TPU: its device files, or any of Google's PCI devices."""
    if any((root / "dev").glob("accel*")) or any((root / "dev" / "vfio").glob("[0-9]*")):
        return True
    vendors = (root / "sys" / "bus" / "pci" / "devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def skip_without_tpu() -> None:
    """Has JAX leave libtpu alone where there is no TPU: it would print warnings and find nothing.

    To be called before JAX opens its devices. Does nothing where TPU_LOAD_LIBRARY is set, or JAX_PLATFORMS names TPUs.
    """
    if "tpu" not in os.environ.get("JAX_PLATFORMS", "") and not has_tpu():
        os.environ.setdefault("TPU_LOAD_LIBRARY", "0")


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block runs; then all are as before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
