"""Oracle: the json module in strict mode, and event files read back through tensorboardX's protocol buffers."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from event_files import events
from tensorboardX.proto.event_pb2 import SessionLog

from qwenla_jax.run import metrics
from qwenla_jax.run.metrics import METRICS_FILE, MetricWriter, read_metrics, to_json_line, truncate
from qwenla_jax.utils.progress import Progress


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def scalars(workdir):
    return [(v.tag, e.step, v.simple_value) for e in events(workdir) for v in e.summary.value]


def test_written_and_read_back(tmp_path):
    stream = io.StringIO()
    console = Progress(3, stream=stream, terminal=False)
    with MetricWriter(tmp_path / "run", progress=console) as writer:
        writer.write(1, {"train/reward": np.float32(1.5), "train/kl": np.array(0.25)})
        writer.write(2, {"train/reward": 2, "train/rewards/format/mean": 1.0})
    lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
    assert lines[0].startswith('{"step": 1, ')
    assert [strict(line) for line in lines] == [
        {"step": 1, "train/reward": 1.5, "train/kl": 0.25},
        {"step": 2, "train/reward": 2.0, "train/rewards/format/mean": 1.0},
    ]
    assert read_metrics(tmp_path / "run" / METRICS_FILE) == [strict(line) for line in lines]
    assert scalars(tmp_path / "run") == [
        ("train/reward", 1, 1.5),
        ("train/kl", 1, 0.25),
        ("train/reward", 2, 2.0),
        ("train/rewards/format/mean", 2, 1.0),
    ]
    assert stream.getvalue().count("\n") == 2


def test_nonfinite_stays_json():
    row = strict(to_json_line(3, {"a": math.nan, "b": -math.inf, "c": 1, "d": np.float32("inf")}))
    assert row == {
        "step": 3,
        "a": None,
        "b": None,
        "c": 1.0,
        "d": None,
        "nonfinite": {"a": "nan", "b": "-inf", "d": "inf"},
    }


@pytest.mark.parametrize("bad", [{"a": "x"}, {"a": np.zeros(2)}, {"step": 1}, {"nonfinite": 1}, {"a": None}])
def test_refuses_what_is_not_a_number_and_writes_nothing(tmp_path, bad):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=next(iter(bad))):
            writer.write(1, {"good": 1.0, **bad})
    assert (tmp_path / METRICS_FILE).read_text() == ""


def test_resume_leaves_no_step_twice(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {"x": step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "x"')  # a crash in the middle of a line
    with MetricWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"x": 40})
    assert read_metrics(tmp_path / METRICS_FILE) == [
        {"step": s, "x": x} for s, x in [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    ]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".new")] == []
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [4]  # TensorBoard forgets events from this step on
    assert ("x", 4, 40.0) in scalars(tmp_path)


def test_fresh_run_in_an_old_folder_forgets_it(tmp_path):
    for value in (1, 2):
        with MetricWriter(tmp_path) as writer:
            writer.write(0, {"x": value})
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 0, "x": 2.0}]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize("bad", ["oops", '{"x": 1}', '{"step": "1"}', "[1]", "", "[" * 10**5])
def test_truncate_names_the_broken_line(tmp_path, bad):
    path = tmp_path / METRICS_FILE
    text = f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{METRICS_FILE}:2: (expected|not JSON|nested).* delete the line"):
        truncate(path, 1)
    assert path.read_text() == text


def test_truncate_counts(tmp_path):
    path = tmp_path / METRICS_FILE
    assert truncate(path, 5) == 0
    path.write_text('{"step": 1}\n{"step": 7}\n{"step": 2}\n{"st')
    assert truncate(path, 5) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_other_processes_write_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", primary=False) as writer:
        writer.write(1, {"x": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_keeps_the_steps_of_an_earlier_one(tmp_path):
    for value in (1.0, 2.0, 3.0):
        with MetricWriter(tmp_path) as writer:
            writer.write(1, {"x": value})
    kept = {path.name: read_metrics(path)[0]["x"] for path in sorted(tmp_path.glob("metrics*.jsonl"))}
    assert kept == {"metrics-1.jsonl": 1.0, "metrics-2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_a_full_disk_does_not_end_a_run_and_loses_no_line(tmp_path):
    """The kernel refuses what goes beyond 600 bytes of a file, then takes it again."""
    code = f"""
import io, resource, sys
from pathlib import Path
from qwenla_jax.run.metrics import MetricWriter, read_metrics
from qwenla_jax.utils.progress import Progress
console = io.StringIO()
none = resource.RLIM_INFINITY
with MetricWriter({str(tmp_path)!r}, progress=Progress(60, stream=console, terminal=False)) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, none))
    for step in range(1, 51):
        writer.write(step, {{f"some/metric_{{n}}": step / 7 for n in range(20)}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (none, none))
    for step in range(51, 61):
        writer.write(step, {{"other": 1.0}})
rows = read_metrics(Path({str(tmp_path)!r}) / "metrics.jsonl")
print([row["step"] for row in rows] == list(range(1, 61)), rows[30]["some/metric_3"] == 31 / 7)
said = [line for line in console.getvalue().splitlines() if not line.startswith("step ")]
print(len(said), *said, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    message = done.stdout.splitlines()
    assert done.returncode == 0 and message[0] == "True True", done.stdout + done.stderr
    assert message[1] == "2" and "File too large; metrics wait in memory" in message[2]
    assert "TensorBoard: File too large; it ends here" in message[3]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (KeyError("no run"), "KeyError: 'no run'")],
)
def test_a_listed_sink_gets_the_numbers_and_its_error_ends_it_alone(error, reason, tmp_path, monkeypatch):
    class Listed:
        name = "Listed"

        def __init__(self, workdir, last_step, settings):
            self.calls = [(workdir, last_step, settings)]
            sinks.append(self)

        def write(self, step, numbers):
            self.calls.append((step, dict(numbers)))
            if step == 2 and self is sinks[0]:
                raise error

        def close(self):
            self.calls.append("close")

    sinks, console = [], io.StringIO()

    def failing(*args):
        raise error

    monkeypatch.setattr(metrics, "SINKS", {"one": Listed, "two": Listed, "three": failing})
    progress, names = Progress(3, stream=console, terminal=False), ("one", "two", "three")
    with MetricWriter(tmp_path, resume_step=0, progress=progress, sinks=names, settings={"a": 1}) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"x": np.float32(step)})
    one, two, three = ((step, {"x": float(step)}) for step in (1, 2, 3))
    assert sinks[0].calls == [(tmp_path, 0, {"a": 1}), one, two]
    assert sinks[1].calls == [(tmp_path, 0, {"a": 1}), one, two, three, "close"]
    assert f"Listed: {reason}; it ends here" in console.getvalue()
    assert f"three: {reason}; the run continues without it" in console.getvalue()
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]
