"""How much memory and processor time a part of a test takes, in a process that other tests have run in."""

import contextlib
import gc
import math
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFERENCE_S = 0.05  # of `_reference_seconds`, where the limits were set
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


def seconds(work: Callable[..., object], *arguments: object, limit: float) -> float:
    """Processor seconds of a call; beyond `limit` the least of three, by the pace of the machine that limits are for.

    A garbage collection over what other tests of the process left may fall into any call, and a machine that others
    use too may do half as much in a second as it did when the limit was set.
    """
    took = []
    for _ in range(3):
        start = time.thread_time()
        work(*arguments)
        took.append(time.thread_time() - start)
        if took[-1] <= limit:
            return took[-1]
        took[-1] /= max(1, _reference_seconds() / REFERENCE_S)
        if took[-1] <= limit:
            return took[-1]
        gc.collect()
    return min(took)


def takes_linear_time(work: Callable[[Any], object], quarter: Any, whole: Any) -> bool:
    """Whether `work(whole)` takes at most eight times what `work(quarter)` does, by the least of three.

    Quadratic time would be sixteen times. For work that a limit in seconds cannot judge: a library's, or so much that a
    slow machine takes long for it.
    """
    least = [math.inf, math.inf]
    for _ in range(3):
        least = [min(took, seconds(work, of, limit=math.inf)) for took, of in zip(least, (quarter, whole), strict=True)]
        if least[1] <= 8 * least[0]:
            return True
    return False


def slower_than(limit: float, start: float, again: Callable[..., object], *arguments: object) -> bool:
    """Whether what began at `start` (time.thread_time()) took more than `limit` seconds, and again in three tries."""
    if time.thread_time() - start <= limit:
        return False

    def work() -> None:
        with contextlib.suppress(Exception):  # the first call has shown what it raises
            again(*arguments)

    return seconds(work, limit=limit) > limit


def _reference_seconds() -> float:
    """What this machine takes, just now, for a fixed piece of what parsers do: expressions, slices, counting."""
    start = time.thread_time()
    for number in range(400):
        text = f"the answer is {number}, " * 40
        words = re.findall(r"[a-z]+|\d+", text)
        counts: dict[str, int] = {}
        for place, word in enumerate(words):
            counts[word] = counts.get(word, 0) + len(text[place : place + 3])
    return time.thread_time() - start


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
