"""Sizes of an engine's state, from the buckets of its requests."""

from __future__ import annotations

import dataclasses

import numpy as np

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.model.kernels import backend_here
from qwenla_jax.reattention.options import ReattentionConfig, most_slots
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.types import PromptBatch, ReinsertedImages

# Slots of a page, where each row's pages are read by themselves, and where all rows' are read together. One of a few
# rows' keys fits into a TPU's own memory, and then it is read once; a larger one would be copied before it is read.
PAGE, TOGETHER = 64, 1024
LEAST_INSERTION = 16  # slots of the smallest size that insertions are padded to


@dataclasses.dataclass(frozen=True)
class SlotSizes:
    """Sizes of an engine's state; static.

    Attributes:
      questions: Q, the engine's slots; each holds a question.
      prompt: P, most tokens of a prompt.
      visual: Z, most visual tokens of a request.
      block: X and N of `ReinsertedImages`; 0 where nothing is inserted.
      insertions: ascending lengths, in cache slots, that insertions are padded to; the last fits every insertion. Empty
        if nothing is inserted.
      reported: tokens of a row whose log-probabilities are held, the most of one loop; 0 if none are reported.
    """

    questions: int
    prompt: int
    visual: int
    block: tuple[int, int] = (0, 0)
    insertions: tuple[int, ...] = ()
    reported: int = 0

    def cache(self, options: SampleOptions) -> int:
        """Cache slots of a row: the longest response with all its insertions."""
        most = self.insertions[-1] if self.insertions else 0
        return options.max_new_tokens + options.reattention.max_insertions * most


def paged(options: SampleOptions, sizes: SlotSizes, on_one_cpu: bool) -> SampleOptions:
    """The options with the pages that are read fastest, for a state of these sizes.

    A row is read no further than it is filled on one CPU device, and no further than the longest one on accelerators.
    """
    slots = max(sizes.cache(options), sizes.prompt)
    if on_one_cpu:
        return dataclasses.replace(options, page=PAGE) if slots > 2 * PAGE else options
    if backend_here() == "cpu" or slots <= TOGETHER:
        return options
    return dataclasses.replace(options, page=TOGETHER, together=True)


def sizes_of_batch(reattention: ReattentionConfig, prompts: PromptBatch) -> SlotSizes:
    """The sizes of a state for one batch of the given shapes, which may be abstract."""
    (Q, P), block = prompts.ids_QxP.shape, prompts.block
    if not reattention.inserts or block is None:
        return SlotSizes(Q, P, 0)
    X, N = block.source_QxX.shape[1], block.tokens_QxN.shape[1]
    return SlotSizes(Q, P, 0, (X, N), (most_slots(reattention, block),))


def sizes_for(reattention: ReattentionConfig, buckets: Buckets, slots: int) -> SlotSizes:
    """The sizes of a state of so many slots for requests of the given buckets."""
    X, N = block_sizes(reattention, buckets)
    visual = buckets.frames[-1] * buckets.visual[-1]
    return SlotSizes(slots, buckets.prompts[-1], visual, (X, N), _insertion_sizes(reattention, buckets, X, N))


def block_sizes(options: ReattentionConfig, buckets: Buckets) -> tuple[int, int]:
    """X and N of `ReinsertedImages` that fit every question; 0 if nothing is inserted."""
    if not options.inserts:
        return 0, 0
    one, several = options.slots(1, buckets.visual[-1]), options.slots(buckets.images, buckets.visual[-1])
    return (one if buckets.images == 1 else max(one, min(several, buckets.prompts[-1]))), buckets.images


def _insertion_sizes(options: ReattentionConfig, buckets: Buckets, X: int, N: int) -> tuple[int, ...]:
    """Padded lengths of insertions: the longest, its half and its quarter, if insertions can be that short."""
    if not X:
        return ()
    block = empty_prompts(SlotSizes(1, 1, 0, (X, N)), 1).block
    most = most_slots(options, block)
    least = LEAST_INSERTION if options.by_row else options.slots(1, buckets.visual[0])
    return tuple(sorted({size for n in (4, 2, 1) if (size := -(-most // n)) >= min(least, most)}))


def empty_prompts(sizes: SlotSizes, questions: int) -> PromptBatch:
    """Prompts of one token of id 0 each, padded to the sizes; on the host."""
    zeros = lambda *shape: np.zeros((questions, *shape), np.int32)  # noqa: E731
    P, (X, N) = sizes.prompt, sizes.block
    block = ReinsertedImages(zeros(X) - 1, zeros(X, 3), zeros(X), zeros(), zeros(), zeros(N)) if X else None
    return PromptBatch(zeros(P), zeros(P, 3), zeros(P) - 1, zeros() + 1, zeros() + 1, block)
