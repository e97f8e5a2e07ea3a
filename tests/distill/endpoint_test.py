"""Judges behind a socket that drips, stalls, breaks off, lies about lengths and sends junk.

Oracle: the clock, and what may come of a request: a vote, or an abstention that is logged and counted. 2,000 random
replies and 300 random exchanges; `QWENLA_FUZZ=100000 pytest tests/distill/endpoint_test.py` is the long form, and
`QWENLA_FUZZ_SEED` repeats a seed.
"""

import contextlib
import json
import os
import random
import socket
import threading
import time

import pytest
from measure import peak_growth, slower_than

from qwenla_jax.config.schema import ConfigError, to_dict
from qwenla_jax.distill.distill_options import DistillOptions, JudgeOptions, VerifyOptions, from_config_dict
from qwenla_jax.distill.endpoint import Endpoint, Reply, address_problem, read_key
from qwenla_jax.distill.judges import JudgeLog, Judges, read_completion
from qwenla_jax.distill.verify import Vote
from qwenla_jax.utils.jsonl_store import StoreError

CASES = int(os.environ.get("QWENLA_FUZZ", "2000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
KEY = 'sk-Tr0ub4dor&3/%41"x'
GOOD = json.dumps(
    {
        "id": "c1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "So be it. VERDICT: CORRECT"}}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010},
    }
).encode()
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
WHOLE = OK + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)


class Server:
    """Takes one connection after the other; `play` is what each is sent: bytes, and seconds to wait."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.play, self.heard, self.end = [WHOLE], [], False
        threading.Thread(target=self.run_insertions, daemon=True).start()

    def run_insertions(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self.answer, args=(connection, self.play), daemon=True).start()

    def answer(self, connection, play):
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            head, _, body = request.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(1 << 16)
            self.heard.append((head, body))
            for part in play() if callable(play) else play:
                if self.end:
                    return
                time.sleep(part) if isinstance(part, float) else connection.sendall(part)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        server = Server()
        yield server
        server.end = True
        server.socket.close()


def row(text="x"):
    return {"id": "q", "sample": 0, "image": None, "question": "How many?", "answer": "2", "text": text}


def drip(raw, size=1, check_stop=0.02):
    for start in range(0, len(raw), size):
        yield raw[start : start + size]
        yield check_stop


def for_ever(first, raw):
    def play():
        yield first
        while True:
            yield raw

    return play


ERROR = b"HTTP/1.1 500 Oops\r\nContent-Length: 500\r\n\r\n"
STALL = 30.0
HOSTILE = {
    # The errors: body that breaks off, stalls, drips.
    "an error that breaks off": ([ERROR + b"it is"], "HTTP 500: it is"),
    "an error that stalls": ([ERROR + b"it is", STALL], "HTTP 500: it is"),
    "an error that drips": (lambda: [ERROR, *drip(b"z" * 500)], "HTTP 500: z"),
    "an error without end": (for_ever(b"HTTP/1.1 500 Oops\r\n\r\n", b"y" * 65536), "HTTP 500: yyy"),
    "an error in junk chunks": ([b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc"], "HTTP 503: "),
    # Before the body.
    "nothing": ([STALL], "no whole reply within 0.4 s"),
    "a closed door": ([], "RemoteProtocolError"),
    "a status line that drips": (lambda: drip(WHOLE, 1, 0.1), "no whole reply within 0.4 s"),
    "headers that drip": (lambda: drip(OK + b"X: " + b"x" * 500 + b"\r\n\r\n", 3), "no whole reply within 0.4 s"),
    "headers without end": (for_ever(OK, b"X-%s: y\r\n" % (b"x" * 1000)), "RemoteProtocolError"),
    "patience without end": (for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "no whole reply"),
    "another protocol": ([b"SSH-2.0-OpenSSH_9.2\r\n"], "RemoteProtocolError"),
    # The reply.
    "a reply that breaks off": ([WHOLE[:-9]], "RemoteProtocolError"),
    "a reply that stalls": ([WHOLE[:-9], STALL], "no whole reply within 0.4 s"),
    "a reply that drips": (lambda: drip(WHOLE), "no whole reply within 0.4 s"),
    "a reply without end": (for_ever(OK + b"\r\n", b" " * 65536), "more than 4194304 bytes"),
    "more bytes than said": ([OK + b"Content-Length: 9\r\n\r\n" + GOOD], "not a chat completion: {"),
    "a negative length": ([OK + b"Content-Length: -9\r\n\r\n" + GOOD], "RemoteProtocolError"),
    "two lengths": ([OK + b"Content-Length: 9\r\nContent-Length: 10\r\n\r\n" + GOOD], "RemoteProtocolError"),
    "junk for chunks": ([OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n0\r\n\r\n"], "RemoteProtocolError"),
    "a chunk of 2**60 bytes": (
        [OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\nab"],
        "RemoteProtocolError",
    ),
    "a packed reply": ([OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b00"], "in the encoding gzip"),
    "brackets": ([OK + b"\r\n" + b"[" * 200_000], "not a chat completion: [[["),
    "a long number": ([OK + b'\r\n{"choices": ' + b"9" * 5000 + b"}"], "not a chat completion: {"),
    "another encoding": ([OK + b"\r\n" + GOOD.decode().encode("utf-16")], "not a chat completion: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_comes_is_retried_then_an_abstention_that_is_logged_and_counted(server, tmp_path, name):
    server.play, message = HOSTILE[name]
    server.heard.clear()
    options = JudgeOptions(models=("a",), base_url=server.url, timeout_s=0.4, retries=1)
    log = JudgeLog(tmp_path / "log")
    begin = time.monotonic()
    with Judges(options, log, tmp_path, KEY, lambda check_stop: None) as judges:
        assert judges.votes(row()) == (Vote.ABSTAIN,) and judges.stopped is None
        assert time.monotonic() - begin < 2 * 0.4 + 1
        assert len(server.heard) == log.requests == 2
        (line,) = (tmp_path / "log").read_text().splitlines()
        assert message in json.loads(line)["error"] and len(json.loads(line)["error"]) < 300
        server.play = [WHOLE]
        assert judges.votes(row()) == (Vote.CORRECT,)


def test_a_refused_key_stops_even_where_its_error_stalls(server, tmp_path):
    server.play = [b"HTTP/1.1 401 No\r\nContent-Length: 500\r\n\r\nwho?", STALL]
    options = JudgeOptions(models=("a",), base_url=server.url, timeout_s=0.4)
    with Judges(options, JudgeLog(tmp_path / "log"), tmp_path) as judges:
        assert judges.votes(row()) == (Vote.PENDING,)
    assert judges.stopped == f"{server.url}/chat/completions does not serve a: HTTP 401: who?"


ECHOES = {
    "plain": KEY.encode(),
    "upper": KEY.upper().encode(),
    "json": json.dumps({"error": f"Bearer {KEY} is wrong"}).encode(),
    "url": b"?key=sk-Tr0ub4dor%263%2F%2541%22x&",
    "broken off": b"you sent: " + KEY[:-2].encode(),
    "far behind": b" " * 70_000 + KEY.encode(),
    "at the cut": b"k" * 190 + KEY.encode(),
    "at the bound": b" " * (2**16 - 10) + KEY.encode() * 2,
}


@pytest.mark.parametrize("name", ECHOES)
@pytest.mark.parametrize("status", [400, 401, 200])
def test_keys_and_terminal_escapes_in_bodies_reach_neither_log_nor_console(server, tmp_path, name, status, capfd):
    body = b"\x1b]0;owned\x07\x9b2J\xc2\x9b2J\r\n\xe2\x80\xae " + ECHOES[name]
    more = 7 if name == "broken off" else 0
    server.play = [b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body) + more, body)]
    options = JudgeOptions(models=("a",), base_url=server.url, timeout_s=5.0, retries=0)
    with Judges(options, JudgeLog(tmp_path / "log"), tmp_path, KEY) as judges:
        judges.votes(row())
    assert b"authorization: bearer " + KEY.encode().lower() in server.heard[-1][0].lower()
    print(judges.stopped)
    seen = (tmp_path / "log").read_text() + "".join(capfd.readouterr())
    assert "sk-tr0ub4" not in seen.lower()
    assert not set(seen) & set("\x1b\x07\x9b\r\u202e")
    # What is said of the reply itself is unharmed, and the key in it is not kept either.
    reply = json.dumps({"choices": [{"message": {"content": f"\x9b2J {KEY}\nVERDICT: CORRECT"}}]})
    server.play = [OK + b"\r\n" + reply.encode()]
    log = JudgeLog(tmp_path / "other")
    with Judges(options, log, tmp_path, KEY) as judges:
        assert judges.votes(row()) == (Vote.CORRECT,)
    raw = (tmp_path / "other").read_text()
    assert "sk-tr0ub4" not in raw.lower() and "\x9b" not in raw
    assert json.loads(raw)["reply"] == "\x9b2J [secret]\nVERDICT: CORRECT"


def test_no_cookie_is_kept_and_no_connection_used_twice(server, tmp_path):
    server.play = [OK + b"Set-Cookie: a=b; Path=/\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)]
    with Endpoint(server.url, 5.0) as endpoint:
        for _ in range(2):
            assert endpoint.post(b"{}").status == 200
    assert b"cookie" not in server.heard[-1][0].lower()


@pytest.mark.parametrize(
    "url, problem",
    [
        ("https://host/v1", None),
        ("http://[::1]:8000/v1", None),
        ("ftp://host/v1", "got 'ftp://host/v1', expected http"),
        ("host/v1", "got 'host/v1', expected http"),
        ("https://", "expected http"),
        ("https://host:port/v1", "not an address"),
        ("https://host:99999/v1", "not an address"),
        ("https://[::1/v1", "not an address"),
        ("https://host/v1\n", "a blank or a control character"),
        ("https://ho st/v1", "a blank or a control character"),
        ("https://me:hunter2@host/v1", "a user name, a password or parameters"),
        ("https://me:hunter2@host:port/v1", "expected"),
        ("ftp://me:hunter2@host/v1", "a user name, a password or parameters"),
        ("https://host/v1?api-key=hunter2", "a user name, a password or parameters"),
    ],
)
def test_addresses(url, problem, monkeypatch):
    result = address_problem(url)
    assert result is None if problem is None else problem in result
    assert "hunter2" not in (result or "")
    options = DistillOptions(verify=VerifyOptions(("judges",)), judges=JudgeOptions(("a", "b"), base_url=url))
    if problem is None:
        assert from_config_dict(to_dict(options)) == options
        return
    with pytest.raises(ConfigError, match="^config.judges.base_url: ") as refused:
        from_config_dict(to_dict(options))
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="the address of the endpoint") as refused:
        Endpoint(url, 1.0)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("value", ["sk-hunter2\nX: y", "sk hunter2", "sk-hünter2", "\x00hunter2", "", " \n"])
def test_keys_that_cannot_be_sent_are_refused_untold(value, monkeypatch):
    if "\x00" not in value:  # no environment holds one
        monkeypatch.setenv("OUR_KEY", value)
        with pytest.raises(ValueError) as refused:
            read_key("OUR_KEY")
        options = DistillOptions(
            verify=VerifyOptions(("judges",)),
            judges=JudgeOptions(("a", "b"), base_url="http://host", api_key_env="OUR_KEY"),
        )
        with pytest.raises(ConfigError, match="^config.judges.api_key_env: ") as said:
            from_config_dict(to_dict(options))
        assert "nter2" not in f"{refused.value} {said.value}"
    with pytest.raises(ValueError) as refused:
        Endpoint("http://host", 1.0, value)
    assert "nter2" not in str(refused.value)


def test_a_key_with_a_line_break_behind_it_is_the_key(monkeypatch):
    monkeypatch.setenv("OUR_KEY", "sk-1\n")
    assert read_key("OUR_KEY") == "sk-1" and read_key(None) is None
    # A key given in the place of the variable's name is not told.
    with pytest.raises(ValueError, match="there is no such environment variable") as refused:
        read_key("sk-hunter2")
    assert "hunter2" not in str(refused.value)


def completion(usage):
    return json.dumps({"choices": [{"message": {"content": "correct"}}], "usage": usage}).encode()


@pytest.mark.parametrize(
    "prompt", [10**400, 10**9 + 1, -1, True, 1.0, float("nan"), "1", None, [1], {}], ids=lambda value: f"{value!s:.12}"
)
def test_numbers_that_are_none(server, tmp_path, prompt):
    usage = {"prompt_tokens": prompt, "completion_tokens": 10}
    assert read_completion(Reply(200, 0.0, completion(usage))) == (
        "correct",
        {"prompt_tokens": None, "completion_tokens": None},
    )
    # A log that an earlier version wrote is read all the same.
    path = tmp_path / "log"
    line = {"key": "k", "requests": 1, "vote": "correct", "reply": "correct", **usage}
    path.write_text(json.dumps(line) + "\n")
    log = JudgeLog(path)
    assert log.said("k") == Vote.CORRECT and (log.prompt_tokens, log.without_usage) == (0, 1)
    assert log.cost(JudgeOptions(price_prompt=1.0)) == 0.0


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"key": 1, "requests": 1, "reply": ""},
        {"key": "k", "requests": 10**400, "reply": ""},
        {"key": "k", "requests": 1, "reply": ["correct"]},
        {"key": "k", "requests": 1, "error": "x"},
        {"key": "k", "requests": 1, "error": 5, "pending": False},
    ],
)
def test_a_log_changed_by_hand_is_refused_by_line(tmp_path, line):
    good = {"key": "a", "requests": 1, "error": "x", "pending": True}
    (tmp_path / "log").write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(StoreError, match=r"log:2: not a reply or a failure"):
        JudgeLog(tmp_path / "log")


# Random replies.

VALUES = [b"null", b"{}", b"[]", b'""', b"-1", b"1e999", b"NaN", b'"\\ud800"', b"\xff"]
VALUES += [b"1" * 5000, b"[" * 3000, b'{"a":' * 500]


def mutated(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, to = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and raw:
            raw[at % len(raw)] = rng.randrange(256)
        elif kind == 1:
            del raw[at : min(to, at + rng.choice([1, 4, 400]))]
        elif kind == 2:
            raw[at:at] = raw[at:to] * rng.choice([1, 2, 50])
        elif kind == 3:
            raw[at:at] = rng.choice(VALUES)
        elif kind == 4 and b":" in raw:  # another value for a key
            ends = [i for i, c in enumerate(raw) if c in b":[,"]
            begin = rng.choice(ends) + 1
            end = next((i for i in range(begin, len(raw)) if raw[i] in b",}]"), len(raw))
            raw[begin:end] = rng.choice(VALUES)
        else:
            del raw[at:]
    return bytes(raw[: 1 << 20])


def test_random_replies(tmp_path):
    rng = random.Random(SEED)
    print(f"QWENLA_FUZZ_SEED={SEED}")
    log, votes = JudgeLog(tmp_path / "log"), 0
    growth = peak_growth()
    for number in range(CASES):
        raw = mutated(GOOD, rng)
        start = time.thread_time()
        try:
            text, usage = read_completion(Reply(200, 0.0, raw))
        except ValueError as error:
            assert len(str(error)) < 300, raw
        else:
            assert isinstance(text, str) and all(v is None or 0 <= v <= 10**9 for v in usage.values()), raw
            log.add({"key": str(number), "id": "q", "requests": 1, "reply": text, **usage})
            votes += 1
        assert not slower_than(1, start, read_completion, Reply(200, 0.0, raw)), raw[:200]
    assert CASES / 20 < votes < CASES  # the mutations are neither all harmless nor all deadly
    again = JudgeLog(tmp_path / "log")
    assert (again.requests, again.prompt_tokens) == (votes, log.prompt_tokens)
    assert growth() < 300  # MB


def test_random_exchanges(server, tmp_path):
    """Status line, headers, chunks and body, mutated; the connection is closed behind them."""
    rng = random.Random(SEED)
    print(f"QWENLA_FUZZ_SEED={SEED}")
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
    failed = b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nwait"
    options = JudgeOptions(models=("a",), base_url=server.url, timeout_s=0.5, retries=0)
    log = JudgeLog(tmp_path / "log")
    with Judges(options, log, tmp_path, KEY, lambda check_stop: None) as judges:
        result = []
        for number in range(CASES * 3 // 20):
            raw = mutated(rng.choice([WHOLE, chunked, failed]), rng)
            server.play = [part for cut in [rng.randrange(len(raw) + 1)] for part in (raw[:cut], raw[cut:])]
            judges.stopped, start = None, time.monotonic()
            result += judges.votes(row(str(number)))
            assert time.monotonic() - start < 1.5, raw[:200]
            if number % 15 == 14:  # or the judges are given up
                server.play = [WHOLE]
                assert judges.votes(row(f"good {number}")) == (Vote.CORRECT,)
    assert {Vote.ABSTAIN, Vote.CORRECT} <= set(result)
    JudgeLog(tmp_path / "log")
