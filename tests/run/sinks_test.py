"""Every sink is read back by its own library, over a kill and a restart: no number twice, none missing.

Oracle: tensorboardX's protocol buffers, trackio's store. For wandb: launch/check_wandb.py.
"""

import importlib.util
import io
import json
import sys

import numpy as np
import pytest
from event_files import events
from PIL import Image

from qwenla_jax.config import checks
from qwenla_jax.config.run_options import LogOptions, RunOptions
from qwenla_jax.run.completions import Completion
from qwenla_jax.run.metrics import SINKS, MetricWriter

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
QUESTION = (Image.fromarray(PIXELS),), "how | many?", "2"
ROWS = [
    Completion(*QUESTION, "<REFLECTION>a\nb</REFLECTION>", {"format": 1.0}, 1.5, -0.5),
    Completion(*QUESTION, "c", {}, float("nan"), 0.0, "no rewards"),
]
SETTINGS = {"seed": 3, "data": {"x": None}}


def killed_and_resumed(workdir, sink):
    """Killed after step 4, resumed from the checkpoint of step 2, killed after step 3, and resumed from there again."""
    for resume, steps in ((None, (1, 2, 3, 4)), (2, (3,)), (2, (3, 4, 5))):
        with MetricWriter(workdir, resume_step=resume, sinks=[sink], settings=SETTINGS) as writer:
            for step in steps:
                writer.write(step, {"train/reward": step / 4})
                if step != 4 or resume:  # before the evaluation of step 4, the first kill
                    writer.write(step, {"eval/accuracy": step / 8})
                    writer.show(step, ROWS)


def test_tensorboard(tmp_path):
    killed_and_resumed(tmp_path, "tensorboard")
    kept = {}
    for event in events(tmp_path):  # in their order, as TensorBoard reads them
        if event.session_log.status:
            kept = {key: value for key, value in kept.items() if key[1] < event.step}
        for value in event.summary.value:
            assert (value.tag, event.step) not in kept
            kept[value.tag, event.step] = value
    for step in range(1, 6):
        assert kept["train/reward", step].simple_value == step / 4
        assert kept["eval/accuracy", step].simple_value == step / 8
        image = Image.open(io.BytesIO(kept["completions/question_1", step].image.encoded_image_string))
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
        lines = kept["completions/text_summary", step].tensor.string_val[0].decode().splitlines()
        assert [line.count("|") for line in lines] == [8] * 4  # seven columns
        assert "&lt;REFLECTION&gt;a<br>b&lt;/REFLECTION&gt;" in lines[2] and "| nan |" in lines[3]
    assert not [key for key in kept if key[0] == "completions/question_2"]


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when it is imported, as TRL may have done
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("trackio")
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    monkeypatch.chdir(tmp_path)
    killed_and_resumed(tmp_path / "run", "trackio")
    (run,) = Api().runs("qwenla_jax")
    assert run.name.startswith("run-") and run.config["seed"] == 3 and run.config["data"] == {"x": None}
    logs = SQLiteStorage.get_logs(run.project, run.name)
    for name, scale in (("train/reward", 4), ("eval/accuracy", 8)):
        values = [(row["step"], row[name]) for row in logs if name in row]
        assert values == [(step, step / scale) for step in range(1, 6)]
    tables = [(row["step"], row["completions"]["_value"]) for row in logs if "completions" in row]
    assert [step for step, _ in tables] == [1, 2, 3, 4, 5]
    for _, (first, second) in tables:
        assert (first["response"], first["format"], first["advantage"]) == ("<REFLECTION>a\nb</REFLECTION>", 1.0, -0.5)
        assert second["note"] == "no rewards"
        image = Image.open(MEDIA_DIR / first["images"][0]["file_path"])
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PIXELS)
    # A run that begins again from nothing is another run there.
    with MetricWriter(tmp_path / "run", sinks=["trackio"]) as writer:
        writer.write(1, {"train/reward": 9.0})
    assert len(list(Api().runs("qwenla_jax"))) == 2


def test_the_setting_names_the_sinks_and_a_missing_one_is_refused(monkeypatch):
    field = next(field for field in LogOptions.__dataclass_fields__.values() if field.name == "sinks")
    assert set(field.metadata["choices"]) == set(SINKS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problems = list(checks.paths(RunOptions(log=LogOptions(sinks=("tensorboard", "wandb")))))
    assert problems == ["config.log.sinks: wandb is not installed; the extra `wandb` brings it"]


def test_the_file_of_what_was_sent_may_be_broken(tmp_path):
    from qwenla_jax.run.sinks.sink import AppendOnly

    class Service:
        def log(self, values, step):
            sent.append((step, values))

    for content in ("", "[]", '{"step": "x"}', '{"step": 1, "names": 3, "id": "i"}'):
        sent = []
        (tmp_path / "sent.json").write_text(content)
        sink = AppendOnly(tmp_path / "sent.json", 5)
        sink._run = Service()
        sink.write(1, {"a": 1.0})
        assert sent == [(1, {"a": 1.0})] and json.loads((tmp_path / "sent.json").read_text())["step"] == 1
