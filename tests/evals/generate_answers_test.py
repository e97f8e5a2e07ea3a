"""A model's answers to a benchmark: restarts, modes, questions with several images or none, and the score.

Oracles: an uninterrupted run's bytes; the sampler on one question alone; scoring the saved file.
"""

import base64
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenla_jax.cli import evaluate
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.evals import generate_answers as module
from qwenla_jax.evals.generate_answers import generate
from qwenla_jax.evals.generate_options import make_options
from qwenla_jax.evals.registry import score_files

ROOT = Path(__file__).resolve().parents[2]
SIZE = 10
SMALL = {"batch_size": 3, "max_response_tokens": 64, "max_prompt_tokens": 256}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]
NONE, SEVERAL, OF_ANOTHER = 4, 7, 8  # questions with no image, with two, with that of question 2


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def write_gold(path, invalid=()):
    """Open questions about scenes as VLMEvalKit's table."""
    source = SceneSource(3, "held_out", SIZE)
    lines = ["index\tid\tquestion\tquestion_type\tanswer\timage"]
    for index in range(SIZE):
        record = source[index]
        image = {
            NONE: "",
            SEVERAL: repr([png(record.images[0]), png(source[0].images[0].resize((56, 84)))]).replace("'", '""'),
            OF_ANOTHER: "2",
        }.get(index, png(record.images[0]))
        image = "A" * 100 if index in invalid else image
        image = f'"{image}"' if index == SEVERAL else image
        lines.append(f"{index}\tq{index}\t{record.question}\topen\t{record.answer}\t{image}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def gold(tmp_path_factory):
    return write_gold(tmp_path_factory.mktemp("gold") / "questions.tsv")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The model is loaded, and each sampler compiled, once for all runs in this process."""
    build, kept = module.build, {}

    def cached(options):
        if options not in kept:
            runtime, params = build(options)
            kept[options] = runtime, params
        return kept[options]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build", cached)
        yield


def answer(gold, folder, **changed):
    notes = []
    options = make_options({"task": "mmmu", **SMALL, **changed}, [gold])
    return generate(options, [gold], folder, note=notes.append), notes


@pytest.fixture(scope="module")
def whole(gold, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    summary, notes = answer(gold, folder)
    return folder, summary, notes


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def test_every_question_is_answered_in_its_order(whole):
    folder, summary, notes = whole
    result = rows(folder / "predictions.jsonl")
    assert [row["id"] for row in result] == [f"q{n}" for n in range(SIZE)]
    assert all(1 <= row["tokens"] <= 64 for row in result) and rows(folder / "unusable.jsonl") == []
    assert set(result[0]) == {"id", "prediction", "tokens", "stopped", "inserted", "skipped", "kind"}
    assert summary["without_an_image"] == 1 and summary["with_several_images"] == 1
    assert summary["batches"] == 4 and 2 <= summary["shapes"] <= 4
    logged = rows(folder / "answers.jsonl")
    assert logged[0]["id"] == f"q{SEVERAL}"  # the largest first
    assert sorted(row["id"] for row in logged) == sorted(row["id"] for row in result)
    assert any(note.startswith("compiled ") for note in notes)


def test_answers_are_those_of_each_question_alone(whole, gold):
    """What a question is answered does not depend on its neighbours in the batch; image 8 is that of question 2."""
    import numpy as np

    from qwenla_jax.data.record import Record
    from qwenla_jax.inference.responses import texts_of
    from qwenla_jax.inference.sampler import Sampler

    options = make_options({"task": "mmmu", **SMALL}, [gold])
    runtime, params = module.build(options.inference)
    source = SceneSource(3, "held_out", SIZE)
    two = (source[SEVERAL].images[0], source[0].images[0].resize((56, 84)))
    images = {NONE: (), SEVERAL: two, OF_ANOTHER: source[2].images}
    items = module.asked_items(options, [gold])
    buckets = module.buckets_of(runtime, options, module.measure(runtime, options, items)[0])
    sampler = Sampler(runtime, runtime.sample_options(1, 0.0, 1.0), 3, buckets)
    for index in (0, NONE, SEVERAL, OF_ANOTHER):
        record = Record("x", images.get(index, source[index].images), source[index].question, "", None, "")
        vision, prompts = runtime.collate_prompts([runtime.example(False)(record)], buckets, 3)
        rollout = sampler(params, vision, prompts, 0, np.zeros(3, np.uint32))
        assert texts_of(rollout, runtime.tokenizer)[0] == rows(whole[0] / "predictions.jsonl")[index]["prediction"]


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_log_is_gone_on_with_byte_for_byte(whole, gold, tmp_path, seed):
    for name in ("answers.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    log = tmp_path / "answers.jsonl"
    log.write_bytes(log.read_bytes()[: random.Random(seed).randrange(log.stat().st_size)])
    assert answer(gold, tmp_path)[0] == whole[1]
    assert contents(tmp_path) == contents(whole[0])


def test_a_foreign_log_and_other_settings_are_refused(whole, gold, tmp_path):
    for name, content in contents(whole[0]).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="other settings") as error:
        answer(gold, tmp_path, keep_ratio=0.25, reattention="route")
    message = ["--keep_ratio: 0.5 in the folder, 0.25 now", "--reattention: 'none' in the folder, 'route' now"]
    assert str(error.value).splitlines()[1:] == message
    other = tmp_path / "questions.tsv"
    other.write_text(gold.read_text().replace("open", "opened", 1))
    with pytest.raises(ValueError, match="--gold: .*questions.tsv"):
        answer(other, tmp_path)
    (tmp_path / "predictions.jsonl").unlink()
    log = tmp_path / "answers.jsonl"
    log.write_text(log.read_text().replace('"id": "q7"', '"id": "q77"'))
    with pytest.raises(ValueError, match=r"answers.jsonl:1: answers 'q77', expected 'q7'"):
        answer(gold, tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"settings.json is missing"):
        answer(gold, tmp_path)


def test_other_weights_of_the_same_size_are_seen(gold, tmp_path):
    model = shutil.copytree(ROOT / "qwenla_jax" / "assets" / "tiny", tmp_path / "model")
    (weights,) = model.glob("*.safetensors")
    content = weights.read_bytes()
    signed = lambda: make_options({"task": "mmmu", "model": str(model)}, [gold]).weights  # noqa: E731
    before = signed()
    for place in (-1, len(content) // 2, 20_000):
        changed = bytearray(content)
        changed[place] ^= 1
        weights.write_bytes(changed)
        assert signed() != before
    weights.write_bytes(content)
    assert signed() == before


@pytest.fixture(scope="module")
def without_reattention(gold, tmp_path_factory):
    folder = tmp_path_factory.mktemp("none") / "out"
    answer(gold, folder, temperature=1.0)  # greedy, this model never reflects
    return rows(folder / "predictions.jsonl")


@pytest.mark.parametrize("mode", ["copy", "route"])
def test_reattention_changes_answers_from_the_reflection_on(gold, without_reattention, tmp_path, mode):
    summary, _ = answer(gold, tmp_path / mode, reattention=mode, temperature=1.0)
    before, after = without_reattention, rows(tmp_path / mode / "predictions.jsonl")
    tag = "<REFLECTION>"
    assert [r["prediction"].partition(tag)[0] for r in before] == [r["prediction"].partition(tag)[0] for r in after]
    reflecting = [row for row in after if tag in row["prediction"]]
    assert reflecting and all(row["inserted"] + row["skipped"] >= 1 for row in reflecting)
    assert summary["insertions"] == sum(row["inserted"] for row in after) >= 1
    assert after[NONE]["inserted"] == 0  # it has no image to look at
    assert all(row["inserted"] == 0 for row in before)


def test_unusable_questions_are_named_and_counted(tmp_path):
    gold = write_gold(tmp_path / "questions.tsv", invalid=(1, 6))
    with pytest.raises(ValueError, match=r"2 of 10 questions cannot be used, such as 'q1', 'q6': .*missing=wrong"):
        answer(gold, tmp_path / "out")
    assert not (tmp_path / "out" / "settings.json").exists()
    flags = ["--task=mmmu", f"--gold={gold}", "--model=tiny", f"--workdir={tmp_path / 'out'}", *FLAGS]
    assert evaluate.main([*flags, "--missing=wrong"]) == 0
    out = tmp_path / "out"
    assert [(row["id"], row["reason"]) for row in rows(out / "unusable.jsonl")] == [("q1", "format"), ("q6", "format")]
    result = json.loads((out / "score.json").read_text())
    assert result["counts"]["without_prediction_as_wrong"] == 2 and result["counts"]["questions"] == SIZE
    assert result["generation"]["unusable"] == result["generation"]["unusable/format"] == 2
    assert len(rows(out / "predictions.jsonl")) == SIZE - 2


def test_a_prompt_too_long_and_a_question_without_text(whole, gold, tmp_path):
    with pytest.raises(ValueError, match=r"questions cannot be used.*'q7': the prompt has \d+ tokens, \d+ of them"):
        answer(gold, tmp_path, max_prompt_tokens=rows_tokens(gold))
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"id": "a", "answer": "red", "question_type": "short-answer"}) + "\n")
    with pytest.raises(ValueError, match="'a': it has no text"):
        answer(bare, tmp_path)


def rows_tokens(gold):
    """The longest prompt of a question with one image."""
    options = make_options({"task": "mmmu", **SMALL}, [gold])
    usable, _ = module.measure(module.build(options.inference)[0], options, module.asked_items(options, [gold]))
    return max(one.prompt for one in usable if one.images < 2)


def test_the_command_answers_and_scores(gold, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--task=mmmu", f"--gold={gold}", "--model=tiny", f"--workdir={out}", *FLAGS]
    assert evaluate.main([*flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "score.json").read_text())
    generation = printed.pop("generation")
    assert printed == score_files("mmmu", [out / "predictions.jsonl"], [gold]).to_json()
    assert generation["answered"] == printed["counts"]["questions"] == SIZE
    before = contents(out)
    assert evaluate.main(flags) == 0  # all is there: nothing is answered again
    assert "all questions are answered" in capsys.readouterr().err and contents(out) == before
    # A part of the questions is scored as that part.
    assert evaluate.main([*flags, f"--workdir={tmp_path / 'part'}", "--size=3"]) == 0
    assert json.loads((tmp_path / "part" / "score.json").read_text())["counts"]["questions"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=tiny"], "--workdir is missing"),
        (["--model=nowhere", "--workdir=x"], "--model: nowhere: no such folder"),
        (["--model=tiny", "--workdir=x", "--prompt=short"], "prompt: got 'short', expected structured, plain, or"),
        (["--model=tiny", "--workdir=x", "--reattention=look"], "--reattention: got 'look'"),
        (["--model=tiny", "--workdir=x", "--keep_ratio=2"], "--keep_ratio: got 2"),
        (["--model=tiny", "--workdir=x", "--score=a.json"], "expected either --score=FILE, or --model=DIR"),
        ([], "expected either --score=FILE, or --model=DIR"),
        (["--score=a.json", "--keep_ratio=0.5"], "--keep_ratio, --workdir: only with --model"),
    ],
)
def test_wrong_flags_are_refused_by_name(gold, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--task=mmmu", f"--gold={gold}", *flags]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_scoring_alone_does_not_start_jax(gold, whole):
    code = (
        "import sys; from qwenla_jax.cli import evaluate;"
        f"assert evaluate.main(['--task=mmmu', '--gold={gold}', '--score={whole[0] / 'predictions.jsonl'}']) == 0;"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_command_ends_as_if_it_had_not_been(gold, whole, tmp_path):
    flags = ["--task=mmmu", f"--gold={gold}", "--model=tiny", f"--workdir={tmp_path}", *FLAGS]
    command = [sys.executable, "launch/evaluate.py", *flags]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "answers.jsonl"
    while child.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = contents(tmp_path)
    assert {name: result[name] for name in contents(whole[0])} == contents(whole[0])


@pytest.mark.slow
def test_mathvision_goes_through(shared_data, tmp_path):
    gold = shared_data / "mathvision" / "test.jsonl"
    flags = ["--task=mathvision", f"--gold={gold}", "--model=tiny", f"--workdir={tmp_path}", "--size=6"]
    flags += ["--max_pixels=12544", "--max_response_tokens=32", "--max_prompt_tokens=512", "--batch_size=3"]
    assert evaluate.main([*flags, "--prompt=plain", "--noalgebra"]) == 0
    result = json.loads((tmp_path / "score.json").read_text())
    assert result["counts"]["questions"] == result["generation"]["answered"] == 6
    ids = [json.loads(line)["id"] for line in gold.read_text().splitlines()[:6]]
    assert [row["id"] for row in rows(tmp_path / "predictions.jsonl")] == ids
