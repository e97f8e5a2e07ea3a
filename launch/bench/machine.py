"""What a measurement ran on, and how fast that is at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores, the load average of the last minute, devices, and versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].strip() if models else name
    return {
        "cpu": name,
        "cores": cores(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
    }


def peaks(
    matrix: tuple[int, ...] = (1024, 2048), line: int = 2**25, repeats: int = 8, dtype: str = "float32"
) -> dict[str, float]:
    """What the first device reaches now, the best of `repeats` tries.

    Returns:
      `matrix_gflops`, 1e9 operations a second in products of square matrices of these sides and this type, and
      `memory_gb_s`, 1e9 bytes a second, of `line` float32 numbers read, changed and written.
    """
    # In place: new memory costs more to get from the system than to write.
    square, add = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1, donate_argnums=0)
    rates = []
    for n in matrix:
        x = jax.random.normal(jax.random.key(0), (n, n), dtype)
        rates.append(2 * n**3 / _seconds(square, x, repeats) / 1e9)
    x = jnp.zeros((line,), jnp.float32)
    return {"matrix_gflops": max(rates), "memory_gb_s": 2 * x.nbytes / _seconds(add, x, repeats, chain=True) / 1e9}


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int, chain: bool = False) -> float:
    """The best of several tries, on `x` or (`chain`) each on what the one before gave."""
    y = jax.block_until_ready(function(x))
    result = []
    for _ in range(repeats):
        start = time.perf_counter()
        y = jax.block_until_ready(function(y if chain else x))
        result.append(time.perf_counter() - start)
    return min(result)
