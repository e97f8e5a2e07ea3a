"""Models behind an OpenAI-compatible endpoint, judges above all: asking them, the cost, and a log of their replies.

Paper, the pipeline: 4 models judge each answer. Paper silent, ours: what they are asked, and that they see the image,
the question, the right answer and the response. `teacher` asks with another instruction.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qwenla_jax.data.images.decode import open_image
from qwenla_jax.distill.distill_options import EndpointOptions
from qwenla_jax.distill.endpoint import Endpoint, Reply, Trouble
from qwenla_jax.distill.verify import Vote
from qwenla_jax.utils import json_files
from qwenla_jax.utils.jsonl_store import Row, StoreError, append, check_there, mend, read_rows
from qwenla_jax.utils.visible import in_brief

T = TypeVar("T")

_INSTRUCTION = """You check an answer that a model gave to a question about the picture.

Question: {question}
Right answer: {answer}

The model's answer:
{text}

The answer is correct only if its conclusion is the right answer, and what it says of the picture and its reasoning are
true. Think about it briefly, then end with one line, either "VERDICT: CORRECT" or "VERDICT: INCORRECT"."""

_VERDICT = re.compile(r"\bVERDICT\W+(CORRECT|INCORRECT)\b", re.IGNORECASE)
_BARE = re.compile(r"\W*(CORRECT|INCORRECT)\W*", re.IGNORECASE)
_PASSING = (408, 409, 425, 429)  # and 5xx: the same request may succeed later
_HOPELESS = (401, 403, 404)  # wrong key, address or model: every further request would fail too
_GIVE_UP_AFTER = 20  # answers in a row to which no judge could be asked
_LONGEST_PAUSE = 60.0  # seconds
_MOST_TOKENS = 10**9  # of one request; a larger number is none
_USAGE = ("prompt_tokens", "completion_tokens")


class JudgeLog:
    """Replies and their cost: a log in the run's folder, so that nothing is asked, or paid, twice.

    A failure is logged for its cost and its reason; the next run asks again. Safe to use from several threads.

    Attributes:
      requests: sent so far, retries included.
      prompt_tokens, completion_tokens: as the endpoint reported them.
      without_usage: replies for which it reported none.
    """

    def __init__(self, path: Path) -> None:
        mend(path)
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self.requests = self.prompt_tokens = self.completion_tokens = self.without_usage = 0
        for number, row in read_rows(path):
            if not _is_judgement(row):
                raise StoreError(f"{path}:{number}: not a reply or a failure; the file was changed by hand")
            self._take(row)

    def _take(self, row: Row) -> None:
        self.requests += row["requests"]
        if "error" in row:
            if not row["pending"]:
                self._failed[row["key"]] = in_brief(row["error"], 300)  # an earlier version wrote what came
            return
        self._failed.pop(row["key"], None)
        self._replies[row["key"]] = row["reply"]
        usage = _usage(row)
        self.prompt_tokens += usage["prompt_tokens"] or 0
        self.completion_tokens += usage["completion_tokens"] or 0
        self.without_usage += usage["prompt_tokens"] is None

    def add(self, row: Row) -> None:
        """Logs a reply or a failure."""
        with self._lock:
            append(self._path, [row])
            self._take(row)

    def reply(self, key: str) -> str | None:
        """The whole reply to a request, None where there is none."""
        return self._replies.get(key)

    def failure(self, key: str) -> str | None:
        """Why a request failed the last time it was sent, None where it did not."""
        return self._failed.get(key)

    def said(self, key: str) -> Vote:
        """The vote as it counts without asking anybody: a failure abstains, what was never asked is pending."""
        if key in self._replies:
            return read_verdict(self._replies[key])
        return Vote.ABSTAIN if key in self._failed else Vote.PENDING

    def cost(self, options: EndpointOptions) -> float:
        """In the unit of the options' prices."""
        return (self.prompt_tokens * options.price_prompt + self.completion_tokens * options.price_completion) / 1e6


def _is_judgement(row: Row) -> bool:
    """Whether a line of the log is one that `Judges` writes."""
    if not isinstance(row.get("key"), str) or not _is_count(row.get("requests")):
        return False
    if "error" in row:
        return isinstance(row["error"], str) and isinstance(row.get("pending"), bool)
    return isinstance(row.get("reply"), str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_TOKENS


def _usage(message: Any) -> dict[str, int | None]:
    """The tokens of a request as an endpoint reports them; None where it reports no numbers, or absurd ones."""
    tokens = {name: message.get(name) if isinstance(message, dict) else None for name in _USAGE}
    return tokens if all(map(_is_count, tokens.values())) else dict.fromkeys(_USAGE)


def request_key(options: EndpointOptions, model: str, row: Row, instruction: str = _INSTRUCTION) -> str:
    """Names a request within a run's folder: the same judge, settings, question and answer have the same key."""
    parts = [model, options.temperature, options.max_reply_tokens, options.max_side, instruction]
    # Not the image's path, which is another one where the folder was moved.
    parts += [row[name] for name in ("id", "question", "answer", "text")]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def read_verdict(reply: str) -> Vote:
    """The verdict in a reply: the last in the form asked for, or the bare word; without one the judge abstains."""
    result = _VERDICT.findall(reply)
    bare = _BARE.fullmatch(reply)
    if result:
        return Vote(result[-1].lower())
    return Vote(bare[1].lower()) if bare else Vote.ABSTAIN


def image_url(path: Path, max_side: int) -> str:
    """The image as a data URL of a PNG whose longer side is at most `max_side` pixels.

    Raises:
      ValueError: the file is no image that can be read.
    """
    image = open_image(path)
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def request_body(
    options: EndpointOptions, model: str, row: Row, image: str, instruction: str = _INSTRUCTION
) -> dict[str, Any]:
    """The JSON that is sent: one user turn with the image, where there is one, and the instruction."""
    text = instruction.format(**{name: row[name] for name in ("question", "answer", "text")})
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    content.append({"type": "text", "text": text})
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}]}
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.max_reply_tokens is not None:
        body["max_tokens"] = options.max_reply_tokens
    return body


class _Failed(Exception):
    """A request came to nothing; `again` says whether it may succeed later, `pause` how long the endpoint wants."""

    def __init__(self, message: str, again: bool, hopeless: bool = False, check_stop: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.hopeless, self.check_stop = again, hopeless, check_stop


class Judges:
    """Asks models, within the limits of the options.

    Args:
      options: endpoint, models and limits.
      log: earlier replies.
      workdir: folder that the rows' image paths are relative to.
      api_key: sent as a bearer token; None: not sent.
      sleep: waits some seconds between two attempts.
      instruction: what they are asked, with {question}, {answer} and {text}.
      name: of the options' group in the settings.

    Raises:
      ValueError: the endpoint's address or the key cannot be used.
    """

    def __init__(
        self,
        options: EndpointOptions,
        log: JudgeLog,
        workdir: Path,
        api_key: str | None = None,
        sleep: Callable[[float], object] = time.sleep,
        instruction: str = _INSTRUCTION,
        name: str = "judges",
    ) -> None:
        self._options, self._log, self._workdir, self._sleep = options, log, workdir, sleep
        self._instruction, self._name = instruction, name
        url = (options.base_url or "").rstrip("/") + "/chat/completions"
        self._endpoint = Endpoint(url, options.timeout_s, api_key)
        self._lock = threading.Lock()
        self._unlogged = 0  # requests sent whose outcome is not in the log yet
        self._failures_in_a_row = 0
        self.stopped: str | None = None

    def __enter__(self) -> Judges:
        """The judges themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends their connections."""
        self._endpoint.close()

    def stop(self, reason: str) -> None:
        """Asks nothing more from now on; the first reason stays."""
        with self._lock:
            self.stopped = self.stopped or reason

    def votes(self, row: Row) -> tuple[Vote, ...]:
        """The votes on one answer, a row of the log of samples, in the order of the models; no image: none is sent."""
        image = ""
        votes = []
        for model in self._options.models:
            key = request_key(self._options, model, row, self._instruction)
            if self._log.reply(key) is None and self.stopped is None:
                if row["image"] is not None:
                    image = image or image_url(self._workdir / row["image"], self._options.max_side)
                self._ask(model, key, row, image)
            votes.append(self._log.said(key))
        return tuple(votes)

    def each(self, items: Iterable[T], ask: Callable[[T], object]) -> Iterator[int]:
        """Calls `ask` with each item, several at once, until asking stops; yields the number of items done."""
        done = 0
        with ThreadPoolExecutor(self._options.parallel) as pool:
            pending: collections.deque[Future[object]] = collections.deque()
            try:
                for item in items:
                    if self.stopped is not None:
                        break
                    pending.append(pool.submit(ask, item))
                    check_there(self._workdir)
                    while len(pending) >= 4 * self._options.parallel:
                        pending.popleft().result()
                        yield (done := done + 1)
                while pending:
                    check_there(self._workdir)
                    pending.popleft().result()
                    yield (done := done + 1)
            finally:
                self.stop("interrupted")
                pool.shutdown(cancel_futures=True)

    def _ask(self, model: str, key: str, row: Row, image: str) -> None:
        """Asks one judge, retrying, and logs how it came out; nothing is logged where no request was sent."""
        body = json.dumps(request_body(self._options, model, row, image, self._instruction)).encode()
        about = {"key": key, "id": row["id"], "sample": row["sample"], "model": model}
        sent, error = 0, ""
        for attempt in range(self._options.retries + 1):
            if not self._may_send():
                break
            sent += 1
            try:
                reply, usage = self._send(body)
            except _Failed as failed:
                error = str(failed)
                if failed.hopeless:
                    self.stop(f"{self._endpoint.url} does not serve {model}: {error}")
                if not failed.again or attempt == self._options.retries:
                    break
                self._sleep(min(max(self._options.backoff_s * 2**attempt, failed.check_stop), _LONGEST_PAUSE))
                continue
            self._finish(about | {"reply": reply, "requests": sent, **usage}, sent)
            return
        if sent:
            # Where judging stops the judge has not failed: it still has to be asked.
            self._finish(about | {"error": error, "requests": sent, "pending": self.stopped is not None}, sent)

    def _may_send(self) -> bool:
        """Counts one more request against the limits, unless one of them is reached."""
        with self._lock:
            if self.stopped is not None:
                return False
            limit, most = self._options.max_requests, self._options.max_cost
            if limit is not None and self._log.requests + self._unlogged >= limit:
                self.stopped = f"config.{self._name}.max_requests: {limit} requests are made"
            elif most is not None and self._log.cost(self._options) >= most:
                self.stopped = (
                    f"config.{self._name}.max_cost: {self._log.cost(self._options):.4g} of {most:.4g} are spent"
                )
            else:
                self._unlogged += 1
                return True
            return False

    def _finish(self, row: Row, sent: int) -> None:
        with self._lock:
            self._log.add(row)
            self._unlogged -= sent
            self._failures_in_a_row = self._failures_in_a_row + 1 if "error" in row else 0
            if self._failures_in_a_row >= _GIVE_UP_AFTER and self.stopped is None:
                self.stopped = f"{_GIVE_UP_AFTER} requests in a row failed, the last with: {row['error']}"

    def _send(self, body: bytes) -> tuple[str, dict[str, int | None]]:
        """One request: the reply's text without secrets, and its tokens."""
        try:
            reply = self._endpoint.post(body)
        except Trouble as error:
            raise _Failed(str(error), again=True) from error
        if reply.status >= 300:
            again = reply.status in _PASSING or reply.status >= 500
            message = f"HTTP {reply.status}: {self._endpoint.message(reply.body)}"
            raise _Failed(message, again, reply.status in _HOPELESS, reply.retry_after_s)
        try:
            text, usage = read_completion(reply)
        except ValueError as error:
            raise _Failed(f"not a chat completion: {self._endpoint.message(reply.body, 120)}", again=True) from error
        return self._endpoint.scrub(text), usage


def read_completion(reply: Reply) -> tuple[str, dict[str, int | None]]:
    """Text and tokens of a chat completion.

    Raises:
      ValueError: it is none.
    """
    result = json_files.loads(reply.body, "reply")
    try:
        text = result["choices"][0]["message"]["content"]
        if isinstance(text, list):  # some servers send parts
            text = "".join(part.get("text", "") for part in text)
        usage = _usage(result.get("usage"))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("reply: not a chat completion") from error
    if text is None:
        text = ""  # a refusal, or all of the tokens went into thinking: paid for, and no vote
    if not isinstance(text, str):
        raise ValueError("reply: its content is no text")
    return text, usage
