"""How much memory and processor time a part of a test takes, in a process that other tests have run in."""

import gc
import resource
import sys
import time
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


def slower_than(limit: float, start: float, again: Callable[..., object], *arguments: object) -> bool:
    """Whether what began at `start` (time.thread_time()) took more than `limit` seconds, each of three times.

    A full garbage collection over what other tests of the process left may fall into any call, and takes seconds.
    """
    for _ in range(3):
        if time.thread_time() - start <= limit:
            return False
        gc.collect()
        start = time.thread_time()
        try:
            again(*arguments)
        except Exception:  # the first call has shown what it raises
            pass
    return time.thread_time() - start > limit


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
