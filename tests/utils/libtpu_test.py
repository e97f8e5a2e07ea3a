"""libtpu where there is no TPU: JAX leaves it alone, and says nothing. The control: without us it says much."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import needs_tpu_compiler

from qwenla_jax.utils.libtpu import environment, has_tpu, skip_without_tpu

ROOT = Path(__file__).resolve().parents[2]
# Two call other commands; one plans for TPUs and needs libtpu; two are other libraries' and run no JAX.
OTHERS = {"cli/main.py", "cli/convert.py", "cli/fit.py", "bench/transformers_peer.py", "bench/trl_peer.py"}


@pytest.mark.parametrize(
    ("path", "content", "result"),
    [
        ("dev/accel0", "", True),
        ("dev/vfio/0", "", True),
        ("dev/vfio/vfio", "", False),
        ("sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n", True),
        ("sys/bus/pci/devices/0000:00:05.0/vendor", "0x10de\n", False),
        ("etc/hosts", "", False),
    ],
)
def test_a_tpu_is_found_by_its_devices(tmp_path, path, content, result):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(content)
    assert has_tpu(tmp_path) == result


@pytest.mark.parametrize(
    ("tpu", "env", "left"),
    [
        (False, {}, "0"),
        (True, {}, None),
        (False, {"JAX_PLATFORMS": "tpu,cpu"}, None),
        (False, {"JAX_PLATFORMS": "cpu"}, "0"),
        (False, {"TPU_LOAD_LIBRARY": "1"}, "1"),
    ],
)
def test_what_is_set(monkeypatch, tpu, env, left):
    for name in ("TPU_LOAD_LIBRARY", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("qwenla_jax.utils.libtpu.has_tpu", lambda: tpu)
    monkeypatch.setenv("TPU_LOAD_LIBRARY", env.get("TPU_LOAD_LIBRARY", ""))  # so that it is undone
    if "TPU_LOAD_LIBRARY" not in env:
        del os.environ["TPU_LOAD_LIBRARY"]
    skip_without_tpu()
    assert os.environ.get("TPU_LOAD_LIBRARY") == left


def test_variables_are_as_before_even_after_an_error(monkeypatch):
    monkeypatch.setenv("QWENLA_ONE", "a")
    with pytest.raises(KeyError), environment({"QWENLA_ONE": "b", "QWENLA_TWO": "c"}):
        assert (os.environ["QWENLA_ONE"], os.environ["QWENLA_TWO"]) == ("b", "c")
        raise KeyError
    assert os.environ["QWENLA_ONE"] == "a" and "QWENLA_TWO" not in os.environ


def test_every_command_that_runs_jax_calls_it():
    folders = ("launch/bench", "convert", "qwenla_jax/cli")
    scripts = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    mains = [path for path in scripts if "\ndef main(" in path.read_text() and "/".join(path.parts[-2:]) not in OTHERS]
    assert len(mains) == 13
    assert [path.name for path in mains if "\n    skip_without_tpu()\n" not in path.read_text()] == []


@needs_tpu_compiler
@pytest.mark.skipif(has_tpu(), reason="there is a TPU here")
@pytest.mark.parametrize("ours", [True, False])
def test_nothing_is_printed_where_there_is_no_tpu(ours):
    env = {name: value for name, value in os.environ.items() if name not in ("TPU_LOAD_LIBRARY", "JAX_PLATFORMS")}
    code = f"import libtpu, qwenla_jax; {'qwenla_jax.load; ' if ours else ''}import jax; jax.devices()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert ("TPU" in result.stderr) == (not ours), result.stderr
