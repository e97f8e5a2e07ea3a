"""Runs over records of which some cannot be used: left out, counted, capped, and the same after a restart."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from qwenla_jax.config.run_options import (
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LogOptions,
    OptimOptions,
    RunOptions,
)
from qwenla_jax.data.sources.skip_invalid import TooManyInvalid
from qwenla_jax.inference.read_examples import whole
from qwenla_jax.run.signals import Stopped
from qwenla_jax.train.contamination_guard import guard_against_leaks
from qwenla_jax.train.health import Failed
from qwenla_jax.train.loop import run
from qwenla_jax.train.sft.trainer import SftStage
from qwenla_jax.train.train_runtime import make_run_source

RESPONSE = "<SUMMARY>a</SUMMARY><CAPTION>a</CAPTION><REASONING>a</REASONING><CONCLUSION>1</CONCLUSION>"


@pytest.fixture
def options(tmp_path):
    """12 records: an image that is cut off, one that is none, a question that is too long."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(12):
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        row = {"id": str(n), "image": f"{n}.png", "question": "how many?", "answer": "1", "response": RESPONSE}
        rows.append(row)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:500])
    (tmp_path / "5.png").write_text("hello")
    rows[7]["question"] *= 50
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))
    return RunOptions(
        stage="sft",
        steps=6,
        data=DataOptions(
            source=str(tmp_path / "data.jsonl"),
            eval_source=str(tmp_path / "eval.jsonl"),
            batch_size=4,
            max_invalid=3,
            leaks="ignore",
            threads=2,
        ),
        optim=OptimOptions(learning_rate=1e-3),
        eval=EvalOptions(every=0, final_size=0),
        checkpoint=CheckpointOptions(every=2, keep=3),
        log=LogOptions(completions_every=0),
    )


def numbers(workdir, *names):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines if "train/loss" in line]


def test_a_run_counts_what_it_leaves_out_and_resumes_to_the_bit(options, tmp_path, monkeypatch, capsys):
    run(options, tmp_path / "whole")
    message = capsys.readouterr().out
    assert all(f"{name}.png" in message for name in ("3", "5")) and "its prompt has" in message
    result = numbers(tmp_path / "whole", "train/loss", "train/data/invalid")
    # Two epochs of 12 records in 6 steps of 4: each of the three is met at its own place in each.
    assert sum(invalid for _, invalid in result) == 2 * 3
    step = SftStage.step

    def ended(self, state, number, check_stop):
        if number == 3:
            raise Stopped(15, "by this test")
        return step(self, state, number, check_stop)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(SftStage, "step", ended)
        run(options, tmp_path / "cut")
    run(replace(options, data=replace(options.data, max_invalid=100)), tmp_path / "cut")
    assert numbers(tmp_path / "cut", "train/loss", "train/data/invalid") == result
    one, two = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "cut"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_more_than_may_be_end_the_run_by_name(options, tmp_path):
    with pytest.raises(Failed, match="3 records are broken, at most 2 may be .*--check_data") as error:
        run(replace(options, data=replace(options.data, max_invalid=2)), tmp_path / "run")
    assert any(text in str(error.value) for text in ("3.png", "5.png", "record '7': its prompt has"))


def test_an_evaluation_leaves_out_what_is_broken_and_puts_nothing_in_its_place(options):
    held = make_run_source(options, "held_out")
    pick = lambda record: record.images and record  # noqa: E731
    stand_in = lambda record: SimpleNamespace(record=pick(record), prompt_length=1, ids_T=[0])  # noqa: E731
    assert [example.record.id for example in whole(held, stand_in, options.data)] == ["0", "1", "2", "4"]
    with pytest.raises(TooManyInvalid, match="2 held-out records are broken, at most 1 may be"):
        list(whole(held, stand_in, replace(options.data, max_invalid=1)))


def test_images_of_the_evaluation_in_the_training_data(options, tmp_path):
    asked = replace(options, eval=EvalOptions(every=0, final_size=4))

    def guard(how):
        message = []
        changed = replace(asked, data=replace(asked.data, leaks=how))
        sources = [make_run_source(changed, split) for split in ("train", "held_out")]
        guard_against_leaks(changed, *sources, message.append)
        return message

    # The first four records of the evaluation; in files of the same bytes a broken image counts, too.
    assert len(guard("warn")) == 1 and guard("warn")[0].startswith("warning: 4 images of 12 of ")
    with pytest.raises(ValueError, match=r"config.data.leaks=refuse: 3 images of 10 of training .* are in eval"):
        guard("refuse")
    assert guard("ignore") == []
    groups = Image.new("RGB", (60, 60), "white")
    groups.paste("navy", (5, 20, 40, 50))
    groups.save(tmp_path / "0.png")
    groups.save(tmp_path / "copy.jpg", quality=95)
    row = {"id": "x", "image": "copy.jpg", "question": "how many?", "answer": "1"}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row))
    assert guard("warn") == []  # other bytes: only a look finds it
    with pytest.raises(ValueError, match="by look, 1 pairs: 0 = x"):
        guard("refuse")
