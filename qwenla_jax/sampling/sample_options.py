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
      cuts: whether requests may set top_p or top_k; if False, no program sorts the vocabulary.
      penalties: whether requests may set presence, frequency and repetition penalties; if False, no program counts
        tokens.
      top_logprobs: the largest `top_logprobs` that requests may set, 0 to 20; None: they may ask for no
        log-probabilities, and no program computes them.
      page: cache slots of a page of keys and values, see `model.pages`; None: a row is one page, which is read whole.
      together: whether all rows read their first, second and further pages together, as accelerators do best.
      shards: equal shards of rows, each on its own devices; an insertion call takes the same number of rows from each.
      int8: whether the decoder's kernels are in int8, see `param_layout.cast`.
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
    together: bool = False
    int8: bool = False

    def pages(self, slots: int) -> tuple[int, int]:
        """The number of pages that hold so many cache slots, and the slots of a page."""
        page = min(self.page or slots, slots)
        count = -(-slots // page)
        return count, -(-slots // count) if self.together else page

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.group_size < 1 or self.max_new_tokens < 1:
            raise ValueError("group_size and max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0 and top_p above 0 and at most 1")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs: got {self.top_logprobs}, expected 0 to {MOST_TOP_LOGPROBS}, or None")
