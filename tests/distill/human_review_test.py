"""Taking back a corrected queue, on a run of four questions written by hand: no model is needed.

Oracle: the training data's own reader, and outcomes spelled out.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qwenla_jax.config.schema import to_dict
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.distill.distill_options import DistillOptions, SamplingOptions, VerifyOptions
from qwenla_jax.distill.human_review import correct
from qwenla_jax.distill.judges import JudgeLog
from qwenla_jax.distill.results import write_results
from qwenla_jax.utils import jsonl_store

ROOT = Path(__file__).resolve().parents[2]


def good(answer):
    return f"<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING><CONCLUSION>{answer}</CONCLUSION>"


# id, right answer, the two samples: only those of the first question and of the one with options pass.
QUESTIONS = (
    ("fine", "1", good("1"), good("one")),
    ("bad", "red", good("blue"), good("blue")),
    ("split", "3", good("3"), "no answer"),
    ("choice", "B", good("dark blue"), good("B. dark blue")),
    ("cut", "yes", good("yes")[:-1], good("no")),  # cut off, so it has no conclusion; the other has the format at least
)


def make(folder, verifiers=("rule", "agreement")):
    options = DistillOptions(sampling=SamplingOptions(samples=2), verify=VerifyOptions(verifiers=verifiers))
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "p.png")
    base = {"kind": "k", "image": "images/p.png", "question": "What?", "tokens": 5, "stopped": True}
    lines = [
        {"index": i, "sample": g, "id": name, "answer": answer, "text": text}
        | base
        | ({"options": ["red", "dark blue"]} if name == "choice" else {})
        for i, (name, answer, *texts) in enumerate(QUESTIONS)
        for g, text in enumerate(texts)
    ]
    jsonl_store.append(folder / "samples.jsonl", lines)
    jsonl_store.write_json(folder / "settings.json", to_dict(options))
    write_results(folder, options, JudgeLog(folder / "judgements.jsonl"))
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    """Every file but the lock, by relative path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def queued(tmp_path):
    folder = make(tmp_path / "run")
    queue = rows(folder / "queue.jsonl")
    proposals = [(row["id"], row["proposal"], row["response"]) for row in queue]
    assert proposals == [("bad", good("blue"), ""), ("split", good("3"), ""), ("cut", good("no"), "")]
    assert queue[0]["reason"] == "rule: concludes 'blue', the right answer is 'red'"
    return folder, queue


def write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_good_lines_come_in_and_the_others_stay_named(queued, capsys):
    folder, queue = queued
    done = rows(folder / "accepted.jsonl")
    first, second, *rest = queue
    first |= {"response": f" {good(first['answer'])}\n", "note": "easy"}
    second |= {"response": good("nonsense"), "note": "hard"}
    stranger = {"id": "nobody", "response": good("1")}
    taken = {"id": done[0]["id"], "response": good("1")}
    write(folder / "queue.jsonl", [first, second, *rest, "{broken\n", stranger, taken, dict(second), "\n"])
    assert correct(folder, "queue.jsonl") == 5
    message, n = capsys.readouterr().out, len(queue)
    for line, text in (
        (2, f"id {second['id']!r}: concludes 'nonsense', the right answer is {second['answer']!r}"),
        (n + 1, "not JSON"),
        (n + 2, "id 'nobody' is no question of this run"),
        (n + 3, f"id {done[0]['id']!r} has an accepted answer already"),
        (n + 4, f"id {second['id']!r}: concludes"),
    ):
        assert f"refused: {folder / 'queue.jsonl'}:{line}: {text}" in message
    assert f"taken back: 1 new, 0 replaced, 0 known before; {len(rest)} still open, 5 refused" in message
    accepted = rows(folder / "accepted.jsonl")
    assert accepted[:-1] == done
    assert accepted[-1] == {key: first[key] for key in ("id", "image", "question", "answer", "kind")} | {
        "response": good(first["answer"]),
        "corrected": True,
    }
    assert len(make_source(str(folder / "accepted.jsonl"), "cold_start", seed=0, whole=True)) == len(done) + 1
    # The queue holds what is open, what was typed wrong, and what cannot be understood.
    left = (folder / "queue.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in left[: n - 1]] == [row["id"] for row in queue[1:]]
    assert json.loads(left[0])["response"] == second["response"] and json.loads(left[0])["note"] == "hard"
    assert left[n - 1 :] == ["{broken", json.dumps(stranger)]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["corrected"], summary["queue"]) == (1, n - 1)


def test_twice_is_once_and_a_second_thought_replaces(queued, tmp_path, capsys):
    folder, queue = queued
    for row in queue:
        row["response"] = good(row["answer"])
    write(tmp_path / "mine.jsonl", [*queue[::-1], queue[0] | {"response": good(queue[0]["answer"]) + " "}])
    assert correct(folder, str(tmp_path / "mine.jsonl")) == 1
    assert f"mine.jsonl:{len(queue) + 1}: id {queue[0]['id']!r} stands in an earlier line" in capsys.readouterr().out
    before = contents(folder)
    accepted = [row["id"] for row in rows(folder / "accepted.jsonl")]
    assert len(accepted) == len(QUESTIONS) and accepted[-len(queue) :] == [row["id"] for row in queue[::-1]]
    assert before["queue.jsonl"] == b""
    write(tmp_path / "mine.jsonl", queue)
    assert correct(folder, str(tmp_path / "mine.jsonl")) == 0
    assert contents(folder) == before and f"0 new, 0 replaced, {len(queue)} known" in capsys.readouterr().out
    queue[0]["response"] = good(queue[0]["answer"]).replace(">r<", ">better<")
    write(tmp_path / "mine.jsonl", queue[:1])
    assert correct(folder, str(tmp_path / "mine.jsonl")) == 0
    accepted = rows(folder / "accepted.jsonl")
    assert len(accepted) == len(QUESTIONS) and ">better<" in accepted[-1]["response"]
    # A kill between the log and the results, and in the middle of the log's last line.
    after = contents(folder)
    (folder / "accepted.jsonl").write_bytes(before["accepted.jsonl"])
    with (folder / "corrections.jsonl").open("r+b") as file:
        file.truncate(len(after["corrections.jsonl"]) - 9)
    assert correct(folder, str(tmp_path / "mine.jsonl")) == 0
    assert contents(folder) == after


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response": "just words"}, "the format breaks at character 0: no_tags"),
        ({"response": good("<|im_end|>")}, "holds <|im_end|>"),
        ({"response": 3}, "response is 3, expected text"),
        ({"response": None}, "response is None, expected text"),
        ({"answer": "other"}, "answer is 'other', but the run asked with"),
        ({"id": 5}, "id 5 is no question of this run"),
    ],
)
def test_refusals(queued, tmp_path, capsys, change, message):
    folder, queue = queued
    before = contents(folder)
    write(tmp_path / "mine.jsonl", [queue[0] | {"response": good(queue[0]["answer"])} | change])
    assert correct(folder, str(tmp_path / "mine.jsonl")) == 1
    assert message in capsys.readouterr().out and contents(folder) == before


def test_where_the_verifiers_leave_the_answer_to_judges_so_does_the_take_back(tmp_path):
    folder = make(tmp_path / "run", verifiers=("format", "agreement"))
    queue = rows(folder / "queue.jsonl")
    assert [row["id"] for row in queue] == ["split", "cut"]  # "bad" agrees with itself
    write(folder / "queue.jsonl", [queue[0] | {"response": good("in other words")}])
    assert correct(folder, "queue.jsonl") == 0
    assert rows(folder / "accepted.jsonl")[-1]["response"] == good("in other words")


def launch(*args):
    return subprocess.run(
        [sys.executable, "launch/distill.py", *args], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_the_command(queued, tmp_path):
    folder, queue = queued
    bad = launch(f"--workdir={folder}", "--take_back=none.jsonl")
    assert bad.returncode == 1 and "there is no file 'none.jsonl'" in bad.stderr and "Traceback" not in bad.stderr
    empty = launch(f"--workdir={tmp_path / 'nothing'}", "--take_back=queue.jsonl")
    assert empty.returncode == 1 and "holds no distillation run" in empty.stderr
    assert not (tmp_path / "nothing").exists()
    none = launch(f"--workdir={folder}")
    assert none.returncode == 1 and "--config is missing" in none.stderr
    queue[0]["response"] = "words"
    write(folder / "queue.jsonl", queue)
    refused = launch(f"--workdir={folder}", "--take_back=queue.jsonl")
    assert refused.returncode == 1 and "queue.jsonl:1: id" in refused.stdout
