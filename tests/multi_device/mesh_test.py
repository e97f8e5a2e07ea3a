"""Eight simulated devices, in their own process, against one.

Each axis alone is tried by one way of looking again, all together by COPY; `QWENLA_MESHES=all` tries all by both, and
more of the engine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ALL = ["8,1,1", "1,8,1", "1,1,8", "2,2,2"] if os.environ.get("QWENLA_MESHES") == "all" else None


def assert_equal(script, *arguments):
    """Runs a script, which ends with an error or prints "equal"."""
    command = [sys.executable, str(HERE / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "equal" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "meshes"),
    [
        ("copy", ALL or ["1,8,1", "2,2,2"]),
        ("route", ALL or ["8,1,1", "1,1,8"]),
        ("qwen3_vl", ALL or ["2,2,2"]),
        ("lora", ["2,2,2"]),  # text alone, with adapters, sampled with int8 kernels
    ],
)
def test_a_mesh_computes_what_one_device_does_and_sends_what_it_must(way, meshes):
    assert_equal("compare.py", way, *meshes)


@pytest.mark.slow
def test_kernels_work_on_each_devices_rows_and_heads():
    assert_equal("kernels.py")


@pytest.mark.slow
def test_the_engine_gives_the_same_rows():
    assert_equal("engine.py", *(ALL or ["2,2,2"]))


@pytest.mark.slow
def test_weights_gathered_once_sample_the_same():
    assert_equal("gather.py")
