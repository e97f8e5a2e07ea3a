"""Judges against a small HTTP server that answers, stalls, fails and sends nonsense on order."""

import base64
import io
import json
import os
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from qwenla_jax.distill.distill_options import JudgeOptions
from qwenla_jax.distill.judges import JudgeLog, Judges, read_verdict
from qwenla_jax.distill.verify import Vote


def completion(text, prompt=1000, reply=10):
    usage = {"prompt_tokens": prompt, "completion_tokens": reply}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class Server(ThreadingHTTPServer):
    """Answers the requests for a model from its list of replies; the last one stays. `seen` holds all requests.

    A reply is a text, a (status, headers) pair, seconds to stall, or bytes to send as they are.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen, self.lock = {}, [], threading.Lock()
        self.drip = 0.0

    def asked(self, model):
        return sum(body["model"] == model for _, _, body in self.seen)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            left = server.replies[body["model"]]
            reply = left.pop(0) if len(left) > 1 else left[0]
        status, headers = 200, {}
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "VERDICT: CORRECT"
        if isinstance(reply, tuple):
            (status, headers), raw = reply, b'{"error": "told"}'
        else:
            raw = reply if isinstance(reply, bytes) else json.dumps(completion(reply)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        step = 8 if server.drip else len(raw)
        try:
            for start in range(0, len(raw), step):
                self.wfile.write(raw[start : start + step])
                time.sleep(server.drip)
        except OSError:
            pass  # the client has gone

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


YES, NO = "It is. VERDICT: CORRECT", "It is not. VERDICT: INCORRECT"
FAIL = (500, {})


@pytest.fixture
def make(server, tmp_path):
    """Judges of the server with the replies given by model."""
    Image.new("RGB", (2000, 100), "red").save(tmp_path / "p.png")

    def make(replies, key=None, pauses=None, **changes):
        server.replies = replies
        options = JudgeOptions(
            models=tuple(replies), base_url=f"http://127.0.0.1:{server.server_port}/v1/", timeout_s=5.0, retries=2
        )
        log = JudgeLog(tmp_path / "j.jsonl")
        sleep = (pauses if pauses is not None else []).append
        return Judges(replace(options, **changes), log, tmp_path, key, sleep), log

    return make


def row(sample=0, text="<CONCLUSION>2</CONCLUSION>", question="How many?"):
    return {"id": "q", "sample": sample, "image": "p.png", "question": question, "answer": "2", "text": text}


def test_votes_are_those_of_the_models_in_order_and_the_request_is_whole(make, server):
    judges, log = make({"a": [YES], "b": [NO], "c": ["hard to say"]}, key="secret")
    assert judges.votes(row(question="How {many}?")) == (Vote.CORRECT, Vote.INCORRECT, Vote.ABSTAIN)
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    img, text = body["messages"][0]["content"]
    head, _, data = img["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and image.size == (1024, 51) and image.getpixel((9, 9)) == (255, 0, 0)
    for part in ("How {many}?", "Right answer: 2", "<CONCLUSION>2</CONCLUSION>"):
        assert part in text["text"]
    assert body["temperature"] == 0.0 and body["max_tokens"] == 512
    assert (log.requests, log.prompt_tokens, log.completion_tokens, log.without_usage) == (3, 3000, 30, 0)
    prices = replace(JudgeOptions(), price_prompt=2.0, price_completion=100.0)
    assert log.cost(prices) == pytest.approx(3000 * 2e-6 + 30 * 1e-4)


def test_what_was_said_is_not_asked_again_in_a_later_run(make, server, tmp_path):
    make({"a": [YES], "b": ["no verdict"]})[0].votes(row())
    raw = (tmp_path / "j.jsonl").read_bytes()
    (tmp_path / "j.jsonl").write_bytes(raw + b'{"key": "torn')
    judges, log = make({"a": [NO], "b": [NO], "c": [NO]})
    assert judges.votes(row()) == (Vote.CORRECT, Vote.ABSTAIN, Vote.INCORRECT)
    assert len(server.seen) == 3 and server.asked("a") == 1 and log.requests == 3
    assert (tmp_path / "j.jsonl").read_bytes().startswith(raw) and b"torn" not in (tmp_path / "j.jsonl").read_bytes()
    # Another answer, or another question about the same image, is another request; so is a new judge's setting.
    judges.votes(row(text="else"))
    assert server.asked("a") == 2
    make({"a": [NO]}, temperature=0.5)[0].votes(row())
    assert server.asked("a") == 3


def test_failures_are_tried_again_with_growing_pauses(make, server):
    pauses = []
    judges, log = make({"a": [FAIL, b"not json", YES]}, pauses=pauses, backoff_s=0.5)
    assert judges.votes(row()) == (Vote.CORRECT,)
    assert pauses == [0.5, 1.0] and log.requests == 3
    pauses.clear()
    judges, _ = make({"b": [(429, {"Retry-After": "7"}), (503, {"Retry-After": "9999"}), YES]}, pauses=pauses)
    assert judges.votes(row()) == (Vote.CORRECT,)
    assert pauses == [7.0, 60.0]  # as long as it asks for, but no longer than a minute


@pytest.mark.parametrize(
    "reply, requests, message",
    [
        (FAIL, 3, "HTTP 500"),
        ((400, {}), 1, 'HTTP 400: {"error": "told"}'),
        ((302, {"Location": "/elsewhere"}), 1, "HTTP 302"),  # the key must not go elsewhere
        (b"<html>", 3, "not a chat completion"),
        (b'{"choices": []}', 3, "not a chat completion"),
        (b'{"choices": [{"message": {"content": 3}}]}', 3, "not a chat completion"),
        (b"[]", 3, "not a chat completion"),
    ],
)
def test_a_judge_that_fails_abstains_and_is_asked_again_next_time(make, server, reply, requests, message, tmp_path):
    judges, log = make({"a": [reply], "b": [YES]})
    assert judges.votes(row()) == (Vote.ABSTAIN, Vote.CORRECT)
    assert server.asked("a") == requests and log.requests == requests + 1 and judges.stopped is None
    failed = json.loads((tmp_path / "j.jsonl").read_text().splitlines()[0])
    assert failed["requests"] == requests and message in failed["error"]
    judges, log = make({"a": [NO], "b": [YES]})
    assert log.failure(failed["key"]) == failed["error"] and log.said(failed["key"]) == Vote.ABSTAIN
    assert judges.votes(row()) == (Vote.INCORRECT, Vote.CORRECT)
    assert log.failure(failed["key"]) is None and server.asked("b") == 1


def test_a_slow_judge_times_out(make, server):
    judges, log = make({"a": [1.0]}, timeout_s=0.1, retries=0)
    begin = time.monotonic()
    assert judges.votes(row()) == (Vote.ABSTAIN,)
    assert time.monotonic() - begin < 0.8
    server.drip = 0.02  # a reply of some 25 parts, each within the socket's patience
    judges, log = make({"b": [YES]}, timeout_s=0.15, retries=0)
    begin = time.monotonic()
    assert judges.votes(row()) == (Vote.ABSTAIN,)
    assert time.monotonic() - begin < 0.4


def test_a_image_that_is_none_is_named(make, server, tmp_path):
    judges, _ = make({"a": [YES]})
    (tmp_path / "p.png").unlink()
    os.mkfifo(tmp_path / "p.png")
    for name in ("p.png", "gone.png"):
        with pytest.raises(ValueError, match=name):
            judges.votes(row() | {"image": name})
    assert server.seen == []


def test_no_server_at_all(make):
    judges, _ = make({"a": [YES]}, base_url="http://127.0.0.1:9/v1", retries=0)
    assert judges.votes(row()) == (Vote.ABSTAIN,)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_stops_at_once_and_is_not_an_abstention(make, server, status):
    judges, _ = make({"a": [(status, {})], "b": [YES]})
    assert judges.votes(row()) == (Vote.PENDING, Vote.PENDING)
    assert f"does not serve a: HTTP {status}" in judges.stopped and len(server.seen) == 1
    assert make({"a": [YES], "b": [YES]})[0].votes(row()) == (Vote.CORRECT, Vote.CORRECT)


def test_twenty_failures_in_a_row_stop(make, server):
    judges, _ = make({"a": [FAIL]}, retries=0)
    for number in range(25):
        judges.votes(row(text=str(number)))
    assert len(server.seen) == 20 and "20 requests in a row failed" in judges.stopped


def test_the_number_of_requests_is_limited_over_all_runs(make, server):
    judges, log = make({"a": [FAIL, YES], "b": [YES], "c": [YES]}, max_requests=3)
    assert judges.votes(row()) == (Vote.CORRECT, Vote.CORRECT, Vote.PENDING)
    assert "max_requests: 3" in judges.stopped and log.requests == len(server.seen) == 3
    judges, _ = make({"a": [YES], "b": [YES], "c": [NO]}, max_requests=3)
    assert judges.votes(row()) == (Vote.CORRECT, Vote.CORRECT, Vote.PENDING) and len(server.seen) == 3
    judges, _ = make({"a": [YES], "b": [YES], "c": [NO]}, max_requests=4)
    assert judges.votes(row()) == (Vote.CORRECT, Vote.CORRECT, Vote.INCORRECT) and len(server.seen) == 4


def test_a_limit_between_two_attempts_leaves_the_judge_to_be_asked(make, server):
    judges, _ = make({"a": [FAIL]}, max_requests=1)
    assert judges.votes(row()) == (Vote.PENDING,)
    assert make({"a": [YES]})[0].votes(row()) == (Vote.CORRECT,)


def test_the_cost_is_limited(make, server):
    # 1,000 tokens at 1 a million and 10 at 100 a million: 0.002 a request, so the third would begin at 0.004.
    prices = {"price_prompt": 1.0, "price_completion": 100.0, "max_cost": 0.0035}
    judges, log = make({"a": [YES], "b": [YES], "c": [YES], "d": [YES]}, **prices)
    assert judges.votes(row()) == (Vote.CORRECT, Vote.CORRECT, Vote.PENDING, Vote.PENDING)
    assert len(server.seen) == 2 and "max_cost: 0.004 of 0.0035" in judges.stopped


def test_a_reply_without_usage_counts_as_such(make):
    bare = json.dumps({"choices": [{"message": {"content": [{"type": "text", "text": YES}]}}]}).encode()
    empty = json.dumps({"choices": [{"message": {"content": None}}], "usage": {"prompt_tokens": "x"}}).encode()
    judges, log = make({"a": [bare], "b": [empty], "c": [YES]})
    assert judges.votes(row()) == (Vote.CORRECT, Vote.ABSTAIN, Vote.CORRECT)
    assert (log.without_usage, log.prompt_tokens) == (2, 1000)


@pytest.mark.parametrize(
    "reply, vote",
    [
        ("VERDICT: CORRECT", "correct"),
        ("**Verdict:** incorrect.", "incorrect"),
        ("I first thought VERDICT: CORRECT, but\nVERDICT: INCORRECT", "incorrect"),
        ("Incorrect.", "incorrect"),
        ("correct", "correct"),
        ("The answer is not correct", "abstain"),
        ("VERDICT: CORRECTED", "abstain"),
        ("", "abstain"),
    ],
)
def test_verdicts_are_read_by_their_form(reply, vote):
    assert read_verdict(reply) == vote
