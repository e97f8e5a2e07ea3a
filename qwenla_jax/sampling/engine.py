"""The engine: continuous batching over a fixed number of slots, each a question with its rows."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.reattention.options import ReattentionConfig, RowReattention, most_slots, row_reattention
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sampler import cache_room
from qwenla_jax.sampling.slots import Report, RowSettings, prefilled, slot_programs
from qwenla_jax.types import PromptBatch, ReinsertedImages, Rollout, VisionBatch

KEPT_IMAGES = 4  # questions whose visual tokens are kept for a later question on the same images


@dataclasses.dataclass(frozen=True)
class Request:
    """A question, and how its responses are sampled.

    Attributes:
      vision, prompts: the question alone, as `collate_prompts` makes it with the engine's buckets; with its `block`
        where anything is inserted.
      samples: the numbers of the responses, one a row; at most the engine's `group_size`.
      seed, step: a row's randomness is a function of (seed, step, its number, its token) alone.
      temperature: 0 is greedy.
      top_p: nucleus; 1 is the whole distribution.
      max_new_tokens: longest response; None: the engine's.
      reattention: of this question; None: the engine's. Only an engine whose options are `by_row` takes another.
      stop: a response ends where its text first has one of these.
    """

    vision: VisionBatch
    prompts: PromptBatch
    samples: Sequence[int] = (0,)
    seed: int = 0
    step: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    reattention: ReattentionConfig | None = None
    stop: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """What a question's rows got in one loop.

    Attributes:
      ticket: from `Engine.submit`.
      ids: new tokens of each row.
      rollout: all of the responses, on the host, once every row has ended; else None. A row that a stop string ended
        has `stopped_B` False, and its last token completes the string.
    """

    ticket: int
    ids: list[list[int]]
    rollout: Rollout | None


@dataclasses.dataclass
class _Running:
    ticket: int
    request: Request
    limit: int
    ids: list[list[int]]
    ended: list[bool]


class Engine:
    """Samples responses to questions that come at any time.

    A question waits until a slot is free. `step` fills the free slots, decodes up to `steps` tokens of every row in one
    compiled loop, insertions included, and frees the slots of questions whose rows have all ended. The host reads once
    a loop, not once a token. No setting of a request is a compile-time constant: after `warm_up` nothing compiles.

    Every question is prefilled by itself, at its bucket. Its rows share the prompt's keys and values.

    Args:
      model, params: the model.
      options: rows of a slot, longest response, stop tokens and re-attention; temperature and top_p are the requests'.
        With a re-attention that is `by_row`, requests may choose mode and kept share.
      buckets: sizes that questions may have, `frames` of one question.
      slots: questions that are decoded at once.
      logit_bias_V: float32, see `token.suppression_bias`.
      steps: tokens of a row in one loop.
      decode: ids to text, for stop strings.

    Raises:
      ValueError: rows in several shards, fewer than one slot or step.
    """

    def __init__(
        self,
        model: QwenVL,
        params: Params,
        options: SampleOptions,
        buckets: Buckets,
        slots: int,
        logit_bias_V: np.ndarray,
        steps: int = 16,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        if options.shards != 1 or slots < 1 or steps < 1:
            raise ValueError(f"expected 1 shard and at least 1 slot and step, got {options.shards}, {slots}, {steps}")
        self.options = options = dataclasses.replace(options, temperature=0.0, top_p=1.0)
        self.buckets = buckets
        self._bias_V, self._decode, self._steps = logit_bias_V, decode, steps
        dtype = jnp.dtype(model.config.dtype)
        self._params = jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params)
        P = buckets.prompts[-1]
        slots_inserted = most_slots(options.reattention, self._empty_prompts(1, P).block)
        # Rows that need a larger cache must not change how the others are rounded.
        self.options = options = dataclasses.replace(options, cache_block=min(cache_room(options, slots_inserted)))
        self._room = cache_room(options, slots_inserted)
        sizes = buckets.frames[-1] * buckets.visual[-1], P, max(self._room)
        self._programs = slot_programs(model.config, options, *sizes, steps)

        def abstract(params: Params) -> Any:
            visual_ZxD = jnp.zeros((sizes[0], model.config.text.hidden_size), dtype)
            rows = _no_rows(slots * options.group_size)
            return prefilled(model, options, *sizes[1:], params, visual_ZxD, self._empty_prompts(slots, P), rows)

        # Read only where a slot has been filled: a row that is not used has ended.
        shapes = jax.eval_shape(abstract, self._params)
        self._state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        B = slots * options.group_size
        self._running: list[_Running | None] = [None] * slots
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._cancelled_B = np.ones(B, bool)
        self._filled_B = np.zeros(B, np.int64)
        self._tickets = itertools.count()
        self._images: collections.OrderedDict[bytes, jax.Array] = collections.OrderedDict()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state: keys and values of all slots above all."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state))

    @property
    def busy(self) -> bool:
        """Whether any question is waiting or running."""
        return bool(self._waiting) or any(self._running)

    def warm_up(self) -> float:
        """Compiles every program for every bucket; returns the seconds that it took. Nothing may be running.

        Raises:
          RuntimeError: a question is running.
        """
        if any(self._running):
            raise RuntimeError("warm_up: a question is running; warm the engine up before the first step")
        started, slot, b = time.perf_counter(), np.int32(0), self.buckets
        for frames, patches, tokens in itertools.product(b.frames, b.slots, b.visual):
            vision = VisionBatch(
                np.zeros((frames, patches, b.patch_values), np.float32),
                np.zeros((frames, patches, 2), np.int32),
                np.zeros((frames, patches), bool),
                np.zeros((frames, tokens), np.int32),
            )
            visual_ZxD = self._programs.encode(self._params, vision)
        rows = _no_rows(self.options.group_size)
        for P in b.prompts:
            prompts = self._empty_prompts(1, P)
            self._state = self._programs.insert(self._params, self._state, visual_ZxD, prompts, rows, slot)
        for size in self._room:
            self._decode_loop(size)
        jax.block_until_ready(self._programs.read(self._state, slot))
        return time.perf_counter() - started

    def submit(self, request: Request) -> int:
        """Puts a question at the end of the queue.

        Returns:
          its ticket.

        Raises:
          ValueError: a setting is out of its range or needs another engine, or the question fits no bucket; named.
        """
        self._check(request)
        ticket = next(self._tickets)
        self._waiting.append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Removes a question, waiting or running, and frees its slot. One that has ended is left alone."""
        self._waiting = collections.deque(item for item in self._waiting if item[0] != ticket)
        for slot, running in enumerate(self._running):
            if running is not None and running.ticket == ticket:
                self._free(slot)

    def step(self) -> list[Update]:
        """Fills free slots, runs one loop, and reports every question that was running, by slot."""
        for slot, running in enumerate(self._running):
            if running is None and self._waiting:
                self._fill(slot, *self._waiting.popleft())
        if not any(self._running):
            return []
        longest = int(self._filled_B.max())
        report = self._decode_loop(next(size for size, most in self._room.items() if longest <= most))
        return [self._harvest(slot, one, report) for slot, one in enumerate(self._running) if one is not None]

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Rollout]]:
        """Responses to questions as they end, each with the question's number; questions are read as slots are free."""
        numbers: dict[int, int] = {}
        asked = enumerate(requests)
        while True:
            for number, request in itertools.islice(asked, self._running.count(None) - len(self._waiting)):
                numbers[self.submit(request)] = number
            if not self.busy:
                return
            for update in self.step():
                if update.rollout is not None and update.ticket in numbers:
                    yield numbers.pop(update.ticket), update.rollout

    def _decode_loop(self, size: int) -> Report:
        most = self._room[size]
        self._state, report = self._programs.decode(
            size, most, self._params, self._state, self._bias_V, self._cancelled_B
        )
        self._cancelled_B = np.zeros_like(self._cancelled_B)
        return jax.device_get(report)

    def _fill(self, slot: int, ticket: int, request: Request) -> None:
        """Prefills a question and puts it into a slot."""
        G, n = self.options.group_size, len(request.samples)
        limit = request.max_new_tokens or self.options.max_new_tokens
        reattention = request.reattention or dataclasses.replace(self.options.reattention, by_row=False)
        each = lambda value, dtype: np.full(G, value, dtype)  # noqa: E731
        sample_B = each(0, np.uint32)
        sample_B[:n] = request.samples
        rows = RowSettings(
            each(request.seed, np.uint32),
            each(request.step, np.uint32),
            sample_B,
            each(request.temperature, np.float32),
            each(request.top_p, np.float32),
            each(limit, np.int32),
            np.arange(G) < n,
            row_reattention(reattention, request.prompts, G),
        )
        visual_ZxD = self._encode(request.vision)
        prompts = self._padded(request.prompts)
        self._state = self._programs.insert(self._params, self._state, visual_ZxD, prompts, rows, np.int32(slot))
        self._running[slot] = _Running(ticket, request, limit, [[] for _ in range(n)], [False] * n)
        self._cancelled_B[self._rows(slot)] = False
        self._filled_B[self._rows(slot)] = 0

    def _encode(self, vision: VisionBatch) -> jax.Array:
        """Visual tokens; those of the last few questions' images are kept."""
        digest = hashlib.sha256()
        for array in jax.tree.leaves(vision):
            digest.update(repr((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
        key = digest.digest()
        if key not in self._images:
            self._images[key] = self._programs.encode(self._params, vision)
            if len(self._images) > KEPT_IMAGES:
                self._images.popitem(last=False)
        self._images.move_to_end(key)
        return self._images[key]

    def _harvest(self, slot: int, running: _Running, report: Report) -> Update:
        """What a slot's rows got; frees the slot if they have all ended."""
        first, new = slot * self.options.group_size, []
        for row, ids in enumerate(running.ids):
            b = first + row
            if running.ended[row]:
                new.append([])
                continue
            length, before = int(report.length_B[b]), len(ids)
            ids += report.ids_BxT[b, : length - before].tolist()
            running.ended[row] = bool(report.stopped_B[b]) or length >= running.limit
            self._filled_B[b] = report.filled_B[b]
            end = self._stop_end(running.request.stop, ids, before)
            if end is not None:
                del ids[end:]
                running.ended[row] = self._cancelled_B[b] = True
            if running.ended[row]:
                self._filled_B[b] = 0
            new.append(ids[before:])
        rollout = None
        if all(running.ended):
            rollout = self._cut(jax.device_get(self._programs.read(self._state, np.int32(slot))), running.ids)
            self._free(slot)
        return Update(running.ticket, new, rollout)

    def _stop_end(self, stops: Sequence[str], ids: list[int], before: int) -> int | None:
        """How many tokens it takes until the text has a stop string; None: it has none."""
        decode = self._decode
        if not stops or decode is None:
            return None
        has = lambda end: any(stop in decode(ids[:end]) for stop in stops)  # noqa: E731
        return next((end for end in range(before + 1, len(ids) + 1) if has(end)), None) if has(len(ids)) else None

    def _cut(self, rollout: Rollout, ids: list[list[int]]) -> Rollout:
        """The rows in use, without what was sampled after a stop string."""
        rollout = jax.tree.map(lambda x: np.array(x[: len(ids)]), rollout)
        for row, own in enumerate(ids):
            n = len(own)
            if n == rollout.length_B[row]:
                continue
            tags = own[:-1].count(self.options.reattention.open_id)
            rollout.ids_BxR[row, n:] = self.options.stop_ids[0]
            rollout.logp_BxR[row, n:] = 0
            rollout.length_B[row], rollout.stopped_B[row] = n, False
            rollout.inserted_B[row] = min(tags, rollout.inserted_B[row])
            rollout.skipped_B[row] = min(tags - rollout.inserted_B[row], rollout.skipped_B[row])
            rollout.selected_BxExX[row, rollout.inserted_B[row] :] = False
        return rollout

    def _free(self, slot: int) -> None:
        self._running[slot] = None
        self._cancelled_B[self._rows(slot)] = True
        self._filled_B[self._rows(slot)] = 0

    def _rows(self, slot: int) -> slice:
        G = self.options.group_size
        return slice(slot * G, (slot + 1) * G)

    def _empty_prompts(self, rows: int, P: int) -> PromptBatch:
        """Prompts of the engine's sizes; each is one token of id 0."""
        block = None
        if self.options.reattention.inserts:
            X, N = self._block_sizes()
            zeros = lambda *shape: np.zeros((rows, *shape), np.int32)  # noqa: E731
            block = ReinsertedImages(zeros(X) - 1, zeros(X, 3), zeros(X), zeros(), zeros(), zeros(N))
        ones = np.ones(rows, np.int32)
        ids_QxP = np.zeros((rows, P), np.int32)
        return PromptBatch(ids_QxP, np.zeros((rows, P, 3), np.int32), ids_QxP - 1, ones, ones.copy(), block)

    def _block_sizes(self) -> tuple[int, int]:
        """X and N that hold the insertion of any question, as `collate_prompts` makes it."""
        b, slots = self.buckets, self.options.reattention.slots
        one, several = slots(1, b.visual[-1]), min(slots(b.images, b.visual[-1]), b.prompts[-1])
        return (one if b.images == 1 else max(one, several)), b.images

    def _padded(self, prompts: PromptBatch) -> PromptBatch:
        """The question with its insertion in the engine's sizes, or without one where nothing is inserted."""
        if not self.options.reattention.inserts:
            return dataclasses.replace(prompts, block=None)
        to = lambda x, like: np.pad(x, [(0, n - own) for n, own in zip(like.shape, x.shape, strict=True)])  # noqa: E731
        return dataclasses.replace(prompts, block=jax.tree.map(to, prompts.block, self._empty_prompts(1, 1).block))

    def _check(self, request: Request) -> None:
        """Raises ValueError where the request cannot be served."""
        options, b = self.options, self.buckets
        own, prompts, shape = options.reattention, request.prompts, request.vision.patches_IxSxC.shape
        if not 1 <= len(request.samples) <= options.group_size:
            raise ValueError(
                f"samples: got {len(request.samples)}, expected 1 to {options.group_size}, the engine's rows"
            )
        if request.temperature < 0 or not 0 < request.top_p <= 1:
            raise ValueError("temperature must be at least 0 and top_p above 0 and at most 1")
        if request.max_new_tokens is not None and not 1 <= request.max_new_tokens <= options.max_new_tokens:
            raise ValueError(f"max_new_tokens: got {request.max_new_tokens}, expected 1 to {options.max_new_tokens}")
        if request.stop and (self._decode is None or not all(request.stop)):
            raise ValueError("stop: expected texts of at least one character, and an engine that can decode")
        fixed = ("form", "delimiters", "positions", "open_id", "close_id")
        asked = request.reattention
        if asked is not None and not (own.by_row and all(getattr(asked, f) == getattr(own, f) for f in fixed)):
            raise ValueError(f"reattention: expected an engine by_row with the same {', '.join(fixed)}")
        if asked is not None and (asked.by_row or asked.max_insertions > own.max_insertions):
            raise ValueError(f"reattention: max_insertions: expected at most {own.max_insertions}, and not by_row")
        if own.inserts and prompts.block is None:
            raise ValueError("prompts: expected them with their `block`; collate them with re-attention options")
        known = (b.frames, b.slots, b.visual, b.prompts)
        sizes = (*shape[:2], request.vision.gather_IxM.shape[1], prompts.ids_QxP.shape[1])
        if len(prompts.length_Q) != 1 or any(size not in bucket for size, bucket in zip(sizes, known, strict=True)):
            raise ValueError(
                f"a question of {sizes} images, patch slots, visual and prompt tokens: expected one of {known}"
            )


def _no_rows(rows: int) -> RowSettings:
    """Settings of rows that are not used."""
    u, i, f, no = (np.zeros(rows, dtype) for dtype in (np.uint32, np.int32, np.float32, bool))
    return RowSettings(u, u, u, f, f, i, no, RowReattention(i, i, no))
