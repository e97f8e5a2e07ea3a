"""Fixtures shared by all tests."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from qwenla_jax.utils.libtpu import skip_without_tpu

# For programs that run for milliseconds: a small BRPO run took 37 s of processor time with none of the two, 25 with the
# first, 40 with the second and 13 with both. What is computed stays the same but for the rounding of sums.
COMPILE_FAST = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def runs_with(flags: Sequence[str]) -> bool:
    """Whether this XLA has the flags; one that it lacks would end every process, so a process of its own tries them."""
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(trial, env=env, capture_output=True).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Programs compile fast, and once for all processes of a test session: most of the suite's time is compiling.

    Flags that stand in XLA_FLAGS already are kept and come last, so that they win.
    """
    skip_without_tpu()
    if not hasattr(config, "workerinput"):
        flags = COMPILE_FAST if runs_with(COMPILE_FAST) else [flag for flag in COMPILE_FAST if runs_with([flag])]
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
        folder = tempfile.TemporaryDirectory(prefix="qwenla_jax_compiled_")
        config.add_cleanup(folder.cleanup)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder.name)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party data with known answers, which is not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the third-party test data is not at {path}")
    return path
