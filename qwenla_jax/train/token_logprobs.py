"""Log-probabilities of given tokens under given hidden states: chunked over tokens and vocabulary.

[B, T, V] never exists whole, forward or backward. The gradient is written out: differentiating through the chunks takes
as many products, but its program for a TPU moves and sends more (docs/MEASUREMENTS.md, "Reading TPU programs").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.parallel.sharding import row_shards

TOKEN_CHUNK = 4096  # on one device
VOCAB_CHUNK = 16384


def token_logprobs(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    ids_BxT: jax.Array,
    logit_bias_V: jax.Array | np.ndarray,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given tokens and the entropy of their distributions.

    The chunks run along T and V and never along B: rows are sharded over the devices, and a loop over them would make
    every device compute all of them.

    Args:
      hidden_BxTxD: hidden states that predict the tokens.
      head_DxV: output matrix.
      ids_BxT: int32 tokens.
      logit_bias_V: float32 added to the logits (`sampling.token.suppression_bias`).
      temperature: divides the logits; > 0. Static.

    Returns:
      float32 [B, T] natural log-probabilities and float32 [B, T] entropies in nats. No gradient flows through the
      entropy, nor to the bias.
    """
    B, T = ids_BxT.shape
    # Counted by device: every chunk gathers the matrix again, so the number of chunks must not grow with the mesh.
    rows = max(1, B // row_shards())
    chunks = -(-T // max(1, TOKEN_CHUNK // rows))
    length = -(-T // chunks)

    def split(x_BxTx: jax.Array) -> jax.Array:
        tail = x_BxTx.shape[2:]
        x = jnp.pad(x_BxTx, [(0, 0), (0, chunks * length - T)] + [(0, 0)] * len(tail))
        return jnp.moveaxis(x.reshape(B, chunks, length, *tail), 1, 0).reshape(chunks, B * length, *tail)

    def whole(x_CxN: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_CxN.reshape(chunks, B, length), 0, 1).reshape(B, -1)[:, :T]

    bias_V = jnp.asarray(logit_bias_V, jnp.float32)
    result: Any = _logprobs(split(hidden_BxTxD), head_DxV, split(ids_BxT), bias_V, temperature)
    logp_CxN, entropy_CxN = result
    return whole(logp_CxN), whole(entropy_CxN)


def _vocab_chunk(V: int) -> int:
    """Columns of the head worked on at once: a divisor of V."""
    size = max(size for size in range(1, min(V, VOCAB_CHUNK) + 1) if V % size == 0)
    return V if size * 16 < min(V, VOCAB_CHUNK) else size  # V is nearly prime: its divisors are too small


def _logits(
    hidden_NxD: jax.Array, head_DxV: jax.Array, bias_V: jax.Array, temperature: float, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Float32 logits of one chunk of columns, and the columns in the type that is computed in."""
    V = head_DxV.shape[1]
    size = _vocab_chunk(V)
    if size < V:
        head_DxV = jax.lax.dynamic_slice_in_dim(head_DxV, start, size, axis=1)
        bias_V = jax.lax.dynamic_slice_in_dim(bias_V, start, size)
    head = head_DxV.astype(hidden_NxD.dtype)
    return (jnp.dot(hidden_NxD, head, preferred_element_type=jnp.float32) + bias_V) / temperature, head


def _is_token(ids_N: jax.Array, start: jax.Array, columns: int) -> jax.Array:
    """bool [N, columns], where the tokens themselves are among the columns from `start` on."""
    return jnp.arange(columns)[None, :] == (ids_N - start)[:, None]


def _scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, chunks: Any) -> tuple[Any, Any]:
    """`lax.scan`, without the loop where there is one chunk."""
    if len(jax.tree.leaves(chunks)[0]) > 1:
        return jax.lax.scan(step, carry, chunks)
    carry, result = step(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], result)


def _starts(head_DxV: jax.Array) -> jax.Array:
    V = head_DxV.shape[1]
    return jnp.arange(0, V, _vocab_chunk(V), dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(
    hidden_CxNxD: jax.Array, head_DxV: jax.Array, ids_CxN: jax.Array, bias_V: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies of C chunks of N tokens, float32 [C, N] each."""
    return _forward(hidden_CxNxD, head_DxV, ids_CxN, bias_V, temperature)[0]


def _forward(
    hidden_CxNxD: jax.Array, head_DxV: jax.Array, ids_CxN: jax.Array, bias_V: jax.Array, temperature: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    def tokens(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        hidden_NxD, ids_N = chunk

        def columns(carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            top, total, weighted, chosen = carry
            logits, _ = _logits(hidden_NxD, head_DxV, bias_V, temperature, start)
            new_top = jnp.maximum(top, logits.max(-1))
            scale, e = jnp.exp(top - new_top), jnp.exp(logits - new_top[:, None])
            chosen = chosen + jnp.sum(jnp.where(_is_token(ids_N, start, logits.shape[1]), logits, 0.0), -1)
            return (new_top, total * scale + e.sum(-1), weighted * scale + jnp.sum(e * logits, -1), chosen), None

        zeros = jnp.zeros(ids_N.shape, jnp.float32)
        (top, total, weighted, chosen), _ = _scan(columns, (zeros - jnp.inf, zeros, zeros, zeros), _starts(head_DxV))
        lse = top + jnp.log(total)
        return None, (chosen - lse, lse - weighted / total, lse)

    _, (logp_CxN, entropy_CxN, lse_CxN) = _scan(tokens, None, (hidden_CxNxD, ids_CxN))
    return (logp_CxN, entropy_CxN), (hidden_CxNxD, head_DxV, ids_CxN, bias_V, lse_CxN)


def _backward(
    temperature: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    """The logits once again: their gradient is (1 where the token is - probability) * the token's / temperature."""
    hidden_CxNxD, head_DxV, ids_CxN, bias_V, lse_CxN = saved
    size = _vocab_chunk(head_DxV.shape[1])

    def tokens(d_head: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_NxD, ids_N, lse_N, d_logp_N = chunk

        def columns(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            d_hidden, d_head = carry
            logits, head = _logits(hidden_NxD, head_DxV, bias_V, temperature, start)
            d_logits = _is_token(ids_N, start, size) - jnp.exp(logits - lse_N[:, None])
            d_logits = d_logits * (d_logp_N / temperature)[:, None]
            d_logits = d_logits.astype(hidden_NxD.dtype)
            d_hidden = d_hidden + jnp.einsum("nv,dv->nd", d_logits, head, preferred_element_type=jnp.float32)
            own = jnp.einsum("nd,nv->dv", hidden_NxD, d_logits, preferred_element_type=jnp.float32)
            own = own + jax.lax.dynamic_slice_in_dim(d_head, start, size, axis=1)
            return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, own, start, axis=1)), None

        zeros = jnp.zeros(hidden_NxD.shape, jnp.float32)
        (d_hidden, d_head), _ = _scan(columns, (zeros, d_head), _starts(head_DxV))
        return d_head, d_hidden.astype(hidden_NxD.dtype)

    zeros = jnp.zeros(head_DxV.shape, jnp.float32)
    d_head, d_hidden_CxNxD = _scan(tokens, zeros, (hidden_CxNxD, ids_CxN, lse_CxN, cotangents[0]))
    return d_hidden_CxNxD, d_head.astype(head_DxV.dtype), None, None


_logprobs.defvjp(_forward, _backward)
