"""Whole runs on a small scale: files, resuming, and refusing before anything heavy."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import (
    BrpoOptions,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LogOptions,
    OptimOptions,
    RewardOptions,
    RunOptions,
)
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.run.checkpoints import Checkpoints
from qwenla_jax.train.loop import RunRefused, rate_change, run

ROOT = Path(__file__).resolve().parents[2]
SMALL = RunOptions(
    stage="brpo",
    steps=4,
    data=DataOptions(batch_size=2, max_response_tokens=8, max_prompt_tokens=64),
    optim=OptimOptions(learning_rate=1e-2),
    brpo=BrpoOptions(group_size=2),
    # Eight tokens hold no right answer; with the balance alone their rewards still differ.
    rewards=RewardOptions(target_length=4.0),
    eval=EvalOptions(every=2, size=4, final_size=4, batch_size=4),
    checkpoint=CheckpointOptions(every=2, keep=3),
    log=LogOptions(completions_every=50, completions_rows=4),  # steps 1, 2 (evaluation) and 4 (the last)
)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def comparable(record):
    return {key: value for key, value in record.items() if "timing" not in key and "perf" not in key}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    run(SMALL, workdir)
    return workdir


def test_a_run_leaves_everything(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"metrics.jsonl", "tensorboard", "checkpoints", "completions", "evaluations", "hf"} <= names
    train = [line for line in lines(uninterrupted) if "train/reward" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    wanted = {
        "train/reward", "train/rewards/format/mean", "train/rewards/accuracy/mean", "train/rewards/balance/mean",
        "train/frac_reward_zero_std", "train/kl", "train/entropy", "train/clip_ratio/low_mean",
        "train/clip_ratio/high_mean", "train/completions/mean_length", "train/completions/clipped_ratio",
        "train/reflection/count_mean", "train/reflection/tokens_mean", "train/timing_s/step", "train/timing_s/rollout",
        "train/loss", "train/grad_norm", "train/learning_rate",
    }  # fmt: skip
    assert wanted <= set(train[0])
    assert abs(train[0]["train/ratio_mean"] - 1) < 1e-5 and train[0]["train/sampling_logp_difference"] < 1e-4
    evaluations = [line for line in lines(uninterrupted) if "eval/accuracy" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    pages = sorted(path.name for path in (uninterrupted / "completions").iterdir())
    assert pages == ["index.html", "step_000001.html", "step_000002.html", "step_000004.html"]
    assert (uninterrupted / "completions" / "index.html").read_text().count("<polyline") == 3
    assert from_config_dict(json.loads((uninterrupted / "settings.json").read_text())) == SMALL


def test_int8_rollouts_are_corrected(tmp_path):
    brpo = replace(SMALL.brpo, rollout_weights="int8", importance_sampling="token_truncate")
    run(replace(SMALL, steps=1, brpo=brpo, eval=replace(SMALL.eval, every=0, final_size=0)), tmp_path)
    (first,) = lines(tmp_path)
    assert 1e-4 < first["train/sampling_logp_difference"] < 0.1
    assert first["train/ratio_mean"] == 1 and 1e-5 < abs(first["train/importance_ratio_mean"] - 1) < 0.1


def test_a_resumed_run_is_the_uninterrupted_one(uninterrupted, tmp_path, monkeypatch):
    """Stopped after step 2 and resumed in a new process: metrics and weights to the last bit."""
    save = Checkpoints.save

    def stop(self, step, state, meta=None):
        save(self, step, state, meta)
        self.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path)
    monkeypatch.undo()
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "train")!r}]
from pathlib import Path
import loop_test
from qwenla_jax.train import loop
loop.run(loop_test.SMALL, Path({str(tmp_path)!r}))
assert "torch" not in sys.modules, "installed here, and imported by a run, which has no use for it"
"""
    assert lines(tmp_path)[-1]["step"] == 2
    # What a killed run may have written after its last checkpoint must not stand twice.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/reward": 99}\n')
    resumed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert resumed.returncode == 0 and "resumed after step 2" in resumed.stdout, resumed.stderr
    message = f"{tmp_path} holds a run with 2 steps done: it is resumed (for a new run: another --workdir)"
    assert message in resumed.stdout.splitlines() and "learning rate" not in resumed.stdout
    whole = [comparable(line) for line in lines(uninterrupted)]
    assert [comparable(line) for line in lines(tmp_path)] == whole
    one, two = (load_file(folder / "hf" / "model.safetensors") for folder in (uninterrupted, tmp_path))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(RunRefused, match="optim.learning_rate"):
        run(replace(SMALL, optim=replace(SMALL.optim, learning_rate=0.5)), tmp_path)
    with pytest.raises(RunRefused, match="config.steps: got 3, but .* has 4 steps done"):
        run(replace(SMALL, steps=3), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    first, *rest = metrics.read_bytes().splitlines(keepends=True)
    for junk in (b"\x00" * 50 + b"\n", b"{\n", b"\xff\n"):
        metrics.write_bytes(b"".join([first, junk, *rest]))
        with pytest.raises(RunRefused, match=f"{metrics}:2: not JSON: .*; delete the line to continue"):
            run(SMALL, tmp_path)
    metrics.unlink()
    os.mkfifo(metrics)
    with pytest.raises(RunRefused, match=f"{metrics}: not a regular file"):
        run(SMALL, tmp_path)


def test_supervised_training_runs_and_its_export_is_a_start(tmp_path):
    options = replace(
        SMALL,
        stage="sft",
        init_from="random:tiny",
        data=DataOptions(batch_size=4, max_prompt_tokens=64, length_group=2),
        optim=OptimOptions(learning_rate=1e-3, accumulation=2),
        eval=EvalOptions(every=0, final_size=0),
        reattention=ReattentionOptions(max_insertions=1, keep_ratio=0.3),
    )
    run(options, tmp_path / "sft")
    again = json.loads((tmp_path / "sft" / "hf" / "generation_config.json").read_text())["reattention"]
    assert again.items() >= {"mode": "none", "max_insertions": 1, "keep_ratio": 0.3}.items()  # as trained
    losses = [line["train/loss"] for line in lines(tmp_path / "sft")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    go_on = replace(SMALL, steps=1, init_from=str(tmp_path / "sft" / "hf"), eval=EvalOptions(every=0, final_size=0))
    run(go_on, tmp_path / "brpo")
    assert [line["step"] for line in lines(tmp_path / "brpo")] == [1]


def test_more_steps_under_a_falling_schedule_are_reported():
    """Oracle: the cosine by hand, (1 + cos(pi x)) / 2 of the way from the end of the rise to the end of the run."""
    options = replace(SMALL, steps=200, optim=OptimOptions(learning_rate=1e-5, warmup_ratio=0.05, schedule="cosine"))

    def cosine(count, warmup, steps):
        return 0.5e-5 * (1 + math.cos(math.pi * (count - warmup) / (steps - warmup + 1)))

    old, new = rate_change(options, 100, 100)
    assert old == pytest.approx(cosine(100, 5, 100), rel=1e-3, abs=1e-11)
    assert new == pytest.approx(cosine(101, 10, 200), rel=1e-3)
    assert old < 1e-8 and new > 5e-6
    assert rate_change(options, 100, 200) is None
    assert rate_change(replace(options, optim=replace(options.optim, schedule="constant")), 100, 100) is None
    assert rate_change(options, 200, 100) is None  # nothing is left to do


def launch(*args):
    return subprocess.run(
        [sys.executable, "launch/train.py", *args], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config=configs/brpo.py", "--config.stepps=3"], "config.stepps: there is no such key; did you mean"),
        (["--config=configs/brpo.py", "--config.steps=many"], "config.steps: got 'many', expected int"),
        (["--config=configs/brpo.py", "--config.brpo.temperature=0"], "config.brpo.temperature: got 0"),
        (["--config=configs/brpo.py:7b"], "config.init_from"),
        (["--config=configs/brpo.py:8b"], "there is no preset '8b'; valid: tiny"),
        (["--config=configs/brpo.py", "--config.init_from=nowhere"], "nowhere"),
        (["--config=configs/brpo.py", "--config.data.source=no.jsonl"], "no.jsonl"),
        (["--config=configs/none.py"], "--config: there is no file 'configs/none.py'"),
        (["--config=configs/brpo.py", "--config.rewards.balance_floor=2"], "config.rewards.balance_floor: got 2"),
    ],
)
def test_wrong_settings_are_refused_by_name(args, message, tmp_path):
    result = launch(*args, f"--workdir={tmp_path / 'run'}")
    assert result.returncode != 0 and message in result.stderr, result.stderr[-2000:]
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_folder_of_its_own_says_where_it_is(tmp_path):
    """The folder is somebody else's, so that nothing is trained."""
    for command, stage in (("train", "brpo"), ("distill", "distill")):
        folder = tmp_path / "runs" / stage
        folder.mkdir(parents=True)
        (folder / ("metrics.jsonl" if command == "train" else "samples.jsonl")).write_text("{}\n")
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / f"{command}.py", f"--config={ROOT / 'configs' / stage}.py"],
            capture_output=True, text=True, cwd=tmp_path, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == f"--workdir is not given: the run is in {folder}\n"
        assert str(folder) in done.stderr and "Traceback" not in done.stderr


def test_a_bucket_is_no_folder():
    result = launch("--config=configs/brpo.py", "--workdir=gs://bucket/run")
    assert result.returncode == 1 and "got gs://bucket/run, expected a folder" in result.stderr


def test_help_lists_every_setting():
    result = launch("--help")
    assert "--config.rewards.target_length" in result.stdout and "--workdir" in result.stdout + result.stderr
