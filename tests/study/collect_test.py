"""What a study's folders hold is read as it was written, and what is amiss is named."""

import json
import shutil

import numpy as np
import pytest
from studies import QUESTIONS, attention, line, records, write_run, write_system

from qwenla_jax.study.collect import COPY, SAVED, SYSTEMS, TEXT, StudyError, collect, runs_in


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for seed in (0, 1):
        write_run(folder / f"seed_{seed}", seed, (TEXT, COPY), {TEXT: 10 + seed})
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "study")


def both(folder):
    return [folder / "seed_0", folder / "seed_1"]


def test_what_was_written_is_read(folder):
    study = collect(both(folder))
    assert study.systems == (TEXT, COPY) and study.questions == QUESTIONS
    assert [int(one.numbers["right"].sum()) for one in study.of(TEXT)] == [10, 11]
    one = study.of(COPY)[1]
    assert one.objects[0] == ((4, True), (12, False)) and one.scenes_seed == 7001
    assert one.texts[3]["question"] == records(1)[3].question
    assert one.attention.positions["original"].shape == (QUESTIONS, 3) and one.attention.parts["even"][0, 0] == 2
    curve = study.seeds[0].curve
    np.testing.assert_allclose(curve.count, 0.01 * np.arange(1, 61))
    assert curve.eval_right.tolist() == [16, 32, 48] and curve.eval_steps.tolist() == [0, 30, 60]


def test_systems_stand_in_the_order_of_the_tables(tmp_path):
    write_run(tmp_path, systems=(*reversed(SYSTEMS), "another"), count=2)
    assert collect([tmp_path]).systems == (*SYSTEMS, "another")


def change(path, edit):
    saved = json.loads(path.read_text())
    edit(saved)
    path.write_text(json.dumps(saved))


BREAKS = {
    "no answers": (lambda f: (f / "evaluate/copy/answers.jsonl").unlink(), r"seed_1/evaluate/copy/answers.jsonl"),
    "no heat": (lambda f: (f / "evaluate/copy/heat.json").unlink(), r"copy/heat.json: no such file"),
    "torn": (lambda f: (f / "evaluate/copy/attention.json").write_text("{"), r"attention.json: not readable as JSON"),
    "no part": (
        lambda f: change(f / "evaluate/copy/attention.json", lambda s: s["parts"].pop("even")),
        r"attention.json: expected .*even",
    ),
    "shape": (
        lambda f: change(f / "evaluate/copy/attention.json", lambda s: s["parts"]["even"].pop()),
        r"parts.even has shape \(39, 3\), expected \(40, 3\)",
    ),
    "older": (
        lambda f: change(f / "evaluate/copy/scores.json", lambda s: s["of"].pop("saved")),
        rf"copy/scores.json: `of.saved` is not {SAVED}.*delete .*evaluate/copy",
    ),
    "no timing": (
        lambda f: change(f / "evaluate/copy/scores.json", lambda s: s["scores"].clear()),
        r"copy/scores.json: no 'timing'",
    ),
    "no system": (lambda f: shutil.rmtree(f / "evaluate/copy"), r"seed_1: no evaluation of copy"),
    "no evaluation": (lambda f: shutil.rmtree(f / "evaluate"), r"seed_1/evaluate: holds no scores.json"),
    "curve": (
        lambda f: (f / "brpo/metrics.jsonl").write_text('{"step": 1}\n'),
        r"metrics.jsonl: no line has train/refl",
    ),
    "curve torn": (lambda f: (f / "brpo/metrics.jsonl").write_text("x\n"), r"metrics.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_missing_is_named(folder, name):
    breaks, named = BREAKS[name]
    breaks(folder / "seed_1")
    with pytest.raises(StudyError, match=named):
        collect(both(folder))


@pytest.mark.parametrize(
    ("change_line", "named"),
    [
        (lambda row: row.pop("tokens"), r"answers.jsonl:3: no tokens"),
        (lambda row: row.update(tokens="7"), r"answers.jsonl:3: tokens is '7'"),
        (lambda row: row.update(invented=2), r"answers.jsonl:3: `objects` and the counts"),
        (lambda row: row.update(id="other"), r"answers.jsonl: other questions than"),
    ],
)
def test_a_wrong_line_is_named(folder, change_line, named):
    path = folder / "seed_0/evaluate/text-only/answers.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    change_line(rows[2])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StudyError, match=named):
        collect(both(folder))


def test_seeds_must_fit_together(folder):
    with pytest.raises(StudyError, match="no folder to report on"):
        collect([])
    with pytest.raises(StudyError, match="stands twice"):
        collect([folder / "seed_0", folder / "seed_0"])
    for name in (TEXT, COPY):
        write_system(folder / "seed_1", name, [line(r) for r in records(1)[:5]], 1, attention(count=5))
    with pytest.raises(StudyError, match="seed_1: 5 questions, but 40"):
        collect(both(folder))
    with pytest.raises(StudyError, match="no evaluation of route in"):
        collect(both(folder)[:1]).require(COPY, "route")


def test_runs_of_a_folder(folder):
    (folder / "seed_10").mkdir()
    (folder / "seed_old").mkdir()
    assert runs_in(folder) == (both(folder), ["seed_10 is not finished (it has no table.json)"])
    assert runs_in(folder / "seed_0") == ([folder / "seed_0"], [])
    for path in both(folder):
        (path / "table.json").unlink()
    with pytest.raises(StudyError, match="none of seed_0, seed_1, seed_10"):
        runs_in(folder)
    with pytest.raises(StudyError, match="no such folder"):
        runs_in(folder / "nowhere")
