"""The loop from questions to texts: collates examples, samples responses and decodes them on the host."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.record import Record
from qwenla_jax.inference.read_examples import whole
from qwenla_jax.inference.responses import texts_of
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sampler import Asked, Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.parallel.distributed import is_primary
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch


class Answered(NamedTuple):
    """A batch with its responses, on the host. Rows after the last question only fill the batch.

    Attributes:
      records: the questions.
      vision, prompts: the batch.
      rollout: the responses, row b to question b // G.
      texts: the rollout's texts, by row.
    """

    records: list[Record]
    vision: VisionBatch
    prompts: PromptBatch
    rollout: Rollout
    texts: list[str]


def sample_batches(
    runtime: Runtime,
    params: Params,
    batches: Iterable[tuple[Sequence[Example], np.ndarray]],
    sampler: Sampler,
) -> Iterator[Answered]:
    """Samples batches, and gives them in their order. Slots that short answers free take questions of the next batch.

    Args:
      runtime, params: the model.
      batches: at most `InferenceConfig.batch_size` examples each, and the numbers of the samples, uint32
        [batch_size * G].
      sampler: see there; its buckets are the shapes that batches may have.
    """
    rows, buckets = runtime.config.batch_size, sampler.buckets
    waiting: collections.deque[tuple[list[Record], VisionBatch, PromptBatch]] = collections.deque()

    def asked() -> Iterator[Asked]:
        for examples, sample_B in batches:
            vision, prompts = runtime.collate_prompts(examples, buckets, rows)
            waiting.append(([example.record for example in examples], vision, prompts))
            yield Asked(vision, prompts, 0, sample_B, len(examples))

    for rollout in sampler.run(params, asked()):
        yield Answered(*waiting.popleft(), rollout, texts_of(rollout, runtime.tokenizer))


def answer(
    runtime: Runtime, params: Params, source: RecordSource, size: int, sampler: Sampler | None = None
) -> Iterator[Answered]:
    """Responses to the first `size` usable questions, batch by batch; greedy ones unless another sampler is given.

    A bar on stderr counts the questions, where that is a terminal.

    Raises:
      TooManyInvalid: more than `InferenceConfig.max_invalid` records are invalid; up to that they are left out.
    """
    rows = runtime.config.batch_size
    sampler = sampler or Sampler(runtime, runtime.sample_options(group_size=1, temperature=0.0))
    examples = itertools.islice(whole(source, runtime.example(with_response=False), runtime.config), size)
    numbers = np.arange(rows, dtype=np.uint32)
    batches = iter(lambda: list(itertools.islice(examples, rows)), [])
    quiet = None if is_primary() else True  # None: shown on a terminal only
    with tqdm(total=min(size, len(source)), unit="question", leave=False, disable=quiet) as bar:
        for batch in sample_batches(runtime, params, ((batch, numbers) for batch in batches), sampler):
            yield batch
            bar.update(len(batch.records))
