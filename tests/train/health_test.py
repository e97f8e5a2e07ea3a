"""Wrong first steps and updates that are not finite, in whole runs on a small scale."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from qwenla_jax.config.run_options import (
    BrpoOptions,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    GuardOptions,
    OptimOptions,
    PoolOptions,
    RewardOptions,
    RunOptions,
)
from qwenla_jax.rewards import RewardError, RewardRecord, RewardSettings, score
from qwenla_jax.tools.preflight import examine
from qwenla_jax.tools.replay import replay
from qwenla_jax.train import programs
from qwenla_jax.train.brpo import trainer
from qwenla_jax.train.brpo.reward_failures import RewardFailures, RewardsFailed
from qwenla_jax.train.health import Failed, cause, first_step_problems
from qwenla_jax.train.loop import run
from qwenla_jax.train.train_runtime import build

ROOT = Path(__file__).resolve().parents[2]
SMALL = RunOptions(
    stage="brpo",
    steps=6,
    data=DataOptions(batch_size=2, max_response_tokens=16),
    optim=OptimOptions(learning_rate=1e-2, warmup_ratio=0.0),
    brpo=BrpoOptions(group_size=2),
    rewards=RewardOptions(pool=PoolOptions(workers=1)),
    eval=EvalOptions(every=0, final_size=0),
    checkpoint=CheckpointOptions(every=2, keep=3),
    guard=GuardOptions(max_skipped=2),
)
HUGE = """
def huge(record):  # the mean of two of them is no longer a number of 64 bits
    return 1.6e308

def fine(record):
    return len(record.response) % 7
"""


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def step_dump(tmp_path_factory):
    """The step dump of a run whose advantages are not finite, and its work folder."""
    folder = tmp_path_factory.mktemp("huge")
    (folder / "my_rewards.py").write_text(HUGE)
    rewards = replace(SMALL.rewards, extra=("my_rewards:huge", "my_rewards:fine"))
    # Without checkpoints on the way, at which metrics are read in any case.
    options = replace(SMALL, rewards=rewards, checkpoint=CheckpointOptions(every=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(Failed) as failed:
            with np.errstate(all="ignore"):
                run(options, folder / "run")
    return folder, str(failed.value)


def test_a_run_whose_updates_are_not_finite_ends_and_changes_nothing(step_dump):
    folder, message = step_dump
    place = folder / "run" / "step_dumps" / "step_000002"
    assert "2 updates in a row were skipped, the last at step 2: " in message and "loss is " in message
    assert f"python launch/replay.py --step_dump={place}" in message
    rows = lines(folder / "run")
    assert [row["step"] for row in rows] == [1, 2] and all(row["train/skipped"] == 1 for row in rows)
    assert not [path for path in (folder / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    # Parameters as they were given, and moments that no gradient has touched.
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(place / "state")
    _, params = build(SMALL)
    given = jax.tree.leaves(params)
    selected = jax.tree.leaves(state["params"])
    assert len(given) == len(selected) and all(np.array_equal(a, b) for a, b in zip(given, selected, strict=True))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state["opt_state"])) and int(state["step"]) == 0


def test_its_step_dump_is_computed_again(step_dump, monkeypatch):
    folder, _ = step_dump
    monkeypatch.chdir(folder)
    result = replay(folder / "run" / "step_dumps" / "step_000002")
    assert result.reproduced and result.identical_responses and result.step == 2, str(result)
    assert not math.isfinite(result.metrics["loss"][0]) and "decoder/norm/scale" in result.not_finite
    record = json.loads((folder / "run" / "step_dumps" / "step_000002" / "step_dump.json").read_text())
    assert len(record["rows"]) == 4 and {abs(row["rewards"]["extra"]["huge"]) for row in record["rows"]} == {1.6e308}


def test_another_batch_is_not_taken_for_it(step_dump, monkeypatch, tmp_path):
    import shutil

    folder, _ = step_dump
    monkeypatch.chdir(folder)
    place = shutil.copytree(folder / "run" / "step_dumps" / "step_000002", tmp_path / "step dump")
    with np.load(place / "arrays.npz") as file:
        arrays = dict(file)
    name = next(name for name in arrays if name.endswith("ids_BxR"))
    arrays[name][..., 0] += 1
    np.savez(place / "arrays.npz", **arrays)
    result = replay(place)
    assert not result.reproduced and not result.identical_responses
    (place / "arrays.npz").unlink()
    with pytest.raises(ValueError, match="arrays.npz"):
        replay(place)


def test_a_few_skipped_updates_do_not_end_a_run(tmp_path, monkeypatch):
    """Every other step has an advantage that is not finite; the steps between them train."""
    rollout_batch = trainer.BrpoStage._rollout_batch

    def invalid(self, groups, batch):
        result = rollout_batch(self, groups, batch)
        invalid.calls += 1
        return result.replace(advantage_B=result.advantage_B * (np.nan if invalid.calls % 2 == 0 else 1))

    invalid.calls = 0
    monkeypatch.setattr(trainer.BrpoStage, "_rollout_batch", invalid)
    run(SMALL, tmp_path)
    assert [row["train/skipped"] for row in lines(tmp_path)] == [0, 1, 0, 1, 0, 1]


def test_a_work_folder_deleted_under_a_run_ends_it_and_stays_deleted(tmp_path, monkeypatch):
    rollout_batch = trainer.BrpoStage._rollout_batch

    def deleting(self, groups, batch):
        if deleting.steps == 2:
            while (tmp_path / "run").exists():  # a checkpoint may be on its way
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
        deleting.steps += 1
        return rollout_batch(self, groups, batch)

    deleting.steps = 0
    monkeypatch.setattr(trainer.BrpoStage, "_rollout_batch", deleting)
    with pytest.raises(Failed, match=f"{tmp_path / 'run'}: the work folder was deleted or replaced"):
        run(SMALL, tmp_path / "run")
    assert deleting.steps == 3 and not (tmp_path / "run").exists()


def test_a_trainer_that_disagrees_with_its_sampler_is_refused(tmp_path, monkeypatch):
    """The update is told another temperature than the sampler."""
    real = programs.make_brpo_gradient
    other = lambda model, options, *rest: real(model, replace(options, temperature=1.3), *rest)  # noqa: E731
    monkeypatch.setattr(programs, "make_brpo_gradient", other)
    with pytest.raises(Failed, match="step 1 is not what .* the log-probabilities of sampler and trainer differ by"):
        run(SMALL, tmp_path)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]


BUGGY = """
def buggy(record):
    return score(record) / 0

def score(record):
    return len(record.response) + record.lenght
"""


def test_a_reward_with_a_bug_ends_the_run_at_once_by_name(tmp_path):
    """One step, as a command: otherwise the run would end with "done"."""
    (tmp_path / "my_rewards.py").write_text(BUGGY)
    flags = ["steps=1", "data.batch_size=2", "brpo.group_size=2", "data.max_response_tokens=16", "eval.final_size=0"]
    flags += ["rewards.extra=my_rewards:buggy", "rewards.pool.workers=1"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", f"--config={ROOT / 'configs' / 'brpo.py'}", "--workdir=run"]
        + [f"--config.{flag}" for flag in flags],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("Traceback") == 1 and "Traceback" not in done.stderr
    message = done.stdout[done.stdout.index("step 1: reward 'buggy' failed for 4 of 4 responses") :].splitlines()
    trace = [line.strip() for line in message[1:] if not set(line) <= set(" ^~")]
    here = f'File "{tmp_path / "my_rewards.py"}", line '
    assert trace[:6] == [
        "Traceback (most recent call last):",
        f"{here}3, in buggy", "return score(record) / 0",
        f"{here}6, in score", "return len(record.response) + record.lenght",
        "AttributeError: 'RewardRecord' object has no attribute 'lenght'",
    ]  # fmt: skip
    assert done.stderr.splitlines()[-1] == (
        "step 1: the rewards failed for all 4 responses: reward 'buggy' for 4 (raised: AttributeError: 'RewardRecord' "
        "object has no attribute 'lenght'). No step was done yet"
    )


def test_rewards_that_fail_later_or_for_some():
    fine = score(RewardRecord("q", "", "2", "", "x", (), 1, True), RewardSettings())
    late = RewardError("timeout", "slow", "no answer within 5 s")
    wrong = RewardError("value", "odd", "returned \x1b[2Jnan")
    notes = []
    failures = RewardFailures(notes.append, 3)
    failures.check(3, [fine, late, late])
    failures.check(4, [fine, late, wrong])
    failures.check(5, [late, late])  # after the first step: it may pass
    assert notes == [
        "step 4: reward 'slow' failed for 2 of 3 responses, which are not trained on. The first: timeout: no answer "
        "within 5 s",
        "step 5: reward 'odd' failed for 1 of 3 responses, which are not trained on. The first: value: returned "
        "\\x1b[2Jnan",
    ]
    for scores in ([wrong, wrong], [late, wrong, late]):
        with pytest.raises(RewardsFailed, match=r"^step 6: the rewards failed for all . responses: .*'odd' for"):
            failures.check(5, scores)
    with pytest.raises(RewardsFailed, match=r"reward 'slow' for 2 \(timeout: no answer within 5 s\)$"):
        RewardFailures(None, 0).check(0, [late, late])
    RewardFailures(None, 0).check(0, [])


def test_what_the_first_step_must_be():
    good = {"num_tokens": 5, "skipped": 0, "sampling_logp_difference": 1e-6, "ratio_mean": 1.0, "kl": 0.0}
    assert first_step_problems(SMALL, 1, good) == []
    assert "ratio" in first_step_problems(SMALL, 1, good | {"ratio_mean": 1.01})[0]
    assert "reference" in first_step_problems(SMALL, 1, good | {"kl": 0.01})[0]
    int8 = replace(SMALL, brpo=replace(SMALL.brpo, rollout_weights="int8"))
    assert first_step_problems(int8, 1, good | {"ratio_mean": 1.01, "sampling_logp_difference": 0.1}) == []
    assert first_step_problems(SMALL, 9, good | {"kl": 0.01}) == []  # resumed: it has moved from the reference
    assert len(first_step_problems(SMALL, 1, good | {"kl": math.nan, "sampling_logp_difference": math.nan})) == 2
    assert first_step_problems(SMALL, 1, good | {"num_tokens": 0, "ratio_mean": 0.0}) == []


def test_causes():
    assert cause({"num_tokens": 0.0, "reward_errors/timeout": 4.0}) == "no token counted (reward_errors/timeout 4)"
    assert cause({"num_tokens": 3.0, "loss": math.nan, "kl": 1.0}) == "loss is nan"


def preflight(*args):
    line = [sys.executable, "launch/train.py", "--config=configs/brpo.py", "--preflight", "--config.data.batch_size=2"]
    return subprocess.run([*line, *args], capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_preflight_passes_the_embedded_default():
    done = preflight("--config.brpo.group_size=4")
    message = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0, done.stdout + done.stderr
    names = "tags, first update, sampler = trainer, ratio, KL, rewards, compilations, the image matters, memory, time"
    assert [line.removeprefix("ok     ") for line in message] == names.split(", ")
    assert message["ok     tags"].startswith("10 of 10")


def test_preflight_refuses_a_model_that_ignores_images(monkeypatch):
    """All visual tokens are the same whatever the image: nothing of it reaches an answer."""
    real = programs.make_brpo_gradient

    def blind(model, *rest):
        gradient = real(model, *rest)
        empty = lambda v: v.replace(patches_IxSxC=v.patches_IxSxC * 0)  # noqa: E731
        return lambda params, reference, vision, *more: gradient(params, reference, empty(vision), *more)

    monkeypatch.setattr(programs, "make_brpo_gradient", blind)
    failed = {check.name for check in examine(SMALL) if not check.ok}
    assert failed == {"the image matters", "sampler = trainer", "ratio"}
