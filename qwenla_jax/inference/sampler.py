"""Samples batches of questions by an engine: a slot that a short answer frees takes a question of the next batch."""

from __future__ import annotations

import dataclasses
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
        self._runtime, self._options = runtime, options
        self.engine: Engine = runtime.engine(options, buckets or runtime.buckets(rows), rows)

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
        engine, options = self.engine, self._options
        if engine.busy:
            raise RuntimeError("the sampler is running already; take another one for batches within its loop")
        engine.params = self._runtime.sampling_params(params)
        asked: list[tuple[int, int]] = []  # of each batch: its questions, and the slots of its images' blocks

        def requests() -> Iterator[Request]:
            for batch in batches:
                block = batch.prompts.block
                slots = block.source_QxX.shape[1] if block is not None and options.reattention.inserts else 0
                asked.append((engine.questions if batch.count is None else batch.count, slots))
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
        missing = self.engine.questions - len(parts)
        if missing:
            empty = jax.tree.map(np.zeros_like, parts[0])
            empty.ids_BxR[:] = self._options.stop_ids[0]
            empty.length_B[:], empty.stopped_B[:] = 1, True
            parts = parts + [empty] * missing
        whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        return dataclasses.replace(whole, selected_BxExX=whole.selected_BxExX[:, :, :slots])
