"""The length study's run: what is made of what, what is kept, and what its results' checks see of it.

Oracle: trainings that only write down their settings, and measures that a test wrote; everything between them is real.
"""

import dataclasses
import json
import re

import pytest
from length_studies import content

from qwenla_jax.config.schema import to_json
from qwenla_jax.data.synthetic.length_options import WORKINGS, LengthOptions
from qwenla_jax.recipes.cold_start import PRESETS
from qwenla_jax.study import length_run
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_arms import ARMS, BLANK, COPY, OTHER, SIZES, SQUEEZED, TEXT, Base, training_source
from qwenla_jax.study.length_report import write_length_report
from qwenla_jax.study.length_results import read_results
from qwenla_jax.train.loop import RunRefused

SIZE = dataclasses.replace(SIZES["quick"].divided(1000), seeds=1)


@pytest.fixture
def ran(monkeypatch):
    """What was trained and measured, in order."""
    done = []

    def train(options, folder):
        done.append(folder.name)
        (folder / "settings.json").write_text(to_json(options))

    def measure(arm, condition, size, seed, model):
        done.append((arm.name, model.parent.name))
        return content(arm.name, seed)["cells"], {}, f"of seed {seed}", 16

    monkeypatch.setattr(length_run, "train", train)
    monkeypatch.setattr(length_run, "measure", measure)
    return done


def run(tmp_path, size=SIZE):
    trainings = [dataclasses.replace(PRESETS[name](), steps=steps) for name, steps in (("working", 4), ("long", 1))]
    return length_run.run_length(size, trainings, tmp_path / "work", tmp_path / "results", lambda line: None)


def test_what_is_there_is_kept(tmp_path, ran):
    files = run(tmp_path)
    models = {TEXT: "a_short_0_text-only", BLANK: "a_short_0_blank", COPY: "a_short_0_copy", OTHER: "a_short_0_copy"}
    models[SQUEEZED] = models[TEXT]
    first = []
    for arm, model in models.items():
        first += [model] * ARMS[arm].trained + [(arm, model)]
    assert ran == first
    found = {result.arm: result for result in read_results(tmp_path / "results")}
    assert found.keys() == models.keys() and sorted(result.path for result in found.values()) == sorted(files)
    # 256 of each of the two trainings that made the embedded checkpoint, and 256 of stage 4.
    assert {result.images["trained"] for result in found.values()} == {768}
    # Again, with a result and a training lost: these alone, and what was measured of that training.
    ran.clear()
    files[1].unlink()
    (tmp_path / "work" / "a_short_0_copy" / "done.json").unlink()
    run(tmp_path)
    assert ran == [(BLANK, models[BLANK]), models[COPY], (COPY, models[COPY]), (OTHER, models[COPY])]
    ran.clear()
    run(tmp_path)
    assert not ran
    (tmp_path / "work" / "base_a" / "done.json").unlink()
    with pytest.raises(RunRefused, match="made from another base_a"):
        run(tmp_path)
    # A base model that does not come ready: two trainings, the second one from the first.
    ran.clear()
    trained = dataclasses.replace(SIZE, bases=(Base("b", "random:tiny", (2, 1)),), arms=(TEXT,))
    run(tmp_path / "trained", trained)
    assert ran == ["base_b_first", "base_b", "b_short_0_text-only", (TEXT, "b_short_0_text-only")]
    settings = json.loads((tmp_path / "trained" / "work" / "base_b" / "settings.json").read_text())
    assert settings["init_from"] == str(tmp_path / "trained" / "work" / "base_b_first" / "hf")
    (found,) = read_results(tmp_path / "trained" / "results")
    assert found.images["trained"] == 768


def test_without_a_stage_4_every_arm_has_the_base_model(tmp_path, ran):
    files = run(tmp_path, SIZES["embedded"].divided(1000))
    assert ran == [(arm, "base_a") for arm in (TEXT, BLANK, COPY, OTHER)]
    found = read_results(tmp_path / "results")
    seen = {(result.condition, result.model, result.images["trained"]) for result in found}
    assert seen == {("untrained", None, 512)}
    one = json.loads(files[2].read_text())
    for key, value, message in (
        ("model", {"seed": 0}, "model is {'seed': 0}, expected None"),
        ("arm", BLANK, "blank was measured with reattention.content='image', expected 'blank'"),
    ):
        files[2].write_text(json.dumps(one | {key: value}))
        with pytest.raises(StudyError, match=re.escape(message)):
            read_results(tmp_path / "results")
    files[2].write_text(json.dumps(one))
    head = write_length_report(tmp_path / "results", tmp_path / "report.md")
    assert "at 160 tokens of reasoning, without stage 4: **helps**" in head and "Missing" not in head


def test_a_swapped_label_a_look_that_is_off_and_scenes_trained_on_are_seen(tmp_path, ran, monkeypatch):
    """Each broken in the code that runs, not in the files."""
    arms = dict(ARMS)
    swapped = {BLANK: dataclasses.replace(arms[COPY], name=BLANK), COPY: dataclasses.replace(arms[BLANK], name=COPY)}
    with monkeypatch.context() as broken:
        broken.setattr(length_run, "ARMS", arms | swapped)
        run(tmp_path / "swapped")
    with pytest.raises(StudyError, match="COPY has a model that was trained with reattention.content='blank'"):
        read_results(tmp_path / "swapped" / "results")
    off = dataclasses.replace(arms[COPY], reattention=arms[TEXT].reattention)
    with monkeypatch.context() as broken:
        broken.setattr(length_run, "ARMS", arms | {COPY: off})
        run(tmp_path / "off")
    with pytest.raises(StudyError, match="COPY was measured with reattention.mode='none', expected 'copy'"):
        read_results(tmp_path / "off" / "results")
    stage_4 = length_run.make_source(training_source(LengthOptions(11, 32, WORKINGS)), "cold_start", seed=0)
    indices = length_run.batch_indices(0, 0, 64, len(stage_4)).tolist()  # what stage 4 is trained on
    trained = [stage_4.place(index)[1] for index in indices]

    def leaking(arm, condition, size, seed, working, tokens):
        source = length_run.make_source(f"length_scenes#tokens={tokens}", "cold_start", seed=seed, size=64)
        scene = source.scene
        source.scene = lambda index: scene(trained[index])
        return source

    with monkeypatch.context() as broken:
        broken.setattr(length_run, "_source", leaking)
        run(tmp_path / "leaking")
    with pytest.raises(StudyError, match="64 of 64 test images were trained on; expected 0"):
        read_results(tmp_path / "leaking" / "results")
    assert json.loads(next((tmp_path / "leaking" / "results").glob("*copy*")).read_text())["images"]["shared"] == 64
