"""The length study's run: what is made of what, what is kept, and what its results' checks see of it.

Oracle: trainings that only write down their settings, and measures that a test wrote; everything between them is real.
"""

import json
from dataclasses import replace

import pytest
from length_studies import content

from qwenla_jax.cli import study
from qwenla_jax.config.schema import to_json
from qwenla_jax.data.synthetic.length_options import WORKINGS, LengthOptions
from qwenla_jax.recipes.cold_start import PRESETS
from qwenla_jax.study import length_run
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_arms import ARMS, BLANK, COPY, OTHER, SIZES, SQUEEZED, TEXT, training_source
from qwenla_jax.study.length_results import read_results
from qwenla_jax.train.loop import RunRefused

SIZE = replace(SIZES["quick"].divided(1000), seeds=1)


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


def run(tmp_path, size=SIZE, seed=None):
    small = [PRESETS["working"](), PRESETS["long"]()]
    trainings = [replace(one, data=replace(one.data, batch_size=4, length_group=2)) for one in small]
    return length_run.run_length(size, trainings, tmp_path / "work", tmp_path / "results", lambda line: None, seed)


def test_what_is_there_is_kept(tmp_path, ran):
    files = run(tmp_path)
    models = {TEXT: "a_short_0_text-only", BLANK: "a_short_0_blank", COPY: "a_short_0_copy", OTHER: "a_short_0_copy"}
    models[SQUEEZED] = models[TEXT]
    first = ["base_a_first", "base_a"]
    for arm, model in models.items():
        first += [model] * ARMS[arm].trained + [(arm, model)]
    assert ran == first
    found = {result.arm: result for result in read_results(tmp_path / "results")}
    assert found.keys() == models.keys() and sorted(result.path for result in found.values()) == sorted(files)
    settings = json.loads((tmp_path / "work" / "base_a" / "settings.json").read_text())
    assert settings["init_from"] == str(tmp_path / "work" / "base_a_first" / "hf")
    # 16 and 8 of the base model's two trainings, and 256 of stage 4.
    assert {result.images["trained"] for result in found.values()} == {280}
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


def test_the_command(tmp_path, ran):
    """Of a size and a seed, as they are asked for; it ends with the report."""
    args = ["--protocol=length", f"--workdir={tmp_path}", "--divide_steps=1000"]
    for asked, message in ((["--seed=2"], "expected a seed below 2"), (["--study"], "is of --protocol=paper")):
        with pytest.raises(SystemExit, match=message):
            study.main([*args, *asked])
    study.main([*args, "--seed=1"])
    assert ran[:3] == ["base_a_first", "base_a", "a_short_1_text-only"]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        f"a_short_seed1_{arm}.json" for arm in ("text-only", "blank", "copy", "another-image", "text-only-squeezed")
    }
    assert "base a, short, seed 0: every arm" in (tmp_path / "report.md").read_text()


def test_a_swapped_label_a_look_that_is_off_and_scenes_trained_on_are_seen(tmp_path, ran, monkeypatch):
    """Each broken in the code that runs, not in the files."""
    arms = dict(ARMS)
    swapped = {BLANK: replace(arms[COPY], name=BLANK), COPY: replace(arms[BLANK], name=COPY)}
    with monkeypatch.context() as broken:
        broken.setattr(length_run, "ARMS", arms | swapped)
        run(tmp_path / "swapped")
    with pytest.raises(StudyError, match="COPY has a model that was trained with reattention.content='blank'"):
        read_results(tmp_path / "swapped" / "results")
    off = replace(arms[COPY], reattention=arms[TEXT].reattention)
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
