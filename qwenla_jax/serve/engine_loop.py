"""A thread that owns the engine: requests go in, and tokens come out to asyncio. Nothing else talks to the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from qwenla_jax.data.batching.collate import Buckets, collate_prompts, make_buckets
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.inference.answer import Insertion
from qwenla_jax.inference.ask import check_checkpoint, with_max_pixels
from qwenla_jax.inference.response_attention import ResponseAttention, attention_of, insertions_of, selected_cells
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.recent_logprobs import MOST_TOP_LOGPROBS, TokenLogprob
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.serve.protocol import ApiError, ChatRequest, invalid
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch
from qwenla_jax.weights.hf import Checkpoint

STEPS = 8  # tokens between two reports to the clients
PREPARING = 2  # requests whose images are decoded at a time
STOP_SECONDS = 5  # that the end waits for a loop of decoding


class Part(NamedTuple):
    """What one of a request's answers got.

    Attributes:
      choice: its number.
      ids: new tokens.
      rollout: of this answer alone, once it has ended; else None.
      logprobs: of the new tokens, where they are asked for; else None.
      error: why there will be no more.
    """

    choice: int
    ids: list[int]
    rollout: Rollout | None
    logprobs: list[TokenLogprob] | None = None
    error: Exception | None = None


class Served(NamedTuple):
    """The model, ready to serve.

    Attributes:
      checkpoint, tok, processor, layout: how requests become arrays.
      buckets: the engine's.
      reattention: the engine's, `by_row`.
      engine: only its thread may use it.
    """

    checkpoint: Checkpoint
    tok: Tokenizer
    processor: ProcessorSettings
    layout: ImageLayout
    buckets: Buckets
    reattention: ReattentionConfig
    engine: Engine


class Question:
    """A request's answers on their way; `parts` has what came of them."""

    def __init__(self, requests: list[Request], example: Example) -> None:
        self.requests, self.example = requests, example
        self.parts: asyncio.Queue[Part] = asyncio.Queue()
        self.tickets: list[int] = []  # of the engine's thread alone
        self.open = set(range(len(requests)))  # answers that have not ended


def build(checkpoint: Checkpoint, options: ServeOptions) -> Served:
    """An engine for a checkpoint; nothing is compiled yet.

    Raises:
      ValueError: the checkpoint lacks a part; it names the file.
    """
    tok, processor = check_checkpoint(checkpoint)
    layout, length, slots = layout_of(checkpoint.config), options.max_model_len, options.max_num_seqs
    most = options.mm_processor_kwargs or max(length // 2, 1) * layout.token_pixels**2
    processor = with_max_pixels(processor, most)
    sizes = make_buckets(
        layout, 1, processor.min_pixels, processor.max_pixels, length, length, options.limit_mm_per_prompt
    )
    # Each size is a program that is compiled before the first request.
    buckets = dataclasses.replace(
        sizes,
        frames=tuple(sorted({1, *_few(sizes.frames)})),
        slots=_few(sizes.slots),
        visual=sizes.visual[-1:],
        prompts=_few(sizes.prompts),
    )
    ids = tok.ids
    reattention = ReattentionConfig(
        mode="route",
        max_insertions=options.max_insertions,
        rows_at_once=min(8, slots),
        open_id=ids.reflection_open,
        close_id=ids.reflection_close,
        by_row=True,
    )
    sampling = SampleOptions(
        1, length, 0.0, 1.0, ids.stop(), reattention, penalties=True, top_logprobs=MOST_TOP_LOGPROBS
    )
    bias_V = suppression_bias(checkpoint.config.text.vocab_size, tok.vocab_size, ids.suppressed())
    model, params = checkpoint
    engine = Engine(model, params, sampling, buckets, slots, bias_V, STEPS, token_bytes=tok.token_bytes)
    return Served(checkpoint, tok, processor, layout, buckets, reattention, engine)


def to_question(chat: ChatRequest, example: Example, served: Served, rng: random.Random) -> Question:
    """The engine's requests of a chat: one an answer.

    Raises:
      ApiError: 400, the prompt does not fit the context.
    """
    length, most = len(example.ids_T), served.buckets.prompts[-1]
    if length >= most:
        message = f"the prompt has {length} tokens, images included; at most {most - 1} leave room for an answer"
        raise invalid("messages", message, "context_length_exceeded")
    try:
        vision, prompts = collate_prompts([example], served.buckets, 1, block_of(served))
    except ValueError as error:
        raise invalid("messages", str(error)) from error
    asked = dataclasses.replace(
        served.reattention,
        by_row=False,
        mode=chat.mode,
        keep_ratio=chat.keep_ratio,
        max_insertions=chat.max_insertions,
    )
    seed = rng.getrandbits(32) if chat.seed is None else chat.seed
    request = Request(
        vision,
        prompts,
        seed=seed,
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        max_new_tokens=min(chat.max_tokens or most, most - length),
        reattention=asked,
        stop=chat.stop,
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        repetition_penalty=chat.repetition_penalty,
        top_logprobs=chat.top_logprobs if chat.logprobs else None,
    )
    return Question([dataclasses.replace(request, samples=(number,)) for number in range(chat.n)], example)


def block_of(served: Served) -> ReattentionConfig | None:
    """The options for `collate_prompts`, where the engine inserts anything."""
    return served.reattention if served.reattention.inserts else None


def insertion_summary(served: Served, question: Question, part: Part, with_cells: bool) -> list[dict[str, Any]]:
    """Where an answer's insertions stand, how many visual tokens they show, and `with_cells` which ones."""
    rollout, request = part.rollout, question.requests[part.choice]
    if rollout is None:
        return []
    ids = rollout.ids_BxR[0, : rollout.length_B[0]].tolist()
    tags = [at for at, token in enumerate(ids) if token == served.reattention.open_id]
    result = []
    for turn, position in enumerate(tags[: int(rollout.inserted_B[0])]):
        assert isinstance(request.vision, VisionBatch)  # as `to_question` makes it
        cells = selected_cells(rollout.selected_BxExX[0, turn], request.vision, request.prompts, question.example)
        summary = {
            "position": position,
            "offset": len(served.tok.decode(ids[:position])),
            "selected_tokens": sum(len(image.selected) for image in cells),
            "visual_tokens": sum(image.rows * image.cols for image in cells),
        }
        result.append(summary | ({"images": [dataclasses.asdict(image) for image in cells]} if with_cells else {}))
    return result


def run_again(served: Served, vision: VisionBatch, prompts: PromptBatch, rollout: Rollout) -> ResponseAttention:
    """An answer's attention, from one more pass over it; few programs serve all answers."""
    # Nothing but the number of insertions differs between requests.
    options = dataclasses.replace(served.reattention, max_insertions=int(rollout.inserted_B[0]))
    return attention_of(served.checkpoint, options, vision, prompts, rollout)


def insertions_in_full(served: Served, question: Question, part: Part) -> list[Insertion]:
    """An answer's insertions with their cells and attention, from one more pass over the answer."""
    request, rollout = question.requests[part.choice], part.rollout
    if rollout is None or not rollout.inserted_B[0]:
        return []
    assert isinstance(request.vision, VisionBatch)  # as `to_question` makes it
    inputs = (request.vision, request.prompts, rollout)
    return insertions_of(run_again(served, *inputs), served.tok, *inputs, question.example)


class EngineLoop:
    """Loads a model in a thread, and then decodes whatever is asked.

    `state` is "loading", "ready", "draining" or "failed". All methods belong to the thread of the asyncio loop that
    called `start`.

    Args:
      load: gives the model.
      options: of the server.
      on_failed: called in that loop when loading or decoding has failed; `failure` has the reason.
    """

    def __init__(self, load: Callable[[], Served], options: ServeOptions, on_failed: Callable[[], None]) -> None:
        self.state, self.served, self.failure = "loading", None, None
        self._load, self._options, self._on_failed = load, options, on_failed
        self._commands: queue.SimpleQueue[tuple[str, Question | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._questions: set[Question] = set()
        # A prepared question holds its images as float32: few are, beside those that are decoded.
        self._prepared = asyncio.Semaphore(2 * options.max_num_seqs)
        self._preparing = ThreadPoolExecutor(PREPARING, "prepare")
        self._places = self._submitted = 0
        self._seconds = 1.0  # of an answer, its waiting included; a running mean

    served: Served | None
    failure: BaseException | None

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return min(self._submitted, self._options.max_num_seqs)

    @property
    def waiting(self) -> int:
        """Answers that are admitted and not being decoded yet."""
        return self._places - self.running

    @property
    def idle(self) -> bool:
        """Whether nothing is admitted."""
        return self._places == 0

    def ready(self) -> Served:
        """The model. Raises ApiError 503 while there is none, or none for new requests."""
        if self.state != "ready" or self.served is None:
            raise ApiError(503, f"the server is {self.state}", code=self.state, retry_after=5)
        return self.served

    async def ask(self, answers: int, prepare: Callable[[], Question]) -> Question:
        """Asks, in the order of the calls; the answers' tokens come in the question's `parts`.

        Args:
          answers: how many.
          prepare: makes the question, in a thread, once its turn is near.

        Raises:
          ApiError: 429 where too many answers wait; what `prepare` raises.
        """
        self._admit(answers)
        try:
            await self._prepared.acquire()
            try:
                question = await self._loop.run_in_executor(self._preparing, prepare)
                if self.state == "failed":
                    raise ApiError(500, "the model has failed", code="failed")
            except BaseException:
                self._prepared.release()
                raise
        except BaseException:
            self._places -= answers
            raise
        self._submitted += answers
        self._questions.add(question)
        self._commands.put(("submit", question))
        return question

    def _admit(self, answers: int) -> None:
        options = self._options
        if answers > options.max_queued_requests + options.max_num_seqs:
            raise invalid("n", f"at most {options.max_queued_requests + options.max_num_seqs} answers can wait")
        if self._places + answers > options.max_queued_requests + options.max_num_seqs:
            wait = math.ceil(self._seconds)
            message = f"{self.waiting} answers are waiting, at most {options.max_queued_requests} may"
            raise ApiError(429, message, code="queue_full", retry_after=min(max(wait, 1), 60))
        self._places += answers

    def cancel(self, question: Question) -> int:
        """Cancels what has not ended; returns how many answers that was."""
        left = list(question.open)
        for choice in left:
            self._end(question, choice)
        if left:
            self._commands.put(("cancel", question))
        return len(left)

    def took(self, seconds: float) -> None:
        """Notes how long an answer took."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def stop(self) -> bool:
        """Ends the threads after what they are at; returns whether the engine's has ended."""
        self._commands.put(("stop", None))
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._thread.join(0 if self.served is None else STOP_SECONDS)
        return not self._thread.is_alive()

    def _end(self, question: Question, choice: int) -> None:
        question.open.discard(choice)
        if not question.open:
            self._questions.discard(question)
            self._prepared.release()
        self._places -= 1
        self._submitted -= 1

    def _deliver(self, parts: list[tuple[Question, Part]]) -> None:
        for question, part in parts:
            if part.choice not in question.open:
                continue  # cancelled
            if part.rollout is not None or part.error is not None:
                self._end(question, part.choice)
            question.parts.put_nowait(part)

    def _became(self, state: str, served: Served | None, failure: BaseException | None = None) -> None:
        if state != "ready" or self.state == "loading":
            self.state = state
        self.served, self.failure = served, failure
        if state == "failed":
            gone = ApiError(500, "the model has failed", code="failed")
            self._deliver(
                [(q, Part(choice, [], None, error=gone)) for q in list(self._questions) for choice in list(q.open)]
            )
            self._on_failed()

    # From here on: the engine's thread.

    def _run(self) -> None:
        owners: dict[int, tuple[Question, int]] = {}
        try:
            served = self._load()
            served.engine.warm_up()
            self._call(self._became, "ready", served)
            while self._command(served.engine, owners):
                updates = served.engine.step()
                parts = []
                for update in updates:
                    question, choice = owners[update.ticket]
                    logprobs = None if update.logprobs is None else update.logprobs[0]
                    parts.append((question, Part(choice, update.ids[0], update.rollout, logprobs)))
                    if update.rollout is not None:
                        del owners[update.ticket]
                self._call(self._deliver, parts)
        except BaseException as error:
            if not self._loop.is_closed():  # as it is where the server has ended
                self._call(self._became, "failed", None, error)

    def _command(self, engine: Engine, owners: dict[int, tuple[Question, int]]) -> bool:
        """Carries out what was asked of the engine, waiting where it has nothing to do; False: to stop."""
        while True:
            try:
                what, question = self._commands.get(block=not engine.busy)
            except queue.Empty:
                return True
            if question is None:
                return False
            if what == "cancel":
                for ticket in question.tickets:
                    engine.cancel(ticket)
                    owners.pop(ticket, None)
                continue
            for choice, request in enumerate(question.requests):
                try:
                    ticket = engine.submit(request)
                except ValueError as error:
                    refused = invalid("messages", str(error))
                    self._call(self._deliver, [(question, Part(choice, [], None, error=refused))])
                else:
                    question.tickets.append(ticket)
                    owners[ticket] = question, choice

    def _call(self, function: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(function, *args)


def _few(sizes: tuple[int, ...], ratio: int = 4, least: int = 64) -> tuple[int, ...]:
    """The largest of some sizes, and smaller ones of at most a quarter of the next."""
    kept = sizes[-1:]
    for size in reversed(sizes):
        if size * ratio <= kept[0] and (size >= least or sizes[-1] < least):
            kept = (size, *kept)
    return kept
