"""Skipping what is done, and the table."""

import dataclasses
import functools
import json
import shutil

import pytest

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.study import pipeline
from qwenla_jax.study.arms import Settings, Stage, stages_of, systems_of
from qwenla_jax.study.collect import SYSTEMS
from qwenla_jax.train.loop import RunRefused


def stage(name, work, options=None, needs=()):
    return Stage(name, options or RunOptions(), work, needs)


def make(options, folder):
    folder.mkdir(exist_ok=True)


def test_a_stage_is_skipped_only_with_the_same_settings(tmp_path):
    ran, said = [], []

    def work(options, folder):
        make(options, folder)
        ran.append(options.steps)

    for options in (RunOptions(steps=3), RunOptions(steps=3), RunOptions(steps=4), RunOptions(steps=4)):
        pipeline.run_stage(stage("base", work, options), tmp_path.joinpath, said.append)
    assert ran == [3, 4]
    assert "done already" in said[1] and "done already" in said[3]


def test_a_stage_that_fails_is_not_done(tmp_path):
    def work(options, folder):
        raise OSError("disk full")

    run = functools.partial(pipeline.run_stage, folder=tmp_path.joinpath, note=lambda line: None)
    with pytest.raises(OSError, match="disk full"):
        run(stage("base", work))
    assert not (tmp_path / "base" / pipeline.DONE).exists()
    run(stage("base", make))
    assert (tmp_path / "base" / pipeline.DONE).exists()
    # Begun anew with other settings and cut short: what was done is done no more.
    with pytest.raises(OSError, match="disk full"):
        run(stage("base", work, RunOptions(steps=9)))
    assert not (tmp_path / "base" / pipeline.DONE).exists()


def test_a_stage_made_from_what_is_gone_is_refused(tmp_path):
    """Somebody deleted the base and made it again: the cold start in the folder is of the other one."""
    run = functools.partial(pipeline.run_stage, folder=tmp_path.joinpath, note=lambda line: None)
    base, cold = stage("base", make), stage("cold_start", make, needs=("base",))
    for _ in range(2):
        run(base)
        run(cold)
    shutil.rmtree(tmp_path / "base")
    run(base)
    with pytest.raises(RunRefused, match="cold_start was made from another base; delete it"):
        run(cold)
    # So is one that was only begun.
    (tmp_path / "cold_start" / pipeline.DONE).unlink()
    with pytest.raises(RunRefused, match="cold_start was made from another base; delete it"):
        run(cold)


def test_table():
    parts = {"before": {"visual": 0.25, "ratio": 0.875}, "in": {"visual": 0.5, "ratio": 1.25}}
    scores = {
        "accuracy": 0.5,
        "accuracy_interval": [0.4, 0.6],
        "accuracy/count": 0.25,
        "format": 1.0,
        "reflections": 1.5,
        "inserted": 0.75,
        "attention": {"parts": parts},
    }
    head, line, row = pipeline.table({"copy": scores}).splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["copy", "50.0 [40.0, 60.0]", "25.0", "100.0", "-"]
    assert cells[-4:] == ["1.50", "0.75", "0.25, 0.50, -", "0.88, 1.25, -"]


def study(tmp_path, every_arm):
    """Settings of seed 4 over a base of seed 1, and their stages by name."""
    attention_sums = {"sft_copy": "copy", "sft_route": "route"}
    runs = {name: RunOptions(seed=1) for name in ("base", "cold_start", "brpo")}
    runs |= {name: RunOptions(reattention=ReattentionOptions(mode=mode)) for name, mode in attention_sums.items()}
    settings = Settings(**runs, distill=DistillOptions(), seed=4, source="marked_scenes", every_arm=every_arm)
    return settings, {stage.name: stage for stage in stages_of(settings, tmp_path.joinpath)}


@pytest.mark.parametrize("every_arm", [False, True])
def test_every_stage_starts_from_what_it_needs(tmp_path, every_arm):
    """Paper, five stages: stage 4 starts from the base model, and reads what stage 3 wrote."""
    settings, stages = study(tmp_path, every_arm)
    done = set()
    for one in stages.values():
        assert set(one.needs) <= done, one.name
        done.add(one.name)
        starts = [need for need in one.needs if str(tmp_path / need / "hf") == one.options.init_from]
        reads = [need for need in one.needs if str(tmp_path / need / "accepted.jsonl") == one.options.data.source]
        assert len(starts) == (one.name != "base") and set(starts + reads) == set(one.needs), one.name
        assert not one.name.startswith("sft") or (starts == ["base"] and reads), one.name
        assert reads or one.options.data.source == "marked_scenes"
    assert stages["base"].options.seed == 1  # one base model serves all seeds
    assert {one.options.seed % 1000 for one in stages.values() if one.name != "base"} == {4}
    systems = systems_of(settings)
    assert {system.name for system in systems} <= set(SYSTEMS) and (len(systems) == len(SYSTEMS)) == every_arm
    # Each looks again as it was trained to, but for one that is told not to speak, and two that see something else.
    changed = {"vision-only": {"mode": "vision_only"}}
    changed |= {"copy of a blank image": {"content": "blank"}, "copy of another image": {"content": "other"}}
    for system in systems:
        trained = stages[system.stage].options.reattention
        assert dataclasses.replace(trained, **changed.get(system.name, {})) == system.reattention, system.name
    if every_arm:
        assert stages["sft_raw_copy"].needs == ("base", "distill_raw")
        assert stages["distill_raw"].needs == ("cold_start",)
        shares = {system.name: system.reattention.keep_ratio for system in systems}
        assert (shares["route 25"], shares["route"], shares["route 75"]) == (0.25, 0.5, 0.75)


def test_settings_round_trip_through_json():
    """What `done.json` holds is compared with `to_dict`, so it must survive JSON."""
    from qwenla_jax.config.schema import to_dict

    options = to_dict(dataclasses.replace(RunOptions(), init_from="x"))
    assert json.loads(json.dumps(options)) == options
