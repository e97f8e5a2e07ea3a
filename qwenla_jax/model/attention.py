"""Dense attention over key segments, in plain XLA, with its gradient written out.

A query attends to several runs of keys at once: the prompt that a group of rows shares, the row's own cache, and the
tokens of the present call. The runs are never concatenated; only their row maxima and sums meet, in one softmax.

The gradient is the one of flash attention: it keeps the output and the log-sum-exp and computes the probabilities
again. Differentiating through the softmax would keep several arrays of [B, N, T, S], and on a CPU moving those costs
more than the products do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwenla_jax.model.layers import ATTENTION_OUTPUT, HIDDEN


class Segment(NamedTuple):
    """A run of keys.

    Attributes:
      k, v: [Q, S, K, H]; B must be a multiple of Q, and row b reads segment row b // (B // Q).
      visible: bool, broadcastable to [Q, B // Q, T, S]: which query may see which key.
      bias: float32 [Q, S], added to every query's score of the key; None for none. It gets no gradient.
    """

    k: jax.Array
    v: jax.Array
    visible: jax.Array
    bias: jax.Array | None = None


@jax.custom_vjp
def segment_attention(q_BxTxNxH: jax.Array, segments: tuple[Segment, ...]) -> jax.Array:
    """Scaled dot-product attention with grouped queries; softmax in float32 over all segments together.

    Args:
      q_BxTxNxH: queries. N is a multiple of the segments' K.
      segments: at least one, all with the same K.

    Returns:
      [B, T, N, H] in the queries' type. A query that sees no key gets the mean of the values, not nan.
    """
    return _attend(q_BxTxNxH, segments)[0]


def watched_attention(
    q_BxTxNxH: jax.Array, segments: tuple[Segment, ...], watch: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`segment_attention`, and what it paid to the keys of some segments. For passes without a gradient.

    The probabilities come from the log-sum-exp: a kernel that returns that, and no probabilities, gives them as well.

    Args:
      q_BxTxNxH, segments: as there.
      watch: numbers of segments.

    Returns:
      [B, T, N, H], and for each watched segment float32 [B, T, S]: probabilities, their mean over the heads.
    """
    out, lse = _attend(q_BxTxNxH, segments)
    paid = []
    for segment in (segments[number] for number in watch):
        lay = _layout(q_BxTxNxH, segment)
        p = jnp.exp(_scores(q_BxTxNxH, segment) - lay.group(lse)[..., None])
        paid.append(lay.ungroup(p).mean(2))
    return out, tuple(paid)


class _Layout(NamedTuple):
    """How the rows of a batch lie when they are grouped by the keys they share: Q K (G T J), with B = Q G, N = K J."""

    Q: int
    G: int
    T: int
    K: int
    J: int

    def group(self, x_BxTxNx: jax.Array) -> jax.Array:
        """[B, T, N, ...] to [Q, K, G * T * J, ...]: rows that share keys become rows of one product."""
        Q, G, T, K, J = self
        tail = x_BxTxNx.shape[3:]
        x = x_BxTxNx.reshape(Q, G, T, K, J, *tail)
        return jnp.moveaxis(x, 3, 1).reshape(Q, K, G * T * J, *tail)

    def ungroup(self, x: jax.Array) -> jax.Array:
        """The inverse of `group`."""
        Q, G, T, K, J = self
        tail = x.shape[3:]
        return jnp.moveaxis(x.reshape(Q, K, G, T, J, *tail), 1, 3).reshape(Q * G, T, K * J, *tail)


def _layout(q_BxTxNxH: jax.Array, segment: Segment) -> _Layout:
    B, T, N, _ = q_BxTxNxH.shape
    Q, _, K, _ = segment.k.shape
    return _Layout(Q, B // Q, T, K, N // K)


def _scores(q_BxTxNxH: jax.Array, segment: Segment) -> jax.Array:
    """Masked, scaled scores, float32 [Q, K, G * T * J, S]."""
    lay = _layout(q_BxTxNxH, segment)
    S = segment.k.shape[1]
    scale = q_BxTxNxH.shape[-1] ** -0.5
    s = jnp.einsum("qkmh,qskh->qkms", lay.group(q_BxTxNxH), segment.k, preferred_element_type=jnp.float32) * scale
    if segment.bias is not None:
        s = s + segment.bias[:, None, None, :]
    visible = jnp.broadcast_to(segment.visible, (lay.Q, lay.G, lay.T, S))[:, None, :, :, None]
    return jnp.where(visible, s.reshape(lay.Q, lay.K, lay.G, lay.T, lay.J, S), HIDDEN).reshape(s.shape)


def _attend(q: jax.Array, segments: tuple[Segment, ...]) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and float32 log-sum-exp [B, T, N]."""
    layouts = [_layout(q, segment) for segment in segments]
    scores = [_scores(q, segment) for segment in segments]
    tops = [lay.ungroup(s.max(-1)) for lay, s in zip(layouts, scores, strict=True)]
    top = jnp.stack(tops).max(0) if len(tops) > 1 else tops[0]
    total, out = 0.0, 0.0
    for lay, s, segment in zip(layouts, scores, segments, strict=True):
        e = jnp.exp(s - lay.group(top)[..., None])
        total = total + lay.ungroup(e.sum(-1))
        part = jnp.einsum(
            "qkms,qskh->qkmh", e.astype(segment.v.dtype), segment.v, preferred_element_type=jnp.float32
        )
        out = out + lay.ungroup(part)
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)


def _forward(q: jax.Array, segments: tuple[Segment, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in _attend(q, segments))
    return out, (q, segments, out, lse)


def _backward(saved: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array, tuple[Segment, ...]]:
    q, segments, out, lse = saved
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_q, d_segments = 0.0, []
    for segment in segments:
        lay = _layout(q, segment)
        p = jnp.exp(_scores(q, segment) - lay.group(lse)[..., None])
        d_o = lay.group(d_out)
        d_v = jnp.einsum("qkms,qkmh->qskh", p.astype(dtype), d_o, preferred_element_type=jnp.float32)
        d_p = jnp.einsum("qkmh,qskh->qkms", d_o, segment.v, preferred_element_type=jnp.float32)
        d_s = (p * (d_p - lay.group(delta)[..., None]) * scale).astype(dtype)
        d_k = jnp.einsum("qkms,qkmh->qskh", d_s, lay.group(q), preferred_element_type=jnp.float32)
        part = jnp.einsum("qkms,qskh->qkmh", d_s, segment.k, preferred_element_type=jnp.float32)
        d_q = d_q + lay.ungroup(part)
        d_segments.append(Segment(d_k.astype(segment.k.dtype), d_v.astype(segment.v.dtype), None, None))
    return d_q.astype(dtype), tuple(d_segments)


segment_attention.defvjp(_forward, _backward)
