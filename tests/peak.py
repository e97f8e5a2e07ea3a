"""How much memory a part of a test takes at its most, in a process that other tests have run in."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth() -> Callable[[], int]:
    """Marks the memory of now; what is returned tells by how many MB the largest since then was above it."""
    if RESET.exists():
        RESET.write_text("5")  # the largest size so far is forgotten
        before = _kilobytes("VmRSS")
        return lambda: (_kilobytes("VmHWM") - before) >> 10
    unit = 20 if sys.platform == "darwin" else 10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> unit


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
