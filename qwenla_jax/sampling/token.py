"""Sampling a token from logits: suppressed tokens, temperature, top-k, top-p, and a random key for each token."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint

from qwenla_jax.model.layers import MASK_VALUE


def suppression_bias(vocab_size: int, known_tokens: int, suppressed: Iterable[int]) -> np.ndarray:
    """The bias that suppresses tokens; sampling and training add it to the logits.

    Args:
      vocab_size: rows V of the output matrix.
      known_tokens: size of the tokenizer; ids from here on have no text and are suppressed too.
      suppressed: ids that must not be sampled (the vision tokens).

    Returns:
      float32 [V], 0 or `layers.MASK_VALUE`, at which the probability is exactly 0.
    """
    logit_bias_V = np.zeros(vocab_size, np.float32)
    logit_bias_V[known_tokens:] = MASK_VALUE
    logit_bias_V[list(suppressed)] = MASK_VALUE
    return logit_bias_V


def token_keys(seed_B: jax.Array, step_B: jax.Array, sample_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """A random key for each row: a function of (seed, step, sample, token) alone.

    Args:
      seed_B, step_B: uint32.
      sample_B: uint32, the sample's number within the step.
      token_B: int32, how many tokens the row has generated.
    """
    fold = jax.random.fold_in
    key = lambda seed, step, s, t: fold(fold(fold(jax.random.key(seed), step), s), t)  # noqa: E731
    return jax.vmap(key)(seed_B, step_B, sample_B, token_B)


def nucleus(logits_BxV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Masks all but the smallest set of most likely tokens whose probabilities sum to at least `top_p`.

    As in transformers: the least likely tokens whose sum is at most 1 - top_p are masked, lower ids first among equal
    ones. `top_p` is one number, or float32 [B, 1].
    """
    order_BxV = jnp.sort(logits_BxV, axis=-1)
    sum_BxV = jnp.cumsum(jax.nn.softmax(order_BxV, axis=-1), axis=-1)
    masked_B = jnp.sum(sum_BxV[:, :-1] <= 1 - top_p, axis=-1)
    least_Bx1 = jnp.take_along_axis(order_BxV, masked_B[:, None], axis=-1)
    equal_BxV = logits_BxV == least_Bx1
    less_B = jnp.sum(logits_BxV < least_Bx1, axis=-1)
    tied_BxV = equal_BxV & (jnp.cumsum(equal_BxV, axis=-1) > (masked_B - less_B)[:, None])
    return jnp.where((logits_BxV > least_Bx1) | tied_BxV, logits_BxV, MASK_VALUE)


def most_likely(logits_BxV: jax.Array, top_k_Bx1: jax.Array) -> jax.Array:
    """Masks tokens less likely than the k-th most likely; ties with it stay, as in transformers. 0 masks none."""
    V = logits_BxV.shape[-1]
    least_Bx1 = jnp.take_along_axis(jnp.sort(logits_BxV, axis=-1), jnp.clip(V - top_k_Bx1, 0, V - 1), axis=-1)
    return jnp.where((top_k_Bx1 > 0) & (logits_BxV < least_Bx1), MASK_VALUE, logits_BxV)


def uniforms(keys_B: jax.Array) -> jax.Array:
    """Two random numbers for each key, float32 [B, 2] in [0, 1].

    Each is made of 64 random bits and rounded. Near 0 they are as dense as float32 numbers, down to a spacing of
    2**-64; those of `jax.random.uniform` are 2**-23 apart everywhere, too far for rare tokens.
    """
    bits_Bx2x2 = jax.vmap(lambda key: jax.random.bits(key, (2, 2), jnp.uint32))(keys_B).astype(jnp.float32)
    return bits_Bx2x2[..., 0] * 2.0**-32 + bits_Bx2x2[..., 1] * 2.0**-64


def rising_sums(weight_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights in ascending order, and their cumulative sums. Both float32 [B, N].

    In this order a small weight is added to a small sum, so its relative error is at most about N * 2**-22.
    """
    order_BxN = jnp.sort(weight_BxN, axis=-1)
    return order_BxN, jnp.cumsum(order_BxN, axis=-1)


def drawn(weight_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Samples an index with a probability proportional to its weight, never one of weight 0. int32 [B].

    Inverts the cumulative sum of the ascending weights: small weights belong to random numbers near 0, which are dense
    enough for them, see `uniforms`.
    """
    # Not sharded along N: without the constraint XLA may shard the axis that is sorted.
    weight_BxN = with_logical_constraint(weight_BxN, ("batch", "tokens"))
    order_BxN, sum_BxN = rising_sums(weight_BxN)
    passed_BxN = sum_BxN > uniform_B[:, None] * sum_BxN[:, -1:]
    # No sum is above a random number of 1: it takes the last weight.
    rank_Bx1 = jnp.where(passed_BxN.any(-1), jnp.argmax(passed_BxN, axis=-1), weight_BxN.shape[1] - 1)[:, None]
    value_Bx1 = jnp.take_along_axis(order_BxN, rank_Bx1, axis=-1)
    turn_Bx1 = rank_Bx1 - jnp.sum(weight_BxN < value_Bx1, axis=-1, keepdims=True)
    equal_BxN = weight_BxN == value_Bx1
    return jnp.argmax(equal_BxN & (jnp.cumsum(equal_BxN, axis=-1) > turn_Bx1), axis=-1).astype(jnp.int32)


def draw(logits_BxV: jax.Array, uniform_Bx2: jax.Array) -> jax.Array:
    """Samples a token from softmax(logits): first one of N groups of tokens, then one of the W tokens in it.

    The rounding error of a cumulative sum over the whole vocabulary exceeds the probability of rare tokens, which would
    never be sampled. Gumbel noise needs V random numbers for a token, which cost more than a small model does.

    Group n has the tokens n, n + N, n + 2 N, ... If the vocabulary is sharded (over a power of two of devices, at most
    W), every device has an equal part of each group: only the groups' sums and one group's logits are communicated.

    Args:
      logits_BxV: float32.
      uniform_Bx2: as `uniforms` makes them.

    Returns:
      int32 [B], never a masked token.
    """
    W, N = group_sizes(logits_BxV.shape[1])
    logits_BxV = jnp.pad(logits_BxV, [(0, 0), (0, W * N - logits_BxV.shape[1])], constant_values=MASK_VALUE)
    logits_BxWxN = logits_BxV.reshape(-1, W, N)
    weight_BxN = jnp.sum(jnp.exp(logits_BxWxN - logits_BxWxN.max((1, 2), keepdims=True)), axis=1)
    group_B = drawn(weight_BxN, uniform_Bx2[:, 0])
    of_group_BxW = jnp.take_along_axis(logits_BxWxN, group_B[:, None, None], axis=2)[..., 0]
    return drawn(jnp.exp(of_group_BxW - of_group_BxW.max(-1, keepdims=True)), uniform_Bx2[:, 1]) * N + group_B


def group_sizes(vocab_size: int) -> tuple[int, int]:
    """Tokens W of a group and groups N for `draw`; W is a power of two of about the vocabulary's square root.

    Preferably W divides the vocabulary, so that the logits need no padding; it is then smaller, but N at most 16 W.
    """
    near = 2 ** round(math.log2(vocab_size) / 2)
    W = math.gcd(vocab_size, near)
    return (W, vocab_size // W) if vocab_size // W <= 16 * W else (near, -(-vocab_size // near))


def sample_token(
    logits_BxV: jax.Array,
    logit_bias_V: jax.Array,
    temperature_B: jax.Array,
    top_p_B: jax.Array,
    top_k_B: jax.Array,
    keys_B: jax.Array,
    cuts: bool = True,
    penalized_BxV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Samples one token a row.

    Args:
      logits_BxV: float32.
      logit_bias_V: as `suppression_bias` makes it.
      temperature_B: float32, 0 takes the most likely token.
      top_p_B: float32, 1 samples from the whole distribution.
      top_k_B: int32, samples from this many of the most likely tokens; applied before top_p. 0: from all.
      keys_B: a random key for each row.
      cuts: static; False promises that top_p is 1 and top_k 0 in all rows.
      penalized_BxV: float32, the logits after penalties, from which the token is sampled; None: no penalties.

    Returns:
      int32 tokens [B] and their float32 log-probabilities [B] under softmax((logits + bias) / temperature), before
      penalties, top-k and top-p; at temperature 0 under temperature 1.
    """
    greedy_B = temperature_B == 0
    scaled = lambda x: (x + logit_bias_V) / jnp.where(greedy_B, 1.0, temperature_B)[:, None]  # noqa: E731
    unpenalized_BxV = logits_BxV = scaled(logits_BxV)
    if penalized_BxV is not None:
        logits_BxV = scaled(penalized_BxV)

    def cut(logits_BxV: jax.Array) -> jax.Array:
        likely_BxV = most_likely(logits_BxV, top_k_B[:, None])
        return jnp.where(top_p_B[:, None] < 1, nucleus(likely_BxV, top_p_B[:, None]), likely_BxV)

    def drawn_B(logits_BxV: jax.Array) -> jax.Array:
        # The vocabulary is sorted only if some row needs it; the other rows' results are the same either way.
        if cuts:
            some_cut = jnp.any(~greedy_B & ((top_p_B < 1) | (top_k_B > 0)))
            logits_BxV = jax.lax.cond(some_cut, cut, lambda x: x, logits_BxV)
        return draw(logits_BxV, uniforms(keys_B))

    best_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    sampled_B = jax.lax.cond(jnp.all(greedy_B), lambda x: best_B, drawn_B, logits_BxV)
    token_B = jnp.where(greedy_B, best_B, sampled_B)
    logit_B = jnp.take_along_axis(unpenalized_BxV, token_B[:, None], axis=-1)[:, 0]
    return token_B, logit_B - jax.nn.logsumexp(unpenalized_BxV, axis=-1)
