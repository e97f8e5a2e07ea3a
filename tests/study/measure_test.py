"""What an evaluation saves, against the tokenizers library's offsets, the scenes themselves, and sums made twice."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import tokenizers

from qwenla_jax.config.run_options import EvalOptions, RunOptions
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.synthetic.scene_questions import caption_of
from qwenla_jax.data.synthetic.scenes import SIDE, make_scene
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.inference.sampler import Asked
from qwenla_jax.study import pipeline
from qwenla_jax.study.arms import Settings, System
from qwenla_jax.study.attention_maps import key_words
from qwenla_jax.study.collect import collect
from qwenla_jax.study.measure import batch_seconds

QUESTIONS, DRAWN, ROWS = 20, 16, 8


@pytest.fixture(scope="module")
def evaluated(reflecting, tmp_path_factory):
    """A run's folder with one system evaluated, attention in bins of one token."""
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "sft_copy").mkdir()
    (workdir / "sft_copy" / "hf").symlink_to(reflecting)
    (workdir / "sft_copy" / pipeline.DONE).write_text('{"stamp": "x"}')
    options = RunOptions(eval=EvalOptions(batch_size=ROWS))
    settings = Settings(
        *[options] * 3, DistillOptions(), *[options] * 2, questions=QUESTIONS, profiled=DRAWN, drawn=DRAWN
    )
    system = System("copy", "sft_copy", ReattentionOptions(mode="copy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pipeline,
            "attention_sums",
            functools.partial(pipeline.attention_sums, bins=options.data.max_response_tokens),
        )
        scores, seconds = pipeline._evaluated(system, settings, workdir.joinpath, lambda text: None)
        said = []
        assert pipeline._evaluated(system, settings, workdir.joinpath, said.append) == (scores, seconds)
        assert said == ["evaluate copy: done already"]
    return workdir, scores


def rows_of(workdir):
    return [json.loads(text) for text in (workdir / "evaluate/copy/answers.jsonl").read_text().splitlines()]


def test_answers_are_counted(evaluated, reflecting):
    workdir, scores = evaluated
    library = tokenizers.Tokenizer.from_file(str(reflecting / "tokenizer.json"))
    rows = rows_of(workdir)
    assert len(rows) == QUESTIONS and sum(len(row["objects"]) for row in rows) > QUESTIONS
    for index, row in enumerate(rows):
        text, there = row["response"], caption_of(make_scene(7000, 1, index)).split(", ")
        encoding = library.encode(text, add_special_tokens=False)
        assert row["tokens"] - len(encoding.ids) in (0, 1)  # and the stop token, where the model stopped
        assert row["inserted_tokens"] == 18 * row["inserted"]  # 16 visual tokens between two delimiters
        assert row["details"] == row["wrong_details"] == 0  # these scenes have none
        caption = re.search("<CAPTION>(.*?)</CAPTION>", text)
        named = list(dict.fromkeys(caption[1].split(", ")))
        for (token, right), words in zip(row["objects"], named, strict=True):
            end = encoding.offsets[token][1]
            assert text[:end].endswith(words) and right == (words in there)
        inner = "".join(re.findall("<REFLECTION>(.*?)</REFLECTION>", text, re.DOTALL))
        assert row["reflection_tokens"] == len(library.encode(inner, add_special_tokens=False).ids)
        assert row["named"] == len(named) and row["missed"] == len(set(there) - set(named))
    assert sum(row["inserted"] for row in rows) > 0
    assert scores["timing"]["rows"] == ROWS and len(scores["timing"]["batch_s"]) == 2  # the third is not full
    assert min(scores["timing"]["batch_s"]) > 0


def test_a_study_reads_it(evaluated):
    workdir, scores = evaluated
    (one,) = collect([workdir]).of("copy")
    assert one.numbers["right"].mean() == scores["accuracy"] and one.mode == "copy" and one.scenes_seed == 7000
    for column, part in enumerate(("before", "in", "after")):
        sums = {name: values[:, column].sum() for name, values in one.attention.parts.items()}
        wanted = scores["attention"]["parts"].get(part, {"tokens": 0})
        assert sums["tokens"] == wanted["tokens"]
        for name in ("original", "inserted", "even"):
            if sums["tokens"]:
                assert sums[name] / sums["tokens"] == pytest.approx(wanted[name], rel=1e-4)
    whole = {name: values.sum() for name, values in one.attention.positions.items()}
    assert whole["original"] == pytest.approx(one.attention.parts["original"].sum(), rel=1e-4)


def test_maps_add_up(evaluated):
    """Over the image they are what `inference.attention_mass` counts as received by visual tokens."""
    (one,) = collect([evaluated[0]]).of("copy")
    seen = 0
    for question, drawn in enumerate(one.heat):
        assert drawn["response"] == one.texts[question]["response"] and drawn["words"]
        for word in drawn["words"]:
            assert np.shape(word["original"]) == np.shape(word["inserted"]) == (4, 4)
            for name in ("original", "inserted"):
                received = one.attention.positions[name][question, word["token"] - 1]
                assert np.sum(word[name]) == pytest.approx(received, abs=1e-4)
            seen += np.sum(word["inserted"]) > 0
    assert len(one.heat) == DRAWN and seen > 0


def test_maps_lie_on_the_image(evaluated):
    """At the colour or shape that a caption begins with, the visual tokens where such a thing is are looked at more
    than the image's others, and far more so than with rows and columns exchanged.
    """
    (one,) = collect([evaluated[0]]).of("copy")
    y, x = np.meshgrid(*[(np.arange(4) + 0.5) * SIDE / 4] * 2, indexing="ij")
    here, mirrored = [], []
    for question, drawn in enumerate(one.heat):
        word = next(w for w in drawn["words"] if w["part"] == "caption")
        things = [t for t in make_scene(7000, 1, question).objects if word["word"] in (t.color, t.shape)]
        near = np.any([np.hypot(t.x - x, t.y - y) < t.radius + SIDE / 16 for t in things], axis=0)
        if things and 0 < near.sum() < 16:
            cells = np.array(word["original"])
            here.append(cells[near].mean() / cells[~near].mean())
            mirrored.append(cells.T[near].mean() / cells.T[~near].mean())
    assert len(here) >= 10 and np.mean(here) > 2 and np.mean(here) > 1.5 * np.mean(mirrored), (
        np.mean(here),
        np.mean(mirrored),
    )


def test_key_words():
    text = (
        "<SUMMARY>find red square</SUMMARY><CAPTION>small blue circle</CAPTION><REASONING>x: no</REASONING>"
        "<REFLECTION>look again: green circles: 2</REFLECTION><CONCLUSION>yes</CONCLUSION>"
    )
    got = key_words(text)
    assert [(k.part, k.word) for k in got] == [("caption", "blue"), ("last look", "circles"), ("answer", "yes")]
    assert all(text[k.start :].startswith(k.word) for k in got) and got[2].start == text.index("yes")
    plain = "count green\nsmall blue circle, big red square\nred shapes 1: \\boxed{3.5}"
    assert [k.word for k in key_words(plain)] == ["blue", "red", "3.5"] and key_words(plain)[1].start == 46
    assert key_words("") == () and [k.word for k in key_words("red")] == ["red"]


def test_compilation_is_not_timed():
    """The first call takes long; what is noted does not hold it, and the quicker of two counts."""
    calls = []

    def sampler(params, vision, prompts, step, sample_B):
        calls.append(vision)
        return np.zeros(1)

    seconds = batch_seconds({}, sampler, [Asked(number, None, 0, np.zeros(2)) for number in range(3)])
    assert calls == [0, 0, 0, 1, 1, 2, 2] and len(seconds) == 3 and min(seconds) > 0


def test_the_curve_is_part_of_the_second_stage_alone(monkeypatch, tmp_path):
    """Only BRPO is evaluated on the way, and not at all with `curve_every` 0."""
    for every in (60, 0):
        seen = {}

        def stage(one, *rest, seen=seen):
            seen[one.name] = one.options
            return 0.0

        monkeypatch.setattr(pipeline, "run_stage", stage)
        monkeypatch.setattr(pipeline, "_evaluated", lambda *args: ({}, 0.0))
        monkeypatch.setattr(pipeline, "table", lambda result: "")
        settings = Settings(*[RunOptions()] * 3, DistillOptions(), *[RunOptions()] * 2, curve_every=every)
        pipeline.run_pipeline(settings, tmp_path, lambda text: None)
        curve = seen["brpo"].eval
        assert (curve.every, curve.final_size) == ((60, 256) if every else (0, 0))
        others = [options.eval for name, options in seen.items() if name not in ("brpo", "distill")]
        assert {(e.every, e.final_size) for e in others} == {(0, 0)}
    assert dataclasses.replace(settings).curve_size == 256
