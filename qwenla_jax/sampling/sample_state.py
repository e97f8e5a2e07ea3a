"""What the sampling loop carries from token to token, and how a subset of its rows is read and written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.model.pages import Pages
from qwenla_jax.reattention.options import RowReattention
from qwenla_jax.sampling.penalties import RowPenalties, TokenCounts
from qwenla_jax.sampling.recent_logprobs import RecentLogprobs
from qwenla_jax.types import PromptBatch, Rollout


@struct.dataclass
class RowSettings:
    """What a request sets for its rows; all arrays are [B].

    Attributes:
      seed_B, step_B, sample_B: uint32; a token's random key is a function of these and of the token's number.
      temperature_B, top_p_B: float32; temperature 0 is greedy.
      top_k_B: int32, 0 for the whole vocabulary.
      limit_B: int32, longest response of the row, in tokens.
      reattention: of each row.
      penalties: of each row; None in programs without them.
      top_logprobs_B: int32, how many of the most likely tokens are reported for each token; -1: no log-probabilities;
        None in programs without them.
    """

    seed_B: Any
    step_B: Any
    sample_B: Any
    temperature_B: Any
    top_p_B: Any
    top_k_B: Any
    limit_B: Any
    reattention: RowReattention
    penalties: RowPenalties | None = None
    top_logprobs_B: Any = None


@struct.dataclass
class SampleState:
    """All that decoding needs except the parameters; rows are independent of each other.

    Attributes:
      prompts: the Q questions; row b belongs to question b // G.
      prompt_QxPxD: embeddings of the prompts, which insertions repeat, with their features for DeepStack.
      prefix: keys and values of the prompts, a row a question.
      rows: settings of each row.
      hidden_BxD: the hidden state that predicts each row's next token.
      cache: keys and values of the row's own tokens.
      next_pos_B: int32, M-RoPE position of the next token. Not derived from the length, because an insertion increases
        position and length by different amounts.
      received_BxP: float32, sum of the attention that each slot of the prompt has received from the row's tokens;
        [B, 0] if no mode selects by attention.
      pending_B: bool, the row has sampled a tag whose insertion has not run yet.
      closing_B: bool, the row's next token is forced to be `</REFLECTION>`.
      rollout: the responses so far. A row that is not in use has stopped.
      counts: the tokens of prompts and responses; None in programs without penalties.
      logprobs: log-probabilities of the last tokens; None in programs without them.
    """

    prompts: PromptBatch
    prompt_QxPxD: jax.Array
    prefix: Pages
    rows: RowSettings
    hidden_BxD: jax.Array
    cache: Pages
    next_pos_B: jax.Array
    received_BxP: jax.Array
    pending_B: jax.Array
    closing_B: jax.Array
    rollout: Rollout
    counts: TokenCounts | None = None
    logprobs: RecentLogprobs | None = None

    @property
    def live_B(self) -> jax.Array:
        """Rows that have not ended, pending ones included."""
        return ~self.rollout.stopped_B & (self.rollout.length_B < self.rows.limit_B)


class RowSubset:
    """A subset of the rows of a sharded batch: the same number from each shard, so no row moves between devices.

    Args:
      wanted_B: bool, rows that should be in the subset.
      shards: equal shards of rows.
      rows: size C of the subset over all shards; a multiple of `shards`.

    Attributes:
      row_C: int32, row numbers: of each shard the first wanted rows, padded with others.
      wanted_C: bool, whether the row is a wanted one, not padding.
    """

    def __init__(self, wanted_B: jax.Array, shards: int, rows: int) -> None:
        """Selects the rows."""
        self._shards = shards
        wanted_DxF = wanted_B.reshape(shards, -1)
        self._at_DxC = jnp.argsort(~wanted_DxF, axis=1, stable=True)[:, : rows // shards]
        self.wanted_C = jnp.take_along_axis(wanted_DxF, self._at_DxC, axis=1).reshape(-1)
        first_D = jnp.arange(shards) * wanted_DxF.shape[1]
        self.row_C = (first_D[:, None] + self._at_DxC).reshape(-1)

    def take(self, x: jax.Array, axis: int = 0, share: int = 1) -> jax.Array:
        """The subset of `x` along `axis`; `share` consecutive rows have one entry of `x` in common."""
        split = self._split(x, axis)
        pick = lambda part, at: jnp.take(part, at // share, axis=axis)  # noqa: E731
        taken = jax.vmap(pick, (axis, 0), axis)(split, self._at_DxC)
        return taken.reshape(*x.shape[:axis], self._at_DxC.size, *x.shape[axis + 1 :])

    def _split(self, x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], self._shards, x.shape[axis] // self._shards, *x.shape[axis + 1 :])

    def put(self, x: jax.Array, values: jax.Array, axis: int = 0) -> jax.Array:
        """`x` with the values of the wanted rows of the subset written to it."""
        split = self._split(x, axis)
        size = split.shape[axis + 1]
        at_DxC = jnp.where(self.wanted_C.reshape(self._at_DxC.shape), self._at_DxC, size)
        values = values.reshape(*x.shape[:axis], *at_DxC.shape, *x.shape[axis + 1 :]).astype(x.dtype)
        index = (slice(None),) * axis
        write = lambda part, at, new: part.at[(*index, at)].set(new, mode="drop")  # noqa: E731
        return jax.vmap(write, (axis, 0, axis), axis)(split, at_DxC, values).reshape(x.shape)
