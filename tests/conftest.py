"""Fixtures shared by all tests."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# For programs that run for milliseconds: a small BRPO run took 37 s of processor time with none of the two, 25 with the
# first, 40 with the second and 13 with both. What is computed stays the same but for the rounding of sums.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Programs compile fast, and once for all processes of a test session: most of the suite's time is compiling.

    Flags that stand in XLA_FLAGS already are kept and come last, so that they win. A version of XLA that lacks one of
    ours would end every process that names it, so one process tries them first.
    """
    if not hasattr(config, "workerinput"):
        flags = f"{COMPILE_FAST} {os.environ.get('XLA_FLAGS', '')}".strip()
        trial = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(trial, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0:
            os.environ["XLA_FLAGS"] = flags
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
