"""Records of the cold start, made against a stand-in teacher that is wrong, slow, rude and off format on order.

Oracle: `REPLIES`, which spells out for each kind of reply what has to come of it; the files of an uninterrupted run;
the teacher's own count of its replies; the reader and the trainer of the cold start.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2  # noqa: F401  (loaded before the first request's clock runs)
import pytest
from PIL import Image

from qwenla_jax.config.run_options import CheckpointOptions, DataOptions, EvalOptions, RunOptions
from qwenla_jax.config.schema import ConfigError
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.distill.distill_options import from_config_dict
from qwenla_jax.distill.human_review import correct
from qwenla_jax.distill.run import run
from qwenla_jax.distill.teacher import with_reflection
from qwenla_jax.recipes.distill import get_config
from qwenla_jax.text.response_format import parse
from qwenla_jax.tools.data_check import check_data
from qwenla_jax.train.loop import run as train

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    "SUMMARY": "I will count the cups.",
    "CAPTION": "A table with cups and a plate.",
    "REASONING": "Two cups stand left of the plate and one stands right of it.",
    "CONCLUSION": "3",
}
SLOW = 9.0  # seconds; requests have one
GOOD = "<REFLECTION>I look at the table again: two cups left of the plate, one right of it.</REFLECTION>"


def response(reflection="", **changes):
    parts = [f"<{name}> {text} </{name}>" for name, text in (SECTIONS | changes).items()]
    return "\n\n".join([*parts[:3], *([reflection] if reflection else []), parts[3]])


# kind of reply -> (what is sent, request by request, the last one for good; code of the rejection, None: accepted).
# A reply is a text, a status of HTTP, or seconds of silence.
REPLIES = {
    "section": ([GOOD], None),
    "whole_response": ([response(GOOD)], None),
    "code_block": ([f"```xml\n{GOOD}\n```"], None),
    "limit_then_section": ([429, GOOD], None),
    "slow_then_section": ([SLOW, GOOD], None),
    "another_conclusion": ([response(GOOD, CONCLUSION="4")], "answer_changed"),
    "another_answer": (
        ["<REFLECTION>Behind the plate is one more, so the answer is 4.</REFLECTION>"],
        "answer_changed",
    ),
    "another_reasoning": ([response(GOOD, REASONING="I count the cups.")], "section_changed"),
    "answer_in_caption": ([response(GOOD, CAPTION="A table with 3 cups and a plate.")], "answer_leak"),
    "two_reflections": ([GOOD + GOOD], "several_reflections"),
    "no_reflection": ([response()], "no_reflection"),
    "no_tags": (["I look at the table again: it is right."], "no_reflection"),
    "refusal": (["I'm sorry, but I can't help with that.", GOOD], "no_reflection"),  # one reply is enough
    "no_content": ([None], "no_reflection"),
    "empty": (["<REFLECTION></REFLECTION>"], "reflection_length"),
    "long": ([f"<REFLECTION>{'I look again. ' * 60}</REFLECTION>"], "reflection_length"),
    "late": ([response() + GOOD], "reflection_place"),
    "nested": ([f"<REFLECTION>I look. {GOOD}</REFLECTION>"], "format_nested"),
    "unclosed": ([GOOD.removesuffix("</REFLECTION>")], "format_nested"),
    "chatty": ([f"Sure! Here it is:\n{GOOD}"], "format_stray_text"),
    "control_token": (["<REFLECTION>I look at the table again.<|im_end|></REFLECTION>"], "control_token"),
    "content_filter": ([400], "no_reply"),
    "overloaded": ([500], "no_reply"),
    "slow": ([SLOW], "no_reply"),
}
ANSWERED = [kind for kind, (_, code) in REPLIES.items() if code != "no_reply"]
RESULTS = ("samples.jsonl", "answers.jsonl", "accepted.jsonl", "rejected.jsonl", "queue.jsonl")
TIMES = 2  # records of each kind


class Teacher(ThreadingHTTPServer):
    """Replies by the kind that the question names. `asked`, `answered`: requests and replies by question."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.asked, self.answered, self.lock = [], Counter(), Counter(), threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        text = body["messages"][0]["content"][-1]["text"]
        name = text.partition("Question: ")[2].split()[0]
        replies = REPLIES[name.partition("-")[0]][0]
        with server.lock:
            reply = replies[min(server.asked[name], len(replies) - 1)]
            server.asked[name] += 1
            server.bodies.append(body)
            server.answered[name] += reply is None or isinstance(reply, str)
        if isinstance(reply, float):
            time.sleep(reply)
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        message = {"choices": [{"message": {"content": reply}}], "usage": usage}
        raw = json.dumps(message).encode()
        try:
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
        except OSError:
            pass  # the client has gone

    def log_message(self, *args):
        pass


@pytest.fixture
def teacher(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Teacher() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Records as LLaVA-CoT has them, the kinds in turns; the last is not in the format."""
    folder = tmp_path_factory.mktemp("llava")
    (folder / "coco").mkdir()
    Image.new("RGB", (56, 56), "red").save(folder / "coco" / "1.png")
    names = [f"{kind}-{number}" for number in range(TIMES) for kind in REPLIES]
    with (folder / "train.jsonl").open("w") as file:
        for name in [*names, "broken"]:
            turns = [("human", f"{name} How many cups?"), ("gpt", response()[: 20 if name == "broken" else None])]
            row = {"id": name, "image": "coco/1.png", "conversations": [{"from": a, "value": b} for a, b in turns]}
            file.write(json.dumps(row) + "\n")
    return folder


def settings(teacher, dataset, **changes):
    config = get_config("cold_start")
    config.init_from = "tiny"
    config.data.source = f"llava_cot:{dataset}"
    config.teacher.update(models=("gpt",), base_url=f"http://127.0.0.1:{teacher.server_port}/v1")
    config.teacher.update(timeout_s=1.0, retries=1, backoff_s=0.01, price_prompt=1.0, price_completion=10.0)
    config.teacher.update(changes)
    return from_config_dict(config)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_results(folder, whole):
    for name in RESULTS:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The folder of an uninterrupted run, its summary and its requests."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, Teacher() as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        summary = run(settings(server, dataset), folder)
        server.shutdown()
    return folder, summary, server


def test_what_passes_and_why_the_rest_does_not(whole, dataset):
    folder, summary, server = whole
    got = {row["id"]: None for row in rows(folder / "accepted.jsonl")}
    got |= {row["id"]: row["reasons"][0]["code"] for row in rows(folder / "rejected.jsonl")}
    want = {f"{kind}-{number}": code for kind, (_, code) in REPLIES.items() for number in range(TIMES)}
    assert got == want
    assert summary["rejected_by_reason"] == dict(sorted(Counter(filter(None, want.values())).items()))
    assert {row["id"] for row in rows(folder / "queue.jsonl")} == {name for name, code in want.items() if code}
    failed = {row["id"]: row["reasons"][0]["reason"] for row in rows(folder / "rejected.jsonl")}
    assert failed["content_filter-0"].startswith("HTTP 400") and failed["overloaded-0"].startswith("HTTP 500")
    assert failed["slow-0"] == "no whole reply within 1 s"
    # 1,000 tokens at 1 a million and 100 at 10 a million for each reply; failures, which say nothing, cost nothing.
    asked = summary["teacher"]
    assert asked["requests"] >= sum(server.asked.values()) and asked["replies_without_usage"] == 0
    assert asked["cost"] == pytest.approx(0.002 * TIMES * len(ANSWERED))


def test_an_accepted_record_is_the_source_with_one_reflection(whole, dataset):
    accepted = rows(whole[0] / "accepted.jsonl")
    assert len(accepted) == 5 * TIMES
    for row in accepted:
        assert row["response"].replace(GOOD, "").split() == response().split()
        sections = parse(row["response"]).sections
        assert [part.name for part in sections] == ["SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"]
    assert with_reflection(response(), GOOD) == response(GOOD)


def test_the_request_holds_image_question_and_response(whole):
    content = whole[2].bodies[0]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "How many cups?" in content[1]["text"] and response() in content[1]["text"]
    assert "<REFLECTION>your reflection</REFLECTION>" in content[1]["text"]


@pytest.mark.parametrize("cut", range(3))
def test_a_run_cut_at_any_byte_asks_only_what_was_not_answered(whole, dataset, teacher, tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")  # beside the whole run: results name images relative to their folder
    shutil.copytree(whole[0], folder, dirs_exist_ok=True)
    log = folder / "replies.jsonl"
    with log.open("r+b") as file:
        file.truncate(random.Random(cut).randrange(log.stat().st_size))
    for name in RESULTS[cut:]:
        (folder / name).unlink()
    known = {row["id"] for row in rows_before(log) if "reply" in row}
    run(settings(teacher, dataset), folder)
    same_results(folder, whole[0])
    assert not known & set(teacher.asked) and set(teacher.asked) == {row["id"] for row in rows(log)} - known


def rows_before(log):
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]]


def test_limits_leave_records_pending_and_the_same_command_continues(whole, dataset, teacher, tmp_path):
    summary = run(settings(teacher, dataset, max_requests=10), tmp_path)
    assert summary["teacher"]["requests"] == 10 >= sum(teacher.asked.values()) > 5
    assert 0 < summary["questions_pending"] == summary["pending"] < summary["questions"] == TIMES * len(REPLIES)
    summary = run(settings(teacher, dataset, max_cost=0.03), tmp_path)
    assert 0.03 <= summary["teacher"]["cost"] < 0.03 + 8 * 0.002 and summary["questions_pending"] > 0
    run(settings(teacher, dataset), tmp_path)
    same_results(tmp_path, whole[0])
    assert max(teacher.answered.values()) == 1


@pytest.mark.slow
def test_a_killed_process_is_resumed(whole, dataset, teacher, tmp_path):
    options = settings(teacher, dataset)
    flags = [f"--config.{key}" for key in (
        "init_from=tiny", f"data.source=llava_cot:{dataset}", "teacher.models=gpt", "teacher.timeout_s=1",
        f"teacher.base_url={options.teacher.base_url}", "teacher.retries=3", "teacher.backoff_s=0.01",
        "teacher.price_prompt=1", "teacher.price_completion=10", "teacher.parallel=2",
    )]  # fmt: skip
    command = [sys.executable, "-m", "qwenla_jax", "distill", "--make=cold_start", *flags, f"--workdir={tmp_path}"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "replies.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") > 9) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and not (tmp_path / "accepted.jsonl").exists()
    known = {row["id"] for row in rows_before(log) if "reply" in row}
    before = dict(teacher.asked)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "it is resumed" in again.stdout, again.stdout + again.stderr
    same_results(tmp_path, whole[0])
    assert len(known) > 4 and all(teacher.asked[name] == before[name] for name in known)


def test_of_two_teachers_the_first_that_passes_counts(dataset, teacher, tmp_path):
    summary = run(settings(teacher, dataset, models=("a", "b"), retries=0), tmp_path)
    accepted = {row["id"]: row["sample"] for row in rows(tmp_path / "accepted.jsonl")}
    first, second = ("section", "whole_response", "code_block"), ("limit_then_section", "slow_then_section", "refusal")
    want = {kind: 0 for kind in first} | {kind: 1 for kind in second}
    assert accepted == {f"{kind}-{number}": sample for kind, sample in want.items() for number in range(TIMES)}
    assert (summary["samples"], summary["spare"]) == (2 * TIMES * len(REPLIES), len(first) * TIMES)


def test_all_may_be_left_to_a_person(whole, dataset, teacher, tmp_path):
    options = settings(teacher, dataset)
    shutil.copy(whole[0] / "replies.jsonl", tmp_path)
    run(replace(options, verify=replace(options.verify, keep="none")), tmp_path)
    queue = {row["id"]: row for row in rows(tmp_path / "queue.jsonl")}
    assert len(queue) == TIMES * len(REPLIES) and not rows(tmp_path / "accepted.jsonl")
    assert (queue["section-0"]["proposal"], queue["section-0"]["reason"]) == (response(GOOD), "")
    assert not set(teacher.asked) & {f"{kind}-{number}" for kind in ANSWERED for number in range(TIMES)}


def test_a_person_completes_the_queue(whole, dataset, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    queue = rows(tmp_path / "run" / "queue.jsonl")
    assert {row["id"]: row["proposal"] for row in queue}["overloaded-0"] == response()
    texts = [response(GOOD), response(), response(GOOD, CAPTION="Cups."), response(GOOD, CONCLUSION="4")]
    for row, text in zip(queue, texts, strict=False):
        row["response"] = text
    (tmp_path / "run" / "queue.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queue))
    assert correct(tmp_path / "run", "queue.jsonl") == 3
    (added,) = (row for row in rows(tmp_path / "run" / "accepted.jsonl") if row.get("corrected"))
    assert added["id"] == queue[0]["id"] and added["response"] == response(GOOD)


@pytest.mark.slow
def test_the_cold_start_trains_on_the_written_file(whole, tmp_path):
    options = RunOptions(
        stage="sft",
        steps=1,
        init_from="tiny",
        data=DataOptions(
            source=str(whole[0] / "accepted.jsonl"), eval_source="scenes", batch_size=2, max_response_tokens=512
        ),
        eval=EvalOptions(every=0, final_size=0),
        checkpoint=CheckpointOptions(every=0),
    )
    assert check_data(options, []).ok
    train(options, tmp_path)
    (line,) = (row for row in rows(tmp_path / "metrics.jsonl") if "train/loss" in row)
    assert line["train/loss"] > 0


def test_without_a_teacher_scenes_bring_their_reflections(tmp_path):
    config = get_config("cold_start")
    config.update(init_from="tiny")
    config.data.update(source="scenes", size=12)
    config.verify.update(min_reflection_tokens=1)
    summary = run(from_config_dict(config), tmp_path)
    assert (summary["accepted"], summary["questions"]) == (12, 12) and "teacher" not in summary
    scenes = make_source("scenes", "cold_start", seed=0, size=12, reflection_share=1.0)
    written = [(row["id"], row["response"]) for row in rows(tmp_path / "accepted.jsonl")]
    assert written == [(scenes[i].id, scenes[i].response) for i in range(12)]


def test_settings_that_cannot_be_used(dataset):
    config = get_config("cold_start")
    config.update(init_from="tiny")
    config.data.source = f"llava_cot:{dataset}"
    config.verify.update(verifiers=("rule", "agreement"), min_reflection_tokens=9, max_reflection_tokens=8)
    with pytest.raises(ConfigError) as error:
        from_config_dict(config)
    assert str(error.value).splitlines() == [
        "config.verify.agreement_min: got 2, expected at most number of config.teacher.models (1)",
        "config.verify.min_reflection_tokens: got 9, expected at most max_reflection_tokens (8)",
        "config.teacher.models: the cold_start preset needs --config.teacher.models=NAME, once a teacher",
        "config.teacher.base_url: the cold_start preset needs --config.teacher.base_url=https://HOST/v1",
    ]
