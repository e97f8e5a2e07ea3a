"""Runs of the embedded checkpoint: what they leave, that an interruption leaves no trace, and the take-back.

Oracles: files of an uninterrupted run, byte for byte; the training data's own reader; the scenes themselves.
"""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.distill import run as run_module
from qwenla_jax.distill.distill_options import (
    DistillOptions,
    JudgeOptions,
    QuestionOptions,
    SamplingOptions,
    VerifyOptions,
)
from qwenla_jax.distill.human_review import correct
from qwenla_jax.distill.judges import Judges
from qwenla_jax.distill.run import run
from qwenla_jax.distill.sample_answers import sample_numbers
from qwenla_jax.text.answers.match import extract_conclusion, matches
from qwenla_jax.text.response_format import parse
from qwenla_jax.train.loop import RunRefused
from qwenla_jax.utils import jsonl_store

ROOT = Path(__file__).resolve().parents[2]
SMALL = DistillOptions(
    data=QuestionOptions(size=10, batch_size=4),
    sampling=SamplingOptions(samples=3, temperature=1.2),
    verify=VerifyOptions(verifiers=("rule", "agreement"), agreement_min=2),
)
RESULTS = ("samples.jsonl", "answers.jsonl", "accepted.jsonl", "rejected.jsonl", "queue.jsonl", "summary.json")
FLAGS = [
    "--config=configs/distill.py", "--config.data.size=10", "--config.data.batch_size=4", "--config.sampling.samples=3",
    "--config.sampling.temperature=1.2",
]  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    """Every file but the lock, by relative path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The model is loaded, and each sampler compiled, once for all runs in this process."""
    build, kept = run_module.build, {}

    def cached(options):
        if options not in kept:
            runtime, params = build(options)
            kept[options] = runtime, params
        return kept[options]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build", cached)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    summary = run(SMALL, folder)
    assert summary == json.loads((folder / "summary.json").read_text())
    return folder


def test_every_sample_is_there_with_its_verdicts(whole):
    answers, source = rows(whole / "answers.jsonl"), SceneSource(0, "train", 10)
    assert [(a["index"], a["sample"]) for a in answers] == [(i, g) for i in range(10) for g in range(3)]
    for answer in answers:
        record = source[answer["index"]]
        assert (answer["id"], answer["question"], answer["answer"]) == (record.id, record.question, record.answer)
        assert 1 <= answer["tokens"] <= 64
        rule, agreement = answer["verdicts"]
        conclusion = extract_conclusion(answer["text"])
        right = parse(answer["text"]).ok and matches(conclusion, record.answer)
        assert (rule["verifier"], rule["passed"]) == ("rule", right) and rule["reason"]
        mates = [extract_conclusion(a["text"]) for a in answers if a["index"] == answer["index"]]
        assert agreement["passed"] == (conclusion is not None and mates.count(conclusion) >= 2)


def test_accepted_rejected_and_queue_share_out_the_questions(whole):
    answers = rows(whole / "answers.jsonl")
    accepted, rejected, queue = (rows(whole / f"{name}.jsonl") for name in ("accepted", "rejected", "queue"))
    summary = json.loads((whole / "summary.json").read_text())
    passing = {}
    for answer in answers:
        if all(verdict["passed"] for verdict in answer["verdicts"]):
            passing.setdefault(answer["id"], answer)
    # Both kinds of question must occur, or the test shows nothing.
    assert 0 < len(passing) < 10
    assert [(a["id"], a["response"], a["sample"]) for a in accepted] == [
        (a["id"], a["text"], a["sample"]) for a in passing.values()
    ]
    assert [(a["id"], a["sample"]) for a in rejected] == [
        (a["id"], a["sample"]) for a in answers if not all(verdict["passed"] for verdict in a["verdicts"])
    ]
    assert all(a["reasons"] and a["reasons"][0]["reason"] for a in rejected)
    assert {q["id"] for q in queue} == {a["id"] for a in answers} - set(passing)
    assert all(q["response"] == "" and q["reason"] and q["proposal"] for q in queue)
    counts = Counter(a["status"] for a in answers)
    assert (summary["questions"], summary["samples"], summary["queue"]) == (10, 30, len(queue))
    assert (summary["accepted"], summary["rejected"], summary["spare"]) == (
        counts["accepted"], counts["rejected"], counts["spare"],
    )  # fmt: skip
    assert sum(summary["rejected_by_reason"].values()) == len(rejected)


def test_the_training_reader_takes_the_accepted(whole):
    source = make_source(str(whole / "accepted.jsonl"), "cold_start", seed=0, whole=True)
    scenes = SceneSource(0, "train", 10)
    by_id = {scenes[i].id: scenes[i] for i in range(10)}
    for index in range(len(source)):
        record, scene = source[index], by_id[source[index].id]
        assert (record.question, record.answer, record.kind) == (scene.question, scene.answer, scene.kind)
        assert np.array_equal(np.asarray(record.images[0]), np.asarray(scene.images[0]))
        assert record.response is not None and parse(record.response).ok


def test_numbers_of_samples_by_hand():
    assert sample_numbers(5, 2, 3).tolist() == [1280, 1281, 1282, 1536, 1537, 1538]
    assert sample_numbers(2**24 - 1, 1, 256)[-1] == 2**32 - 1


def test_samples_depend_on_seed_and_question_and_not_on_batch_or_k(whole, tmp_path):
    texts = [(a["text"], a["tokens"]) for a in rows(whole / "samples.jsonl")]
    assert len(set(texts)) > 15
    fewer = replace(SMALL, data=QuestionOptions(size=7, batch_size=3), sampling=SamplingOptions(2, 1.2))
    run(fewer, tmp_path / "k")
    assert [(a["text"], a["tokens"]) for a in rows(tmp_path / "k" / "samples.jsonl")] == [
        texts[3 * i + g] for i in range(7) for g in range(2)
    ]
    # Scenes are drawn from the seed too: the same questions from a file, with another seed.
    shutil.copytree(whole / "images", tmp_path / "images")
    lines = {a["id"]: a for a in rows(whole / "samples.jsonl") if a["sample"] == 0}.values()
    keys = ("id", "image", "question", "answer")
    questions = [{k: a[k] for k in keys} for a in lines]
    questions[0]["system"] = "count"
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    data = QuestionOptions(source=str(tmp_path / "q.jsonl"), size=None, batch_size=4)
    run(replace(SMALL, seed=1, data=data), tmp_path / "seed")
    other = rows(tmp_path / "seed" / "samples.jsonl")
    first = {(a["id"], a["sample"]): a["text"] for a in rows(whole / "samples.jsonl")}
    assert sum(first[a["id"], a["sample"]] != a["text"] for a in other) > len(other) / 3
    assert {a["id"]: a["system"] for a in other if "system" in a} == {questions[0]["id"]: "count"}
    # Images of a file stay where they are, and the training reader finds them from the run's folder.
    assert not (tmp_path / "seed" / "images").exists()
    assert other[0]["image"].startswith("../images/")
    assert len(make_source(str(tmp_path / "seed" / "accepted.jsonl"), "cold_start", seed=0, whole=True)) > 0


@pytest.mark.parametrize("cut", range(8))
def test_a_run_cut_at_any_byte_ends_as_the_whole_one(whole, tmp_path, cut):
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    draw = random.Random(cut)
    size = draw.randrange((whole / "samples.jsonl").stat().st_size)
    with (folder / "samples.jsonl").open("r+b") as file:
        file.truncate(size)
    # A run that was killed while sampling has no results yet; one killed later may have any part of them.
    for name in RESULTS[1:]:
        if draw.random() < 0.5:
            (folder / name).unlink()
    # Images come before the answers to them: those of a batch that is not on disk may be there, or half there.
    on_disk = (whole / "samples.jsonl").read_bytes()[:size].count(b"\n") // 12 * 4
    for index in range(on_disk, 10):
        if draw.random() < 0.5:
            image = folder / "images" / f"scene-0-train-{index}.png"
            image.rename(image.with_name(f".{image.stem}.new.png"))
    (folder / ".answers.new.jsonl").write_bytes(b"{")
    run(SMALL, folder)
    assert contents(folder) == contents(whole)


def test_a_finished_run_does_nothing_again(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "again")
    monkeypatch.setattr(run_module, "build", lambda options: pytest.fail("the model is loaded again"))
    run(SMALL, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


@pytest.mark.slow
def test_a_killed_process(whole, tmp_path):
    """SIGKILL as soon as a batch is on the disk, then the same command again, in processes of their own."""
    command = [sys.executable, "launch/distill.py", *FLAGS, f"--workdir={tmp_path}"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "samples.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and not (tmp_path / "accepted.jsonl").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "continuing after question" in again.stdout, again.stdout + again.stderr
    assert contents(tmp_path) == contents(whole)


def test_other_settings_are_refused_by_name(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunRefused, match="config.sampling.temperature: 1.2 in the folder, 0.7 now"):
        run(replace(SMALL, sampling=SamplingOptions(3, 0.7)), tmp_path / "run")
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "settings.json").unlink()
    with pytest.raises(RunRefused, match="settings.json is missing"):
        run(SMALL, tmp_path / "run")


def test_a_log_of_other_questions_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    log = tmp_path / "run" / "samples.jsonl"
    text = log.read_text().replace("scene-0-train-9", "scene-0-train-8")
    log.write_text(text)
    with pytest.raises(RunRefused, match="question 9 is 'scene-0-train-8' there, but 'scene-0-train-9' in the source"):
        run(SMALL, tmp_path / "run")


def test_all_accepted_are_kept_under_their_own_ids(whole, tmp_path):
    run(replace(SMALL, verify=VerifyOptions(verifiers=("rule",), keep="all")), tmp_path)
    accepted = rows(tmp_path / "accepted.jsonl")
    expected = {}
    for a in rows(whole / "answers.jsonl"):
        if a["verdicts"][0]["passed"]:
            expected.setdefault((a["id"], a["text"]), f"{a['id']}.{a['sample']}")
    assert [a["id"] for a in accepted] == list(expected.values())
    assert len(make_source(str(tmp_path / "accepted.jsonl"), "cold_start", seed=0, whole=True)) == len(expected)


# ---- Judges ----------------------------------------------------------------------------------------------------------


def judged(**changes):
    judges = JudgeOptions(models=("a", "b"), base_url="http://127.0.0.1:9/v1", parallel=3, retries=0)
    verify = VerifyOptions(verifiers=("rule", "judges"))
    return replace(SMALL, verify=verify, judges=replace(judges, **changes))


@pytest.fixture
def sent(monkeypatch):
    """Requests that would go out. Judge a says incorrect to answers of an even number of characters, b of three."""
    out = []

    def send(self, body):
        message = json.loads(body)
        text = message["messages"][0]["content"][1]["text"]
        length = len(text.split("The model's answer:\n")[1].split("\n\nThe answer is")[0])
        out.append((message["model"], text))
        bad = length % {"a": 2, "b": 3}[message["model"]] == 0
        return f"VERDICT: {'IN' * bad}CORRECT", {"prompt_tokens": 100, "completion_tokens": 1}

    monkeypatch.setattr(Judges, "_send", send)
    return out


def test_judges_decide_and_a_limit_is_gone_on_from(sent, tmp_path):
    summary = run(judged(price_prompt=1.0), tmp_path / "whole")
    assert summary["judges"]["requests"] == len(sent) == len(set(sent)) and summary["questions_pending"] == 0
    assert summary["judges"]["cost"] == pytest.approx(len(sent) * 1e-4)
    for answer in rows(tmp_path / "whole" / "answers.jsonl"):
        size = len(answer["text"])
        if answer["verdicts"][-1]["verifier"] == "judges":
            assert answer["verdicts"][-1]["passed"] == (not (size % 2 == 0 and size % 3 == 0))
    count = len(sent)
    assert count > 6
    run(judged(price_prompt=1.0), tmp_path / "whole")
    assert len(sent) == count  # nothing is paid twice
    sent.clear()
    # In parts of 5 requests, and with the model's samples lost on the way.
    for part in range(5, count + 5, 5):
        summary = run(judged(price_prompt=1.0, max_requests=part), tmp_path / "parts")
        assert summary["judges"]["requests"] == len(sent) == min(part, count)
        assert bool(summary["questions_pending"]) == (part < count)
        if part == 5:
            assert summary["pending"] > 0 and summary["questions"] == 10
            (tmp_path / "parts" / "samples.jsonl").unlink()
    for name in RESULTS:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_judging_cut_at_any_byte_ends_as_the_whole_one(sent, tmp_path):
    run(judged(), tmp_path / "whole")
    raw, total = (tmp_path / "whole" / "judgements.jsonl").read_bytes(), len(sent)
    for cut in range(6):
        size = random.Random(cut).randrange(len(raw))
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "judgements.jsonl").write_bytes(raw[:size])
        (folder / "accepted.jsonl").unlink()
        sent.clear()
        run(judged(), folder)
        assert len(sent) == total - raw[:size].count(b"\n")  # what was paid for and written down is not paid again
        for name in RESULTS:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_keeps_what_a_person_brought_in_and_is_writing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    queue = rows(tmp_path / "run" / "queue.jsonl")
    conclusion = f"<CONCLUSION>{queue[0]['answer']}</CONCLUSION>"
    queue[0]["response"] = f"<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>{conclusion}"
    queue[1]["response"] = "half a"
    (tmp_path / "run" / "queue.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queue))
    assert correct(tmp_path / "run", "queue.jsonl") == 1
    before = contents(tmp_path / "run")
    run(SMALL, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert rows(tmp_path / "run" / "accepted.jsonl")[-1]["id"] == queue[0]["id"]
    assert rows(tmp_path / "run" / "queue.jsonl")[0]["response"] == "half a"


def test_settings_are_plain_values(whole):
    assert json.loads((whole / jsonl_store.SETTINGS).read_text())["sampling"] == dataclasses.asdict(SMALL.sampling)


def test_answers_that_look_again_part_at_the_reflection(tmp_path):
    """With the same random numbers, what stands before the first tag does not know of the images behind it."""
    texts = {}
    for mode in ("none", "copy"):
        options = replace(SMALL, reattention=ReattentionOptions(mode=mode))
        run(options, tmp_path / mode)
        texts[mode] = [row["text"] for row in rows(tmp_path / mode / "samples.jsonl")]
    parted = 0
    for plain, copied in zip(texts["none"], texts["copy"], strict=True):
        assert plain.partition("<REFLECTION>")[0] == copied.partition("<REFLECTION>")[0]
        assert "<REFLECTION>" in plain or plain == copied
        parted += plain != copied
    assert parted > 0


def test_all_of_a_file_is_answered(tmp_path):
    """Training holds a tenth of a file's records out; here nothing is."""
    SceneSource(0, "train")[0].images[0].save(tmp_path / "scene.png")
    row = {"image": "scene.png", "question": "How many objects are there?", "answer": "2", "level": [3, None]}
    ids = [f"question {number}" for number in range(24)]
    text = "".join(json.dumps({"id": name} | row) + "\n" for name in ids)
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    data = QuestionOptions(source=str(tmp_path / "questions.jsonl"), size=None, batch_size=4)
    run(replace(SMALL, data=data), tmp_path / "run")
    assert {r["id"] for r in rows(tmp_path / "run" / "samples.jsonl")} == set(ids)
    results = rows(tmp_path / "run" / "accepted.jsonl") + rows(tmp_path / "run" / "queue.jsonl")
    assert len(results) == 24 and all(r["level"] == [3, None] for r in results)  # for rewards of a later stage
