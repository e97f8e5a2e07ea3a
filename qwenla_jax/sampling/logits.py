"""From logits to a token: forbidden tokens, temperature, nucleus, and keys that belong to the token alone."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.model.layers import HIDDEN


def forbidden_bias(vocab_size: int, known_tokens: int, forbidden: Iterable[int]) -> np.ndarray:
    """What is added to the logits, in sampling and in training alike, so that some tokens never come.

    Args:
      vocab_size: rows V of the output matrix.
      known_tokens: ids from here on have no text in the tokenizer and are forbidden too.
      forbidden: ids that must not be sampled (the vision tokens).

    Returns:
      float32 [V], 0 or a number so low that the probability is exactly 0.
    """
    bias_V = np.zeros(vocab_size, np.float32)
    bias_V[known_tokens:] = HIDDEN
    bias_V[list(forbidden)] = HIDDEN
    return bias_V


def token_keys(seed: jax.Array, step: jax.Array, sample_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """One key a row, a function of (seed, step, sample, token) and of nothing else.

    Args:
      seed, step: scalars.
      sample_B: uint32, the sample's number within the step.
      token_B: int32, how many tokens the row has generated.
    """
    base = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda s, t: jax.random.fold_in(jax.random.fold_in(base, s), t))(sample_B, token_B)


def nucleus(logits_BxV: jax.Array, top_p: float) -> jax.Array:
    """Hides all but the smallest set of most likely tokens whose probabilities sum to at least `top_p`."""
    order_BxV = jnp.flip(jnp.sort(logits_BxV, axis=-1), axis=-1)
    p_BxV = jax.nn.softmax(order_BxV, axis=-1)
    # A token stays while the mass before it is below top_p; the first always stays.
    kept_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV < top_p
    least_B = jnp.min(jnp.where(kept_BxV, order_BxV, jnp.inf), axis=-1)
    return jnp.where(logits_BxV >= least_B[:, None], logits_BxV, HIDDEN)


def inverse_cdf(logits_BxV: jax.Array, uniform_B: jax.Array, shards: int = 1) -> jax.Array:
    """The token at which the cumulative distribution passes `uniform_B` in [0, 1): one random number a token.

    Adding Gumbel noise would need V random numbers a token, which cost more than a small model does.

    Args:
      logits_BxV: float32.
      uniform_B: float32 in [0, 1).
      shards: equal runs of V that lie on different devices; each is summed on its own, and only the ends of the runs
        meet. Where there are several, sums are rounded in another order than where there is one.

    Returns:
      int32 [B], never a token whose probability is 0.
    """
    p_BxV = jnp.exp(logits_BxV - logits_BxV.max(-1, keepdims=True))
    B, V = p_BxV.shape
    within_BxNxW = jnp.cumsum(p_BxV.reshape(B, shards, V // shards), axis=-1)
    ends_BxN = jnp.cumsum(within_BxNxW[..., -1], axis=-1)
    before_BxN = jnp.pad(ends_BxN[:, :-1], [(0, 0), (1, 0)])
    sum_BxV = (before_BxN[..., None] + within_BxNxW).reshape(B, V)
    # Rounding may leave the sum not quite monotonic and its end not quite reached: a hidden token is never taken.
    passed_BxV = (sum_BxV > uniform_B[:, None] * ends_BxN[:, -1:]) & (p_BxV > 0)
    token_B = jnp.argmax(passed_BxV, axis=-1)
    return jnp.where(passed_BxV.any(-1), token_B, jnp.argmax(p_BxV, axis=-1)).astype(jnp.int32)


def choose(
    logits_BxV: jax.Array, bias_V: jax.Array, temperature: float, top_p: float, keys_B: jax.Array, shards: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Samples one token a row.

    Args:
      logits_BxV: float32.
      bias_V: as `forbidden_bias` makes it.
      temperature: 0 takes the most likely token.
      top_p: 1 samples from the whole distribution.
      keys_B: one key a row.
      shards: see `inverse_cdf`.

    Returns:
      int32 tokens [B] and their float32 log-probabilities [B] under softmax((logits + bias) / temperature), before
      top-p; at temperature 0 under temperature 1.
    """
    logits_BxV = (logits_BxV + bias_V) / (temperature or 1.0)
    if temperature == 0:
        token_B = jnp.argmax(logits_BxV, axis=-1)
    else:
        open_BxV = logits_BxV if top_p >= 1 else nucleus(logits_BxV, top_p)
        token_B = inverse_cdf(open_BxV, jax.vmap(jax.random.uniform)(keys_B), shards)
    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BxV, axis=-1)
