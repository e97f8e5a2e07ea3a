"""Samples batches of questions by an engine: a slot that a short answer frees takes a question of the next batch."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.slot_sizes import block_sizes
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch, VisualTokens


class Asked(NamedTuple):
    """A batch of questions.

    Attributes:
      vision, prompts: the batch.
      step: see `engine.Request`.
      sample_B: uint32, the numbers of the responses.
      count: questions; the batch's others only fill it. None: all.
    """

    vision: VisionBatch | VisualTokens
    prompts: PromptBatch
    step: int
    sample_B: np.ndarray
    count: int | None = None


class Sampler:
    """Samples batches with the same options. Between two calls it holds no device memory.

    Where images are inserted, their size decides how many slots a row needs. There is an engine for images of up to a
    quarter, a half, and all of the most visual tokens; a batch takes the smallest that holds it, and within a call none
    smaller than the batch before: an engine is left only when its questions have ended.

    Args:
      runtime: the model and its devices.
      options: of `Runtime.sample_options`.
      rows: questions of a batch, which are also decoded at once.
      buckets: shapes that batches may have; None for those of the runtime.
    """

    def __init__(
        self, runtime: Runtime, options: SampleOptions, rows: int | None = None, buckets: Buckets | None = None
    ) -> None:
        rows = rows or runtime.config.batch_size
        self._runtime, self._options, self._rows = runtime, options, rows
        self.buckets = buckets or runtime.buckets(rows)
        self._engines: dict[tuple[int, ...], Engine] = {}

    def __call__(
        self, params: Params, vision: VisionBatch | VisualTokens, prompts: PromptBatch, step: int, sample_B: np.ndarray
    ) -> Rollout:
        """Responses to one batch, on the host."""
        return next(self.run(params, [Asked(vision, prompts, step, sample_B)]))

    def run(self, params: Params, batches: Iterable[Asked]) -> Iterator[Rollout]:
        """Responses to batches, on the host, in the batches' order.

        Rows that only fill a batch have a response of one stop token.

        Raises:
          RuntimeError: an earlier call has not ended.
        """
        if any(engine.busy for engine in self._engines.values()):
            raise RuntimeError("the sampler is running already; take another one for batches within its loop")
        params = self._runtime.sampling_params(params, self._options)
        most = self.buckets.visual[:1]

        def visual(batch: Asked) -> tuple[int, ...]:
            nonlocal most
            most = max(most, self._visual(batch.prompts))
            return most

        for sizes, same in itertools.groupby(batches, visual):
            yield from self._run(self._engine(sizes), params, same)

    def _visual(self, prompts: PromptBatch) -> tuple[int, ...]:
        """The buckets of visual tokens that an engine for such prompts has; a function of shapes alone."""
        sizes, reattention = self.buckets.visual, self._options.reattention
        if prompts.block is None or not reattention.inserts:
            return sizes
        for part in (4, 2):
            some = sizes[: 1 + bisect.bisect_left(sizes, sizes[-1] / part)]
            block, _ = block_sizes(reattention, dataclasses.replace(self.buckets, visual=some))
            if prompts.block.source_QxX.shape[1] <= block:
                return some
        return sizes

    def _engine(self, visual: tuple[int, ...]) -> Engine:
        if visual not in self._engines:
            buckets = dataclasses.replace(self.buckets, visual=visual)
            self._engines[visual] = self._runtime.engine(self._options, buckets, self._rows)
        return self._engines[visual]

    def _run(self, engine: Engine, params: Params, batches: Iterable[Asked]) -> Iterator[Rollout]:
        options = self._options
        engine.params = params
        asked: list[tuple[int, int]] = []  # of each batch: its questions, and the slots of its images' blocks

        def requests() -> Iterator[Request]:
            for batch in batches:
                block = batch.prompts.block
                slots = block.source_QxX.shape[1] if block is not None and options.reattention.inserts else 0
                asked.append((self._rows if batch.count is None else batch.count, slots))
                yield Request(
                    batch.vision,
                    batch.prompts,
                    batch.sample_B,
                    batch.count,
                    self._runtime.config.seed,
                    batch.step,
                    options.temperature,
                    options.top_p,
                )

        ended: dict[int, dict[int, Rollout]] = {}
        first = 0
        try:
            for number, question, rollout in engine.run(requests()):
                ended.setdefault(number, {})[question] = rollout
                while first in ended and len(ended[first]) == asked[first][0]:
                    parts, (count, slots) = ended.pop(first), asked[first]
                    yield self._joined([parts[question] for question in range(count)], slots)
                    first += 1
        finally:
            engine.release()

    def _joined(self, parts: list[Rollout], slots: int) -> Rollout:
        """The batch's rollout, its X as wide as the batch's; rows without a question have one stop token."""
        missing = self._rows - len(parts)
        if missing:
            empty = jax.tree.map(np.zeros_like, parts[0])
            empty.ids_BxR[:] = self._options.stop_ids[0]
            empty.length_B[:], empty.stopped_B[:] = 1, True
            parts = parts + [empty] * missing
        whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        return dataclasses.replace(whole, selected_BxExX=whole.selected_BxExX[:, :, :slots])
