"""What a measurement ran on. Oracles: a clock that is known, and what the operating system says."""

import itertools
import json
import os
import time

import jax
import pytest

from launch.bench.machine import cores, machine, peaks


def test_peaks_are_operations_and_bytes_over_seconds(monkeypatch):
    ticks = itertools.count(0.0, 0.5)  # every try takes half a second
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    result = peaks(matrix=(8, 16), line=1000, repeats=2)
    assert result["matrix_gflops"] == pytest.approx(2 * 16**3 / 0.5 / 1e9)
    assert result["memory_gb_s"] == pytest.approx(2 * 4000 / 0.5 / 1e9)


def test_machine_names_what_is_there():
    result = json.loads(json.dumps(machine()))
    assert result["cpu"] and 1 <= result["cores"] == cores() <= os.cpu_count()
    assert result["versions"]["jax"] == jax.__version__
    assert len(result["devices"]) == jax.device_count()
