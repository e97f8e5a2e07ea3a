"""Skipping what is done, and the table."""

import dataclasses
import functools
import json
import shutil

import pytest

from qwenla_jax.analysis import pipeline
from qwenla_jax.train.loop import Refused
from qwenla_jax.train.options import RunOptions


def test_a_stage_is_skipped_only_with_the_same_settings(tmp_path):
    ran, said = [], []

    def work(options, folder):
        folder.mkdir(exist_ok=True)
        ran.append(options.steps)

    for options in (RunOptions(steps=3), RunOptions(steps=3), RunOptions(steps=4), RunOptions(steps=4)):
        pipeline._stage("base", options, work, tmp_path, (), said.append)
    assert ran == [3, 4]
    assert "done already" in said[1] and "done already" in said[3]


def test_a_stage_that_fails_is_not_done(tmp_path):
    def work(options, folder):
        raise OSError("disk full")

    run = functools.partial(pipeline._stage, "base", workdir=tmp_path, needs=(), note=lambda line: None)
    with pytest.raises(OSError, match="disk full"):
        run(RunOptions(), work)
    assert not (tmp_path / "base" / pipeline.DONE).exists()
    run(RunOptions(), lambda options, folder: None)
    assert (tmp_path / "base" / pipeline.DONE).exists()
    # Begun anew with other settings and cut short: what was done is done no more.
    with pytest.raises(OSError, match="disk full"):
        run(RunOptions(steps=9), work)
    assert not (tmp_path / "base" / pipeline.DONE).exists()


def test_a_stage_made_from_what_is_gone_is_refused(tmp_path):
    """Somebody deleted the base and made it again: the cold start in the folder is of the other one."""
    run = functools.partial(pipeline._stage, workdir=tmp_path, note=lambda line: None)
    work = lambda options, folder: folder.mkdir(exist_ok=True)  # noqa: E731
    for _ in range(2):
        run("base", RunOptions(), work, needs=())
        run("cold_start", RunOptions(), work, needs=("base",))
    shutil.rmtree(tmp_path / "base")
    run("base", RunOptions(), work, needs=())
    with pytest.raises(Refused, match="cold_start was made from another base; delete it"):
        run("cold_start", RunOptions(), work, needs=("base",))
    # So is one that was only begun.
    (tmp_path / "cold_start" / pipeline.DONE).unlink()
    with pytest.raises(Refused, match="cold_start was made from another base; delete it"):
        run("cold_start", RunOptions(), work, needs=("base",))


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
    assert cells[:2] == ["copy", "50.0 [40.0, 60.0]"] and cells[4] == "25.0" and cells[7:9] == ["100.0", "-"]
    assert cells[-4:] == ["1.50", "0.75", "0.25, 0.50, -", "0.88, 1.25, -"]


def test_settings_round_trip_through_json():
    """What `done.json` holds is compared with `to_dict`, so it must survive JSON."""
    from qwenla_jax.train.schema import to_dict

    options = to_dict(dataclasses.replace(RunOptions(), init_from="x"))
    assert json.loads(json.dumps(options)) == options
