"""Log-probabilities of recent tokens, and of the most likely alternatives to them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

MOST_TOP_LOGPROBS = 20  # largest `top_logprobs` of a request; OpenAI's bound


class TokenLogprob(NamedTuple):
    """The log-probability of a token, and those of the most likely tokens at its position; on the host.

    Natural logarithms of softmax(logits) with suppressed tokens masked, before penalties, temperature, top-k and top-p;
    for sampled and forced tokens alike.

    Attributes:
      logprob: of the token.
      top: ids and log-probabilities of the most likely tokens, the most likely first; the token may be among them.
    """

    logprob: float
    top: list[tuple[int, float]]


@struct.dataclass
class RecentLogprobs:
    """Log-probabilities of the last S tokens of each row, a ring buffer: token t of a row is at index t % S.

    While a row asks for them, a loop decodes at most S tokens, so the host reads every entry before it is overwritten.

    Attributes:
      logp_BxS: float32, of the row's tokens.
      top_ids_BxSxK, top_logp_BxSxK: int32 and float32, the K most likely tokens, the most likely first.
    """

    logp_BxS: jax.Array
    top_ids_BxSxK: jax.Array
    top_logp_BxSxK: jax.Array

    def of_tokens(self, row: int, first: int, end: int, top: int) -> list[TokenLogprob]:
        """The entries of tokens `first` to `end` - 1 of a row; on the host.

        Args:
          row: number of the row.
          first, end: token numbers; the tokens have to be among the row's last S.
          top: how many of the most likely tokens each entry has.
        """
        S = self.logp_BxS.shape[1]
        result = []
        for at in (t % S for t in range(first, end)):
            ids, logp = (x[row, at, :top].tolist() for x in (self.top_ids_BxSxK, self.top_logp_BxSxK))
            result.append(TokenLogprob(float(self.logp_BxS[row, at]), list(zip(ids, logp, strict=True))))
        return result


def no_logprobs(rows: int, tokens: int, top: int) -> RecentLogprobs:
    """An empty buffer of B = `rows`, S = `tokens` and K = `top`; all zeros."""
    shape = (rows, tokens, top)
    return RecentLogprobs(jnp.zeros(shape[:2], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def with_logprobs(
    recent: RecentLogprobs,
    logits_BxV: jax.Array,
    logit_bias_V: jax.Array,
    ids_B: jax.Array,
    number_B: jax.Array,
    top_B: jax.Array,
    active_B: jax.Array,
) -> RecentLogprobs:
    """The buffer with the entry of one more token in each active row that asks for log-probabilities.

    Args:
      recent: the buffer so far.
      logits_BxV: float32, before penalties and temperature.
      logit_bias_V: float32, see `token.suppression_bias`.
      ids_B: int32, the new tokens.
      number_B: int32, how many tokens each row had before.
      top_B: int32, `top_logprobs` of each row; -1: the row asks for no log-probabilities.
      active_B: bool, rows that get a token.
    """
    (B, S, K), wanted_B = recent.top_ids_BxSxK.shape, active_B & (top_B >= 0)

    def measured(recent: RecentLogprobs) -> RecentLogprobs:
        masked_BxV = logits_BxV + logit_bias_V
        total_Bx1 = jax.nn.logsumexp(masked_BxV, axis=-1, keepdims=True)
        logit_Bx1 = jnp.take_along_axis(masked_BxV, ids_B[:, None], axis=-1)
        none = jnp.zeros((B, K), masked_BxV.dtype), jnp.zeros((B, K), jnp.int32)
        some = jnp.any(wanted_B & (top_B > 0))
        top_BxK, top_ids_BxK = jax.lax.cond(some, lambda x: tuple(jax.lax.top_k(x, K)), lambda x: none, masked_BxV)
        here_BxS = wanted_B[:, None] & (jnp.arange(S) == number_B[:, None] % S)
        here_BxSx1 = here_BxS[..., None]
        return RecentLogprobs(
            jnp.where(here_BxS, logit_Bx1 - total_Bx1, recent.logp_BxS),
            jnp.where(here_BxSx1, top_ids_BxK[:, None], recent.top_ids_BxSxK),
            jnp.where(here_BxSx1, (top_BxK - total_Bx1)[:, None], recent.top_logp_BxSxK),
        )

    return jax.lax.cond(jnp.any(wanted_B), measured, lambda x: x, recent)
