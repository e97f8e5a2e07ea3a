"""The engine: continuous batching over a fixed number of slots, each a question with its rows."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.parallel.distributed import place
from qwenla_jax.parallel.sharding import activation_rules, batch_sharding
from qwenla_jax.sampling.param_layout import cast, for_cpu
from qwenla_jax.sampling.recent_logprobs import RecentLogprobs
from qwenla_jax.sampling.request import Request, Update, check_request, row_settings
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import SampleState
from qwenla_jax.sampling.slot_sizes import empty_prompts, paged, sizes_for
from qwenla_jax.sampling.slots import FOREVER, Prefilled, no_rows, slot_programs
from qwenla_jax.text.token_text import StopSearch, TokenText
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch, VisualTokens

KEPT = 4  # requests whose visual tokens and prefilled prompts are cached for later requests with the same ones
NEED_IMAGES = ("blank", "other")  # contents of insertions (`ReattentionOptions.content`) that are made from images
_Report = tuple[Rollout, jax.Array, RecentLogprobs | None]  # of all rows; the array says which rows are live


@dataclasses.dataclass
class _Running:
    """A question in a slot.

    Attributes:
      ticket, question, request: the request, and the question's number within it.
      said: how many tokens of each row have been reported.
      end: the length of each row that has ended; None for the others.
      stops: the search for stop strings in each row; empty if the request has none.
    """

    ticket: int
    question: int
    request: Request
    said: list[int]
    end: list[int | None]
    stops: list[StopSearch]


@dataclasses.dataclass
class _Waiting:
    """A request that has been prefilled, with its questions that have no slot yet."""

    ticket: int
    request: Request
    prefilled: Prefilled
    left: list[int]


class Engine:
    """Samples responses to questions that may be submitted at any time: continuous batching, as in vLLM.

    Questions wait until slots are free. `step` fills the free slots, decodes up to `steps` tokens of every row in one
    compiled loop, insertions included, and frees the slots of questions whose rows have all ended. The host reads
    results once a loop, not once a token. No setting of a request is a compile-time constant: nothing compiles after
    `warm_up`.

    A request is prefilled at the shapes of its bucket. The rows of a question share the prompt's keys and values.

    Args:
      model: the model.
      params: its parameters; `params` may be set again later.
      options: rows of a slot, longest response, stop tokens and re-attention; temperature and top_p are the requests'.
        If `reattention.by_row` is set, each request may choose its mode and keep_ratio.
      buckets: sizes that requests may have.
      slots: questions that are decoded at once.
      logit_bias_V: float32, see `token.suppression_bias`.
      steps: most tokens that one loop decodes for a row.
      questions: number of questions in a request. On a mesh, questions and slots are split equally over the shards.
      token_bytes: the bytes of a token, for stop strings.
      mesh, shardings: the devices, and the parameters' shardings on them; None for the default device.

    Raises:
      ValueError: fewer than one slot, step or question, or slots or questions that do not divide over the shards.
    """

    def __init__(
        self,
        model: QwenVL,
        params: Params | None,
        options: SampleOptions,
        buckets: Buckets,
        slots: int,
        logit_bias_V: np.ndarray,
        steps: int = 16,
        questions: int = 1,
        token_bytes: Callable[[int], bytes] | None = None,
        mesh: Mesh | None = None,
        shardings: Any = None,
    ) -> None:
        U = options.shards
        if min(slots, steps, questions) < 1 or slots % U or questions % U:
            raise ValueError(
                f"expected at least 1 slot, step and question, and slots and questions in {U} equal shards, got"
                f" {slots}, {steps}, {questions}"
            )
        self.buckets, self.slots, self.questions = buckets, slots, questions
        self._model, self._bias_V, self._token_bytes, self._steps = model, logit_bias_V, token_bytes, steps
        self._mesh = mesh
        sizes = sizes_for(options.reattention, buckets, slots)
        self._sizes = sizes if options.top_logprobs is None else dataclasses.replace(sizes, reported=steps)
        self._on_one_cpu = jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1)
        options = paged(options, self._sizes, self._on_one_cpu)
        self.options = dataclasses.replace(options, temperature=0.0, top_p=1.0)
        # On one device there is nothing to place, and layers may be apart.
        shardings = None if self._on_one_cpu else shardings
        self._programs = slot_programs(model.config, self.options, self._sizes, mesh, shardings)
        self._params: Params | None = None
        self._state: SampleState | None = None
        self._visual: collections.OrderedDict[bytes, VisualTokens] = collections.OrderedDict()
        self._prompts: collections.OrderedDict[bytes, Prefilled] = collections.OrderedDict()
        self._hashed: tuple[Callable[[], VisionBatch | None], bytes] = (lambda: None, b"")
        self._running: list[_Running | None] = [None] * slots
        self._submitted: collections.deque[tuple[int, Request]] = collections.deque()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._cancelled_B = np.zeros(slots * options.group_size, bool)
        self._tickets = itertools.count()
        if params is not None:
            self.params = params

    @property
    def params(self) -> Params | None:
        """The parameters as the programs take them, see `sampling.param_layout`."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        """Takes parameters, cast or not, and drops what is cached from earlier ones."""
        params = cast(params, self._model.config.dtype)
        self._params = for_cpu(params) if self._on_one_cpu else params
        self._visual.clear()
        self._prompts.clear()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state; most of them are keys and values of the slots."""
        shapes = jax.eval_shape(self._programs.empty)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    @property
    def busy(self) -> bool:
        """Whether any question is waiting or running."""
        return bool(self._submitted) or bool(self._waiting) or any(self._running)

    def release(self) -> None:
        """Frees the memory of parameters and state, and drops all questions."""
        self._submitted.clear()
        self._waiting.clear()
        self._running = [None] * self.slots
        self._visual.clear()
        self._prompts.clear()
        self._params = self._state = None

    def warm_up(self) -> float:
        """Compiles every program for every bucket; returns the seconds that it took. Nothing may be running.

        Raises:
          RuntimeError: a question is running.
        """
        if self.busy:
            raise RuntimeError("warm_up: a question is running; warm the engine up before the first step")
        started, b, Q = time.perf_counter(), self.buckets, self.questions
        with self._context():
            for frames, patches, tokens in itertools.product(b.frames, b.slots, b.visual):
                vision = VisionBatch(
                    np.zeros((frames, patches, b.patch_values), np.float32),
                    np.zeros((frames, patches, 2), np.int32),
                    np.zeros((frames, patches), bool),
                    np.zeros((frames, tokens), np.int32),
                    b.shards_of(Q),
                )
                visual = self._encode(vision)
            for P in b.prompts:
                prompts = empty_prompts(dataclasses.replace(self._sizes, prompt=P), Q)
                prefilled = self._programs.prefill(self._params, visual, self._placed(prompts))
                self._insert(prefilled, no_rows(Q * self.options.group_size, self.options), np.full(Q, self.slots))
            jax.block_until_ready(self._decode_loop(1))
        self._visual.clear()
        return time.perf_counter() - started

    def submit(self, request: Request) -> int:
        """Puts a request at the end of the queue.

        Returns:
          the request's ticket, which its updates carry.

        Raises:
          ValueError: a setting is out of range or not supported by this engine, or the questions fit no bucket; the
            message names it.
        """
        check_request(request, self.options, self.buckets, self.questions, self._token_bytes is not None)
        ticket = next(self._tickets)
        self._submitted.append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Removes a request, waiting or running, and frees its slots. Does nothing if it has ended."""
        self._submitted = collections.deque(item for item in self._submitted if item[0] != ticket)
        self._waiting = collections.deque(item for item in self._waiting if item.ticket != ticket)
        for slot, running in enumerate(self._running):
            if running is not None and running.ticket == ticket:
                self._free(slot)

    def step(self) -> list[Update]:
        """Fills free slots, runs one decode loop, and returns an update for every running question, in slot order."""
        with self._context():
            self._fill()
            if not any(self._running):
                return []
            return self._harvest(self._decode_loop(self._steps))

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, int, Rollout]]:
        """Yields (number of the request, number of the question within it, rollout) as questions end.

        Requests are read as slots become free, one in advance. A loop runs until a question ends, or, if no question is
        waiting, until all have ended. With stop strings or log-probabilities it runs for `steps` tokens, as in `step`.
        """
        numbers: dict[int, int] = {}
        asked = enumerate(requests)
        more = True

        def read() -> None:
            nonlocal more
            if (one := next(asked, None)) is None:
                more = False
            else:
                numbers[self.submit(one[1])] = one[0]

        while True:
            while more and self._running.count(None) > self._queued():
                read()
            with self._context():
                self._fill()
                if not any(self._running):
                    return
                running = [one.request for one in self._running if one is not None]
                read_often = any(one.stop or one.top_logprobs is not None for one in running)
                steps = self._steps if read_often else FOREVER
                report = self._decode_loop(steps, until_one_ends=more or self._queued() > 0)
                if more and not self._submitted:
                    read()  # collated by the host while the device decodes
                updates = self._harvest(report)
            for update in updates:
                if update.rollout is not None:
                    yield numbers[update.ticket], update.question, update.rollout

    def _queued(self) -> int:
        """Questions that have no slot yet."""
        submitted = (self.questions if one.count is None else one.count for _, one in self._submitted)
        return sum(submitted) + sum(len(item.left) for item in self._waiting)

    def _context(self) -> Any:
        """The context in which programs are traced: the mesh and the meaning of the logical axes."""
        stack = contextlib.ExitStack()
        if self._mesh is not None:
            stack.enter_context(jax.set_mesh(self._mesh))
            stack.enter_context(activation_rules())
        return stack

    def _placed(self, tree: Any) -> Any:
        return tree if self._mesh is None else place(tree, batch_sharding(self._mesh))

    def _decode_loop(self, steps: int, until_one_ends: bool = False) -> _Report:
        """Runs one loop; returns all responses so far, which rows are live, and log-probabilities, on the device."""
        awaited_Q = np.array([until_one_ends and one is not None for one in self._running])
        cancelled_B, self._cancelled_B = self._cancelled_B, np.zeros_like(self._cancelled_B)
        rows = self._placed((cancelled_B, awaited_Q))
        state = self._programs.empty() if self._state is None else self._state
        self._state, rollout, live_B, recent = self._programs.decode(
            self._params, state, self._bias_V, rows[0], np.int32(steps), rows[1]
        )
        return rollout, live_B, recent

    def _insert(self, prefilled: Prefilled, rows: Any, slot_Q: np.ndarray, used_B: np.ndarray | None = None) -> None:
        state = self._programs.empty() if self._state is None else self._state
        used_B = np.zeros(len(slot_Q) * self.options.group_size, bool) if used_B is None else used_B
        self._state = self._programs.insert(state, prefilled, *self._placed((rows, used_B, slot_Q.astype(np.int32))))

    def _fill(self) -> None:
        """Puts waiting questions into free slots, and prefills submitted requests while slots are free."""
        U, width = self.options.shards, self.slots // self.options.shards
        while True:
            for item in list(self._waiting):
                free = [[u * width + s for s in range(width) if self._running[u * width + s] is None] for u in range(U)]
                placed = {}
                for question in item.left:
                    if slots := free[question * U // self.questions]:
                        placed[question] = slots.pop(0)
                if placed:
                    self._start(item, placed)
            self._waiting = collections.deque(item for item in self._waiting if item.left)
            # One shard may have no free slot while another has no question: then one more request is prefilled.
            if None not in self._running or not self._submitted or len(self._waiting) > 1:
                return
            ticket, request = self._submitted.popleft()
            count = self.questions if request.count is None else request.count
            self._waiting.append(_Waiting(ticket, request, self._prefill(request), list(range(count))))

    def _start(self, item: _Waiting, placed: dict[int, int]) -> None:
        """Puts some questions of a request into slots."""
        request, Q, G = item.request, self.questions, self.options.group_size
        width = self.slots // self.options.shards
        own = min(len(request.samples), G)  # rows of a question
        used_B, slot_Q = np.zeros(Q * G, bool), np.full(Q, self.slots)
        for question, slot in placed.items():
            slot_Q[question] = slot % width
            used_B[question * G : question * G + own] = True
            stops = [self._stop_search(request) for _ in range(own if request.stop else 0)]
            self._running[slot] = _Running(item.ticket, question, request, [0] * own, [None] * own, stops)
            self._cancelled_B[self._rows(slot)] = False
        item.left = [question for question in item.left if question not in placed]
        self._insert(item.prefilled, row_settings(request, self.options, Q), slot_Q, used_B)

    def _prefill(self, request: Request) -> Prefilled:
        """Prefills a request. If requests have one question each, the last few results are cached."""
        prompts = self._padded(request.prompts)
        make = lambda: self._programs.prefill(self._params, self._encode(request.vision), self._placed(prompts))  # noqa: E731
        if self.questions > 1 or not isinstance(request.vision, VisionBatch):
            return make()
        return _kept(self._prompts, self._digest(request.vision) + _digest(prompts), make)

    def _encode(self, vision: VisionBatch | VisualTokens) -> VisionBatch | VisualTokens:
        """Encodes images, cached as in `_prefill`; returns the images themselves if insertions are made from them."""
        if isinstance(vision, VisualTokens) or self.options.reattention.content in NEED_IMAGES:
            return vision
        if self.questions > 1:
            return self._programs.encode(self._params, self._placed(vision))
        make = lambda: self._programs.encode(self._params, self._placed(vision))  # noqa: E731
        return _kept(self._visual, self._digest(vision), make)

    def _digest(self, vision: VisionBatch) -> bytes:
        """The images' digest. That of the last ones is cached: requests of several responses share their images."""
        if self._hashed[0]() is not vision:
            self._hashed = weakref.ref(vision), _digest(vision)
        return self._hashed[1]

    def _harvest(self, reported: _Report) -> list[Update]:
        """Makes the updates of all running questions, and frees the slots whose rows have all ended."""
        some = any(one is not None and one.request.top_logprobs is not None for one in self._running)
        report, live_B, recent = jax.device_get(reported if some else (*reported[:2], None))
        updates = []
        for slot, running in enumerate(self._running):
            if running is None:
                continue
            first, new = slot * self.options.group_size, []
            top, logprobs = running.request.top_logprobs, []
            for row, said in enumerate(running.said):
                b, length = first + row, int(report.length_B[first + row])
                if running.end[row] is not None:
                    new.append([])
                    logprobs.append([])
                    continue
                ended = not live_B[b]
                new_ids = report.ids_BxR[b, said:length].tolist()
                if running.stops and (end := running.stops[row].end(new_ids)) is not None:
                    length, ended = said + end, True
                    self._cancelled_B[b] = True
                new.append(new_ids[: length - said])
                if recent is not None and top is not None:
                    logprobs.append(recent.of_tokens(b, said, length, top))
                running.said[row] = length
                running.end[row] = length if ended else None
            rollout = None
            if None not in running.end:
                rollout = self._cut(report, first, running.said)
                self._free(slot)
            updates.append(Update(running.ticket, running.question, new, rollout, None if top is None else logprobs))
        return updates

    def _stop_search(self, request: Request) -> StopSearch:
        assert self._token_bytes is not None  # see `check_request`
        return StopSearch(request.stop, TokenText(self._token_bytes, self.options.stop_ids))

    def _cut(self, report: Rollout, first: int, ends: list[int]) -> Rollout:
        """A question's rows without what follows a stop string; an insertion at its last token is removed too."""
        rollout = jax.tree.map(lambda x: np.array(x[first : first + len(ends)]), report)
        for row, n in enumerate(ends):
            tags = rollout.ids_BxR[row, : n - 1].tolist().count(self.options.reattention.open_id)
            if n < rollout.length_B[row]:
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

    def _rows(self, slot: int) -> slice:
        G = self.options.group_size
        return slice(slot * G, (slot + 1) * G)

    def _padded(self, prompts: PromptBatch) -> PromptBatch:
        """Pads or cuts the questions' insertions to the engine's sizes; removes them if nothing is inserted."""
        X, N = self._sizes.block
        if not X:
            return dataclasses.replace(prompts, block=None)
        like = empty_prompts(self._sizes, 1).block
        assert like is not None and prompts.block is not None

        def to(x: Any, like: np.ndarray) -> Any:
            if x.ndim == 1 or x.shape[1] == like.shape[1]:
                return x
            x = x[:, : like.shape[1]]  # what is cut is padding, see `check_request`
            return np.pad(x, [(0, 0), (0, like.shape[1] - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

        return dataclasses.replace(prompts, block=jax.tree.map(to, prompts.block, like))


def _digest(arrays: Any) -> bytes:
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(repr((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _kept(store: collections.OrderedDict[bytes, Any], key: bytes, make: Callable[[], Any]) -> Any:
    """The cached result for a digest, or a new one; at most KEPT are cached, the most recently used."""
    if key not in store:
        store[key] = make()
        if len(store) > KEPT:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]
