"""How to sample."""

from __future__ import annotations

import dataclasses

from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How to sample.

    Attributes:
      group_size: responses a question, G.
      max_new_tokens: longest response, R, the stop token included.
      temperature: 0 is greedy.
      top_p: nucleus; 1 is the whole distribution.
      stop_ids: any of these ends a response.
      reattention: whether and how images are re-inserted before a reflection.
      cache_block: the cache's keys are summed in blocks of so many slots, see `Segment.blocks`; None: in one. Then how
        large the cache is does not change how a row is rounded.
      shards: equal shards of rows, each on its own devices; an insertion takes as many rows of each.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    reattention: ReattentionConfig = TEXT_ONLY
    shards: int = 1
    cache_block: int | None = None

    def cache_blocks(self, slots: int) -> int | None:
        """The blocks of a cache of so many slots; None: no blocks."""
        return None if self.cache_block is None else slots // self.cache_block

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.group_size < 1 or self.max_new_tokens < 1:
            raise ValueError("group_size and max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0 and top_p above 0 and at most 1")
