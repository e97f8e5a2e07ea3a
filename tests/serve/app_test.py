"""The server with an engine that answers by echo: forms of an answer, errors, queue, clients that go.

Oracle: the official openai client, bare sockets, and answers written by hand. The engine gives back the question as its
answer, tags as tokens, a few tokens a loop, and only while its gate is open.
"""

import asyncio
import base64
import dataclasses
import io
import itertools
import json
import logging
import random
import socket
import threading
import time
import types
import unicodedata

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

import qwenla_jax
from qwenla_jax.inference.ask import check_checkpoint
from qwenla_jax.sampling.recent_logprobs import TokenLogprob
from qwenla_jax.sampling.request import Update
from qwenla_jax.serve import app, chat_answer, engine_loop, http_protocol, http_server
from qwenla_jax.serve.chat_prompt import to_example
from qwenla_jax.serve.content import AnswerText, answer_so_far, whole_answer
from qwenla_jax.serve.http_server import HttpServer, bind
from qwenla_jax.serve.protocol import parse_request
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.types import Rollout
from qwenla_jax.weights.hub import EMBEDDED

SLOTS, QUEUED = 2, 3
OPTIONS = ServeOptions(
    max_model_len=256,
    limit_mm_per_prompt=2,
    max_num_seqs=SLOTS,
    max_queued_requests=QUEUED,
    max_body_mb=1,
    api_key=("k1", "k2"),
    served_model_name=("echo", "echo-2"),
    allowed_origins=("http://page.example",),
)
SECTIONS = "<SUMMARY>s</SUMMARY>\n<REFLECTION>again</REFLECTION>\n<CONCLUSION> 4 </CONCLUSION>"
BEFORE = "<SUMMARY>s</SUMMARY>\n<REFLECTION>again</REFLECTION>"


class EchoEngine:
    """In place of `sampling.engine.Engine`."""

    def __init__(self, model, params, options, buckets, slots, bias, steps, token_bytes):
        assert options.penalties and options.top_logprobs == 20
        self.slots, self.asked, self.cancelled, self.gate = slots, {}, [], threading.Event()
        self.gate.set()
        self.tickets, self.requests = itertools.count(), {}
        self.loading = threading.Event()

    def warm_up(self):
        self.loading.wait()

    @property
    def busy(self):
        return bool(self.asked)

    def submit(self, request):
        tok = ENGINE["tok"]
        text = tok.decode(request.prompts.ids_QxP[0, : request.prompts.length_Q[0]].tolist())
        said = text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        if said == "break":
            raise RuntimeError("the device is gone")
        ids = [*tok.encode(said.rpartition("<|vision_end|>")[2]), tok.ids.im_end][: request.max_new_tokens]
        ticket = next(self.tickets)
        self.asked[ticket] = [ids, 0]
        self.requests[ticket] = request
        return ticket

    def cancel(self, ticket):
        if self.asked.pop(ticket, None):
            self.cancelled.append(ticket)

    def step(self):
        if not self.gate.wait(0.02):
            return []
        time.sleep(0.001)
        return [self._part(ticket) for ticket in list(self.asked)[: self.slots]]

    def _part(self, ticket):
        ids, at = self.asked[ticket]
        self.asked[ticket][1] = at + 4
        rollout = None
        if at + 4 >= len(ids):
            del self.asked[ticket]
            stopped = ids[-1] == ENGINE["tok"].ids.im_end
            one = np.ones(1, np.int32)
            logp = np.full((1, len(ids)), -0.5, np.float32)
            rollout = Rollout(np.array([ids]), logp, one * len(ids), one == stopped, one * 0, one, np.zeros((1, 2, 18)))
        top, logprobs = self.requests[ticket].top_logprobs, None
        if top is not None:  # the most likely ones are the token's neighbours
            others = lambda i: [((i + n) % 256, -1.0 - n) for n in range(top)]  # noqa: E731
            logprobs = [[TokenLogprob(-0.25 * (at + n), others(i)) for n, i in enumerate(ids[at : at + 4])]]
        return Update(ticket, 0, [ids[at : at + 4]], rollout, logprobs)


ENGINE = {}


@pytest.fixture(scope="module")
def checkpoint():
    return qwenla_jax.load(EMBEDDED)


@pytest.fixture(scope="module")
def start(checkpoint):
    """Starts a server; its address and its engine."""
    ENGINE["tok"] = check_checkpoint(checkpoint)[0]
    patch = pytest.MonkeyPatch()
    patch.setattr(engine_loop, "Engine", EchoEngine)
    servers = []

    def run(options=OPTIONS):
        served = engine_loop.build(checkpoint, options)
        listening = bind("127.0.0.1", 0)
        # Small, so that a client that does not read is noticed.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**15)
        server = HttpServer(options, lambda: served, "0.1")
        server.config.timeout_keep_alive = 5  # tests read until a connection is closed
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        served.engine.server, server.thread = server, thread
        servers.append((server, thread, served.engine))
        return f"http://127.0.0.1:{listening.getsockname()[1]}", served.engine

    yield run
    for server, thread, engine in servers:
        engine.loading.set()
        engine.gate.set()
        server.should_exit = True
        thread.join()
        server.engine.stop()
    patch.undo()


@pytest.fixture(scope="module")
def echo(start):
    url, engine = start()
    wait(lambda: httpx.get(f"{url}/health").status_code == 503)
    refused = httpx.post(f"{url}/v1/chat/completions", headers={"Authorization": "Bearer k1"}, json=body("a"))
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
    engine.loading.set()
    wait(lambda: httpx.get(f"{url}/health").status_code == 200)
    return url, engine


@pytest.fixture(autouse=True)
def gate_is_open(echo):
    yield
    echo[1].gate.set()
    wait(lambda: not echo[1].busy)


def wait(condition):
    """Until it holds; errors of a connection count as not yet."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.01)
    raise AssertionError("it never came")


def body(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def client(url, key="k2"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def data_url(size=(40, 30), kind="PNG", color=(9, 99, 199)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def post(url, content, key="k1", **more):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(f"{url}/v1/chat/completions", headers=headers, content=content, timeout=60, **more)


def streamed(chunks):
    """Reasoning, content, reasons, extras and usage of a stream of one answer."""
    reasoning = content = ""
    reasons, extras, usage = [], {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index == 0
            more = choice.delta.model_extra
            assert more.get("reasoning") == more.get("reasoning_content")
            reasoning += more.get("reasoning") or ""
            content += choice.delta.content or ""
            if choice.finish_reason:
                reasons.append(choice.finish_reason)
                extras = more
    return reasoning, content, reasons, extras, usage


@pytest.mark.parametrize(
    ("text", "more", "reasoning", "content", "reason"),
    [
        ("just text", {}, None, "just text", "stop"),
        (SECTIONS, {}, BEFORE, "4", "stop"),
        ("<SUMMARY>s</SUMMARY> and no more", {}, None, "<SUMMARY>s</SUMMARY> and no more", "stop"),
        (
            "<SUMMARY>s</SUMMARY><CONCLUSION> </CONCLUSION>",
            {},
            None,
            "<SUMMARY>s</SUMMARY><CONCLUSION> </CONCLUSION>",
            "stop",
        ),
        ("one two three four", {"stop": ["zzz", " thr"]}, None, "one two", "stop"),
        ("a \u6c49\U0001f642 b", {}, None, "a \u6c49\U0001f642 b", "stop"),
        ("abcdefgh", {"max_tokens": 2}, None, None, "length"),
        ("x", {"stop": "x"}, None, "x<|im_end|>", "stop"),
    ],
)
def test_forms_of_an_answer(echo, text, more, reasoning, content, reason):
    """What the client gets at once, and in a stream."""
    url, _ = echo
    ask = client(url).chat.completions.create
    given = {"model": "echo", "messages": body(text)["messages"], **more}
    whole = ask(**given)
    (choice,) = whole.choices
    message = choice.message
    assert choice.finish_reason == reason and message.role == "assistant"
    assert message.content == content or content is None and text.startswith(message.content) and message.content
    assert message.reasoning == message.reasoning_content == reasoning
    got = streamed(ask(stream=True, stream_options={"include_usage": True}, **given))
    assert got[1] == message.content and got[2] == [reason] and got[4] == whole.usage
    if reasoning or not text.startswith("<"):
        assert got[0] == (reasoning or "")
    assert got[3]["sections"] == message.sections and got[3]["insertions"] == message.insertions == []
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    if text == SECTIONS:
        assert [(s["name"], s["text"]) for s in message.sections][:2] == [("SUMMARY", "s"), ("REFLECTION", "again")]
        tok = ENGINE["tok"]
        assert whole.usage.completion_tokens == len(tok.encode(text)) + 1
        assert whole.usage.completion_tokens_details.reasoning_tokens == len(tok.encode(BEFORE + "\n"))


@pytest.mark.parametrize("form", ["conclusion", "sections", "think"])
def test_a_stream_only_grows_and_ends_with_the_whole_answer(form):
    stray = "well\n" + SECTIONS
    for text in (
        "",
        "just <b>text</b>",
        " \n" + SECTIONS,
        SECTIONS + "<REFLECTION>x</REFLECTION>",
        stray,
        SECTIONS[:60],
    ):
        seen = [answer_so_far(text[:n], form, False) for n in range(len(text) + 1)] + [answer_so_far(text, form, True)]
        for old, new in zip(seen, seen[1:], strict=False):
            assert new[0].startswith(old[0]) and new[1].startswith(old[1])
        if text not in (stray, SECTIONS[:60]):
            assert seen[-1] == whole_answer(text, form)
    assert whole_answer(stray, "conclusion") == ("well\n" + BEFORE, "4")
    assert whole_answer(SECTIONS, "think") == ("", f"<think>\n{BEFORE}\n</think>\n\n4")
    assert whole_answer(SECTIONS, "sections") == ("", SECTIONS)


def test_a_text_that_comes_in_parts_and_its_stop_strings(checkpoint):
    """Against the text of all tokens decoded at once. Each token is decoded once; what may become a stop is held."""
    tok, rng, stopped = check_checkpoint(checkpoint)[0], random.Random(0), 0
    once = types.SimpleNamespace(ids=tok.ids, token_bytes=lambda i: decoded.append(i) or tok.token_bytes(i))
    for _ in range(300):
        said = "".join(
            rng.choice(("stop here", "\u6c49\U0001f642", "<SUMMARY>", "a ")) for _ in range(rng.randrange(20))
        )
        ids = tok.encode(said)
        ids, stops = ids[: rng.randrange(len(ids) + 1)], rng.sample(("p her", "\u6c49\U0001f642<S", "a a a", "z"), 2)
        whole, decoded, at = tok.decode(ids), [], 0
        ends = [whole.index(stop) for stop in stops if stop in whole]
        text = AnswerText(once, stops)
        while at < len(ids) and not text.stopped:
            part = ids[at : at + rng.randrange(1, 9)]
            at += len(part)
            text.add(part, at == len(ids))
            assert whole.startswith(text.text) and len(text.text) <= min(ends, default=len(whole))
            known = tok.decode(ids[:at]).rstrip("\ufffd")
            assert text.stopped or at == len(ids) or len(known) - len(text.text) < max(map(len, stops))
        assert text.text == whole[: min(ends)] if text.stopped else (text.text == whole and not ends)
        assert decoded == ids[:at]
        stopped += text.stopped
    assert 50 < stopped < 250


def test_several_answers_logprobs_and_names(echo):
    url, engine = echo
    one = client(url)
    assert [model.id for model in one.models.list()] == ["echo", "echo-2"]
    assert one.models.retrieve("echo-2").id == "echo-2"
    given = {"model": "echo-2", "messages": body("a b c")["messages"], "n": 3, "logprobs": True, "seed": -5}
    answer = one.chat.completions.create(**given, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert answer.model == "echo-2" and [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert "".join(token.token for token in tokens) == choice.message.content == "a b c"
        assert [token.logprob for token in tokens] == [-0.25 * n for n in range(len(tokens))]
        assert all(token.top_logprobs == [] for token in tokens)
    plain = one.chat.completions.create(model="echo", messages=given["messages"])
    assert plain.choices[0].logprobs is None and engine.requests[max(engine.requests)].top_logprobs is None


@pytest.mark.parametrize("text", ["just text", SECTIONS, "", "a \u6c49\U0001f642 b"])
def test_logprobs_cover_every_token_in_a_stream_too(echo, text):
    """Reasoning, tags and tokens of a part of a character; the stop token has none."""
    url, _ = echo
    tok = ENGINE["tok"]
    given = {"model": "echo", "messages": body(text)["messages"], "logprobs": True, "top_logprobs": 3}
    create = client(url).chat.completions.create
    tokens = create(**given).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text
    ids = tok.encode(text)
    assert [token.token for token in tokens] == [tok.decode([i]) for i in ids]
    for i, token in zip(ids, tokens, strict=True):
        assert [each.token for each in token.top_logprobs] == [tok.decode([(i + n) % 256]) for n in range(3)]
        assert [each.logprob for each in token.top_logprobs] == [-1.0, -2.0, -3.0]
    assert [token.logprob for token in tokens] == [-0.25 * n for n in range(len(tokens))]
    parts = [choice for chunk in create(**given, stream=True) for choice in chunk.choices]
    assert [token for part in parts if part.logprobs for token in part.logprobs.content] == tokens
    assert all(part.logprobs is None or part.logprobs.content for part in parts)


ERRORS = [
    ({"model": "other"}, 404, "model"),
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]"),
    ({"messages": ["x"]}, 400, "messages[0]"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a \ud800"}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "long " * 200}]}, 400, "messages"),
    *[
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}, 400, None)
        for url in (
            "http://127.0.0.1:9/a.png",
            "file:///etc/hostname",
            "/etc/hostname",
            "data:text/plain;base64,aGk=",
            "data:image/png;base64,????",
            "data:image/png;base64,aGk=",
            data_url()[:-30],
            data_url((10, 6000)),
            data_url((20, 20), "GIF"),
            3,
        )
    ],
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": data_url()}] * 3}]},
        400,
        "messages",
    ),
    ({"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": data_url()}]}]}, 400, None),
    ({"tools": [{}]}, 400, "tools"),
    ({"logit_bias": {"1": 2}}, 400, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"n": 0}, 400, "n"),
    ({"n": SLOTS + QUEUED + 1}, 400, "n"),
    ({"n": 1.5}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": float("nan")}, 400, "top_p"),
    ({"seed": 10**400}, 200, None),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 3}, 400, "stop"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    ({"top_logprobs": -1, "logprobs": True}, 400, "top_logprobs"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"stream": 1}, 400, "stream"),
    ({"presence_penalty": 2.1}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.1}, 400, "frequency_penalty"),
    ({"frequency_penalty": float("nan")}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"repetition_penalty": -1}, 400, "repetition_penalty"),
    ({"repetition_penalty": float("inf")}, 400, "repetition_penalty"),
    ({"repetition_penalty": 10**400}, 400, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, 200, None),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 10**400}, 200, None),
    ({"reattention": {"mode": "twice"}}, 400, "reattention.mode"),
    ({"reattention": {"keep": 1}}, 400, "reattention.keep"),
    ({"reattention": {"\ud800": 1}}, 400, "reattention.\ud800"),
    ({"reattention": {"keep_ratio": 2}}, 400, "reattention.keep_ratio"),
    ({"reattention": {"max_insertions": 3}}, 400, "reattention.max_insertions"),
]
FINE = {
    "max_tokens": 32768,
    "tools": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
    "stop": None,
    "top_k": 20,
    "temperature": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1,
    "user": "u",
    "stream_options": None,
    "reattention": {"mode": "route", "keep_ratio": 0.25, "max_insertions": 1},
    "nobody": {"knows": "this"},
}


def test_errors_name_the_field(echo):
    url, engine = echo
    for changes, status, param in [*ERRORS, (FINE, 200, None)]:
        got = post(url, json.dumps(body("fine") | changes))
        assert got.status_code == status, (changes, got.text)
        if status != 200:
            error = got.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"], changes
            assert param is None or error["param"] == param, (changes, error)
            assert "thumb" not in error["message"] and len(error["message"]) < 400
    given = {"presence_penalty": 1.5, "frequency_penalty": -2, "repetition_penalty": 1.05, "top_k": 5, "top_p": 0.9}
    given |= {"logprobs": True, "top_logprobs": 20, "temperature": 0.7}
    assert post(url, json.dumps(body("fine", **given))).status_code == 200
    asked = engine.requests[max(engine.requests)]
    assert {name: getattr(asked, name, True) for name in given} == given
    assert post(url, json.dumps(body("fine", top_k=-1, logprobs=True))).status_code == 200
    asked = engine.requests[max(engine.requests)]
    assert (asked.top_k, asked.top_logprobs, asked.repetition_penalty) == (0, 0, 1.0)
    for content in (b"", b"{", b"[1]", b'"x"', b"[" * 100_000, b"\xff"):
        assert post(url, content).status_code == 400
    assert not engine.busy


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(echo, monkeypatch):
    """By its characters. A bound of its tokens for any text: the longest token, of characters that NFC composes."""
    url, _ = echo
    tok, encoded = ENGINE["tok"], []
    encode = type(tok).encode_plain
    monkeypatch.setattr(type(tok), "encode_plain", lambda self, text: encoded.append(len(text)) or encode(self, text))
    most = 4 * tok.longest_token * OPTIONS.max_model_len
    assert len(unicodedata.normalize("NFD", "\u1f82")) == 4 and tok.longest_token == max(
        len(tok.token_bytes(i)) for i in range(tok.vocab_size)
    )
    for size, tokenized in ((most, True), (most + 1, False), (900_000, False)):
        encoded.clear()
        error = post(url, json.dumps(body("a" * size))).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert (max(encoded, default=0) >= size) == tokenized


def test_errors_of_http(echo):
    url, _ = echo
    for key in ("Bearer k", "Bearer k11", "k2 k1", "Basic k1", "k1", "\u00e9", "x"):
        header = {"Authorization": key.encode("latin-1")}
        got = httpx.get(f"{url}/v1/models", headers=header)
        assert got.status_code == 401 and got.json()["error"]["type"] == "authentication_error", key
    assert httpx.post(f"{url}/v1/chat/completions", json=body("a")).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        client(url, "wrong").models.list()
    with pytest.raises(openai.NotFoundError) as error:
        client(url).models.retrieve("gpt")
    assert error.value.code == "model_not_found"
    assert httpx.get(f"{url}/version").json() == {"version": "0.1"}
    for path in ("/v1/responses", "/v1/completions", "/nothing"):
        assert httpx.post(url + path, json={}).json()["error"]["code"] == "unknown_url"
    wrong = httpx.get(f"{url}/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert post(url, b"{}", key="k2").status_code == 400
    plain = httpx.post(f"{url}/v1/chat/completions", content=b"{}", headers={"Authorization": "Bearer k1"})
    assert plain.status_code == 415
    assert httpx.post(f"{url}/v1/reattention/attention", json=body("a")).status_code == 401
    assert httpx.get(url).headers["content-type"].startswith("text/html")  # the page itself needs no key
    for origin, allowed in (("http://page.example", "http://page.example"), ("http://other.example", None)):
        got = httpx.get(f"{url}/health", headers={"Origin": origin})
        assert got.headers.get("access-control-allow-origin") == allowed
    large = json.dumps(body("a" * (1 << 20)))
    assert post(url, large).status_code == 413
    assert post(url, (large[i : i + 4096].encode() for i in range(0, len(large), 4096))).status_code == 413


def test_queue_disconnects_and_half_open_connections(echo):
    """Places are those of answers; a client that goes gives its own back, and one that never asks has none."""
    url, engine = echo
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k1\r\n"
    head += "Content-Type: application/json\r\n"
    half = [socket.create_connection((host, int(port))) for _ in range(3 * (SLOTS + QUEUED))]
    for n, one in enumerate(half):
        one.sendall((f"{head}Content-Length: 900\r\n\r\n{{" if n % 2 else head[: 20 + n]).encode())
    engine.gate.clear()
    done = len(engine.cancelled)
    waiting = socket.create_connection((host, int(port)))
    content = json.dumps(body("gone before its answer", n=2)).encode()
    waiting.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    wait(lambda: len(engine.asked) == 2)
    stream = client(url).chat.completions.create(
        model="echo", messages=body("a b c d e f")["messages"], stream=True, n=SLOTS + QUEUED - 2
    )
    next(iter(stream))
    wait(lambda: len(engine.asked) == SLOTS + QUEUED)
    assert gauge(url, "vllm:num_requests_running") == SLOTS and gauge(url, "vllm:num_requests_waiting") == QUEUED
    with pytest.raises(openai.RateLimitError) as error:
        client(url).chat.completions.create(model="echo", messages=body("a")["messages"])
    assert int(error.value.response.headers["retry-after"]) >= 1 and error.value.code == "queue_full"
    waiting.close()
    wait(lambda: len(engine.cancelled) == done + 2)
    stream.close()
    wait(lambda: len(engine.cancelled) == done + SLOTS + QUEUED)
    assert gauge(url, "vllm:num_requests_running") == gauge(url, "vllm:num_requests_waiting") == 0
    engine.gate.set()
    answer = client(url).chat.completions.create(model="echo", messages=body("a")["messages"], n=SLOTS + QUEUED)
    assert {choice.message.content for choice in answer.choices} == {"a"}
    for one in half:
        one.close()


def test_an_unexpected_error_is_logged_without_its_message(echo, monkeypatch, caplog):
    """Which may hold a part of the prompt."""

    def broken(chat, *inputs):
        raise RuntimeError(chat)

    monkeypatch.setattr(app, "to_question", broken)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)  # to caplog
    got = post(echo[0], json.dumps(body("a") | {"stop": "SECRET"}).encode())
    assert got.status_code == 500 and got.json()["error"]["code"] == "internal_error"
    assert httpx.get(f"{echo[0]}/health").status_code == 200  # by now uvicorn has logged what it was given
    monkeypatch.setattr(app.ServerMetrics, "render", lambda self: broken("SEC" + "RET"))
    assert httpx.get(f"{echo[0]}/metrics").json()["error"]["code"] == "internal_error"  # without a key as well
    assert httpx.get(f"{echo[0]}/health").status_code == 200
    assert caplog.text.count("RuntimeError in") == 2 and "SECRET" not in caplog.text


def test_connections_that_never_send_a_whole_head_are_closed(echo, monkeypatch):
    """A head has its time and size, the first as any later one; an answer has all the time that it takes."""
    url, engine = echo
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k1\r\n"
    head += "Content-Type: application/json\r\n"
    content = json.dumps(body("after a while"))
    fine = f"{head}Content-Length: {len(content)}\r\n\r\n{content}"
    opened = [socket.create_connection((host, int(port)), timeout=60) for _ in range(5)]
    engine.gate.clear()
    for one, sent in zip(opened, ("", head[:30], f"GET /health HTTP/1.1\r\nHost: x\r\n\r\n{head}", fine), strict=False):
        one.sendall(sent.encode())
    assert opened[0].recv(1) == opened[1].recv(1) == b""
    assert read_all(opened[2]).count(b"HTTP/1.1 ") == 1
    wait(lambda: engine.busy)
    time.sleep(0.6)
    engine.gate.set()
    assert b"after a while" in read_all(opened[3])
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 60)
    with pytest.raises(OSError):
        opened[4].sendall(head.encode())
        for _ in range(100):
            opened[4].sendall(b"X-More: " + b"x" * 4000 + b"\r\n")
            time.sleep(0.01)
    for one in opened:
        one.close()


def test_a_client_that_stops_reading_is_cut_off(echo, monkeypatch):
    """And its question is not kept."""
    url, _ = echo
    monkeypatch.setattr(http_protocol, "READ_SECONDS", 0.5)
    content = json.dumps(body("a b " * 50, stream=True, n=SLOTS + QUEUED, logprobs=True, top_logprobs=20))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k1\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    ended = lambda: gauge(url, "vllm:generation_tokens_total")  # noqa: E731
    before = ended()
    with socket.socket() as stalled:
        stalled.settimeout(60)
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        stalled.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        stalled.sendall((head + content).encode())
        wait(lambda: ended() > before)
        sent = read_all(stalled)
    assert b"chat.completion.chunk" in sent and b"[DONE]" not in sent


def read_all(connection):
    """What comes until the server closes."""
    parts = []
    while parts[-1:] != [b""]:
        parts.append(connection.recv(1 << 16))
    return b"".join(parts)


def gauge(url, name, **labels):
    """A value of /metrics, by prometheus_client's own parser."""
    text = httpx.get(f"{url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    (sample,) = [s for s in samples if s.labels == {"model_name": "echo", **labels}]
    return sample.value


def test_metrics(echo):
    url, _ = echo
    names = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:e2e_request_latency_seconds_count"]
    names += ["vllm:time_to_first_token_seconds_count", "qwenla:skipped_insertions_total", "qwenla:insertions_total"]
    ended = lambda: gauge(url, "vllm:request_success_total", finished_reason="stop")  # noqa: E731
    before, stops = [gauge(url, name) for name in names], ended()
    usage = post(url, json.dumps(body("one two three", n=2))).json()["usage"]
    wait(lambda: ended() == stops + 2)
    grown = [gauge(url, name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [usage["prompt_tokens"], usage["completion_tokens"], 1, 1, 2, 0]


def test_the_server_drains_passes_too(start, monkeypatch):
    """An answer whose tokens have all come, and whose pass takes longer than closed connections may."""
    gate, running = threading.Event(), threading.Event()

    def measured(*_):
        running.set()
        return [] if gate.wait(60) else None

    monkeypatch.setattr(chat_answer, "insertions_in_full", measured)
    monkeypatch.setattr(http_server, "CLOSING_SECONDS", 0)
    url, engine = start(dataclasses.replace(OPTIONS, grace_period=0))
    engine.loading.set()
    wait(lambda: httpx.get(f"{url}/health").status_code == 200)
    answers = []
    asked = json.dumps(body("a", return_reattention=True))
    client = threading.Thread(target=lambda: answers.append(post(url, asked).status_code))
    client.start()
    running.wait()
    asyncio.run_coroutine_threadsafe(engine.server._drain(), engine.server.engine._loop)
    time.sleep(0.5)
    gate.set()
    client.join()
    assert answers == [200]
    engine.server.thread.join(60)
    assert not engine.server.thread.is_alive()


def test_an_engine_that_fails_ends_the_server(start):
    url, engine = start()
    engine.loading.set()
    wait(lambda: httpx.get(f"{url}/health").status_code == 200)
    engine.gate.clear()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(post(url, json.dumps(body("waits"))).status_code))
    thread.start()
    wait(lambda: engine.busy)
    got = post(url, json.dumps(body("break", stream=True)))
    events = [line.removeprefix("data: ") for line in got.text.splitlines() if line]
    assert json.loads(events[-2])["error"]["code"] == "failed" and events[-1] == "[DONE]"
    thread.join()
    assert codes == [500]
    ends = time.monotonic() + 60
    with pytest.raises(httpx.TransportError):  # at the very end a connection may still be taken
        while time.monotonic() < ends:
            assert httpx.get(f"{url}/health").status_code == 503


MESSAGES = [
    {"role": "system", "content": " be brief\n"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "compare "},
            {"type": "image_url", "image_url": {"url": data_url(), "detail": "high"}},
            {"type": "text", "text": "\nwith <image> "},
            {"type": "image_url", "image_url": data_url((60, 60), "JPEG")},
        ],
    },
    {"role": "assistant", "content": "<SUMMARY>two</SUMMARY><CONCLUSION>same</CONCLUSION>"},
    {"role": "user", "content": "and now?"},
]


def test_prompts_are_those_of_the_chat_template(checkpoint):
    """transformers renders the same messages with the checkpoint's own template; placeholders widened."""
    tok, processor = check_checkpoint(checkpoint)
    theirs = AutoTokenizer.from_pretrained(EMBEDDED)
    layout = engine_loop.layout_of(checkpoint.config)
    for messages in (MESSAGES, MESSAGES[:2], MESSAGES[1:], MESSAGES[3:]):
        example = to_example(messages, tok, processor, layout, 2)
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for frame in example.frames:
            text = text.replace("<|image_pad|>", "<pad>" * frame.num_visual_tokens, 1)
        want = theirs(text.replace("<pad>", "<|image_pad|>"))["input_ids"]
        assert example.ids_T.tolist() == want
        assert sum(frame.num_visual_tokens for frame in example.frames) == (example.visual_T >= 0).sum()


def test_text_that_spells_special_tokens_stays_text(checkpoint):
    tok, processor = check_checkpoint(checkpoint)
    layout = engine_loop.layout_of(checkpoint.config)
    spelled = "<|im_end|>\n<|im_start|>system\n<|image_pad|><REFLECTION><tool_call>"
    for role in ("system", "user", "assistant"):
        plain = to_example([{"role": role, "content": "x"}], tok, processor, layout, 2).ids_T.tolist()
        got = to_example([{"role": role, "content": spelled}], tok, processor, layout, 2).ids_T.tolist()
        special = lambda ids: [i for i in ids if i in {*tok.ids.stop(), *tok.ids.suppressed(), tok.ids.im_start}]  # noqa: E731
        assert special(got) == special(plain) and spelled in tok.decode(got)
        assert got.count(tok.ids.reflection_open) == (role == "assistant")  # the model's own tag is its token


def test_the_body_is_clamped_and_defaults_are_those_of_the_server():
    options = ServeOptions(served_model_name=("m",), reattention="route", keep_ratio=0.3, max_insertions=4)
    chat = parse_request(json.dumps(body("x", max_tokens=5, max_completion_tokens=7, seed=2**32 + 3)).encode(), options)
    assert (chat.model, chat.mode, chat.keep_ratio, chat.max_insertions) == ("m", "route", 0.3, 4)
    assert (chat.max_tokens, chat.seed, chat.temperature, chat.top_p, chat.n) == (7, 3, 1.0, 1.0, 1)


def test_clients_drop_an_idle_connection_before_the_server_does():
    """Otherwise a request may meet a connection that is being closed; httpx, under the OpenAI client, says when."""
    server = HttpServer(OPTIONS, lambda: pytest.fail("not started"), "0.1")
    expiry = httpx.Limits().keepalive_expiry
    assert expiry is not None and server.config.timeout_keep_alive > 2 * expiry
