"""How to sample."""

from __future__ import annotations

import dataclasses

from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig
from qwenla_jax.sampling.recent_logprobs import MOST_TOP_LOGPROBS


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
      cuts: whether rows may cut the distribution, by top_p or top_k; where none does, no program sorts the vocabulary.
      penalties: whether rows may have presence, frequency and repetition penalties; where none does, no tokens are
        counted.
      top_logprobs: most alternatives of a token that rows may ask for, with the log-probabilities of their tokens, 0 to
        20; None: rows may ask for neither, and no program computes them.
      page: slots of a page of keys and values, see `model.pages`; None: a row is one page, and is read whole.
      shards: equal shards of rows, each on its own devices; an insertion takes as many rows of each.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    reattention: ReattentionConfig = TEXT_ONLY
    shards: int = 1
    cuts: bool = True
    penalties: bool = False
    top_logprobs: int | None = None
    page: int | None = None

    def pages(self, slots: int) -> tuple[int, int]:
        """How many pages hold so many slots, and the slots of each."""
        page = min(self.page or slots, slots)
        return -(-slots // page), page

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.group_size < 1 or self.max_new_tokens < 1:
            raise ValueError("group_size and max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0 and top_p above 0 and at most 1")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs: got {self.top_logprobs}, expected 0 to {MOST_TOP_LOGPROBS}, or None")
