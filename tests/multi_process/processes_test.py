"""Two processes on one machine against one process with two devices, and both where one is told to end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUESTIONS = [
    "--config.data.batch_size=4", "--config.eval.every=0", "--config.eval.final_size=4", "--config.eval.batch_size=4",
    "--config.checkpoint.every=1", "--config.steps=3",
]  # fmt: skip
BRPO = ["--config=configs/brpo.py", "--config.brpo.group_size=4", "--config.reattention.mode=copy", *QUESTIONS]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def begin(workdir, count, args):
    """The processes of a run, with two devices in all."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(2 // count), "PYTHONPATH": str(ROOT)}
    port = free_port()
    apart = ["--distributed", f"--coordinator=localhost:{port}", f"--num_processes={count}"] if count > 1 else []
    return [
        subprocess.Popen(
            [sys.executable, "launch/train.py", *args, f"--workdir={workdir}"]
            + ([*apart, f"--process_id={number}"] if apart else []),
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def end(processes, status=0):
    message = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(message)[-4000:]
    return message


def metrics(workdir):
    """Numbers by step, but for those that tell of time and place."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    apart = ("timing_s", "perf", "memory", "compile")
    return [{key: value for key, value in row.items() if not any(part in key for part in apart)} for row in rows]


def state(workdir, step):
    """Every array of a checkpoint, on this process's one device."""
    with ocp.StandardCheckpointer() as reader:
        folder = workdir / "checkpoints" / str(step) / "state"
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        result = reader.metadata(folder).item_metadata.tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), result)
        return jax.tree_util.tree_flatten_with_path(reader.restore(folder, like))[0]


def test_processes_agree():
    port = free_port()
    command = [sys.executable, str(HERE / "agree.py"), str(port)]
    both = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(2)
    ]
    assert all("agreed" in message for message in end(both))


@pytest.mark.slow
def test_two_processes_are_one_also_when_one_is_told_to_end(tmp_path):
    """BRPO with insertions: sampled, rewarded, updated, evaluated and saved; SIGTERM to the second process alone."""
    end(begin(tmp_path / "one", 1, BRPO))
    both = begin(tmp_path / "two", 2, BRPO)
    path = tmp_path / "two" / "metrics.jsonl"
    while not (path.is_file() and '"step": 1' in path.read_text()):
        assert all(process.poll() is None for process in both), end(both)
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    message = end(both, 143)
    assert (
        "the same command continues from there" in message[0] and "the same command continues from there" in message[1]
    )
    message = end(begin(tmp_path / "two", 2, BRPO))
    assert "resumed after step" in message[0] and "step 3/3" in message[0] and "step 3/3" not in message[1]
    want, got = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in got] == [row["step"] for row in want] == [0, 1, 2, 3, 3]
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([b[key] for key in a], list(a.values()), rtol=1e-5, atol=1e-7)
    assert any(row.get("train/reattention/inserted_mean", 0) > 0 for row in want)
    old, new = state(tmp_path / "one", 3), state(tmp_path / "two", 3)
    assert [path for path, _ in old] == [path for path, _ in new] and len(old) > 50
    for (path, value), (_, other) in zip(old, new, strict=True):
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6, err_msg=str(path))
    # One writer: what belongs to a run is there once.
    assert not (tmp_path / "two" / "hf").exists() and (tmp_path / "one" / "hf").is_dir()
    kept = [sorted(path.stem for path in (tmp_path / "two" / name).iterdir()) for name in ("checksums", "checkpoints")]
    assert kept[0] == kept[1] == ["2", "3"]
