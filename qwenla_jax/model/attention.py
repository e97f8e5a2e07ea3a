"""Dense attention over key segments, in plain XLA, with its gradient written out.

A query attends to several segments of keys at once: the prompt that a group of rows shares, the row's own cache, and
the tokens of the present call. The segments are never concatenated; one softmax combines their row maxima and sums.

The gradient is the one of flash attention: it keeps the output and the log-sum-exp and computes the probabilities
again. Differentiating through the softmax would store several arrays of [B, N, T, S], and on a CPU moving those costs
more than the products do. Where even one such array is large, the queries are worked through in blocks, forward and
backward, so that it never exists whole. `model.kernels` decides which calls a kernel takes instead.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from qwenla_jax.model.layers import ATTENTION_OUTPUT, MASK_VALUE

# Bytes of float32 scores of one row above which its queries are worked through in blocks, and the fewest queries of a
# block: fewer would leave a matrix unit idle. Counted by the row, since rows are sharded over devices. The embedded
# default stays below it everywhere.
SCORE_BYTES = 2**24
LEAST_QUERIES = 128
# Parts that queries with causal keys are cut into, so that a part computes no score of keys after its last query:
# with four, 5/8 of the scores are left, and each part is more to compile.
CAUSAL_PARTS = 4


@struct.dataclass
class Segment:
    """A segment of keys. A query sees the keys that all the masks given here allow.

    Attributes:
      k, v: [Q, S, K, H]; B must be a multiple of Q, and row b reads segment row b // (B // Q).
      visible: bool, broadcastable to [Q, B // Q, T, S]: which query may see which key; None: all.
      bias: float32 [Q, S], added to every query's score of the key; None for none. It gets no gradient. A kernel takes
        0 and `layers.MASK_VALUE` only.
      length_Q: int32, keys from there on are masked; None: all count.
      causal: the keys are those of the queries' own tokens, and query t sees the first `offset` + t + 1 of them; S is
        `offset` + T. Static.
      offset: with `causal`, tokens before the first query. Static.
    """

    k: jax.Array
    v: jax.Array
    visible: jax.Array | None = None
    bias: jax.Array | None = None
    length_Q: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)
    offset: int = struct.field(pytree_node=False, default=0)


def segment_attention(q_BxTxNxH: jax.Array, segments: tuple[Segment, ...]) -> jax.Array:
    """Scaled dot-product attention with grouped queries; softmax in float32 over all segments together.

    Args:
      q_BxTxNxH: queries. N is a multiple of the segments' K.
      segments: at least one, all with the same K.

    Returns:
      [B, T, N, H] in the queries' type. A query that sees no key gets a mean of values, not nan.
    """
    *others, last = segments
    T = q_BxTxNxH.shape[1]
    size = max(LEAST_QUERIES, -(-T // CAUSAL_PARTS))
    if not last.causal or last.visible is not None or T <= size:
        return _segment_attention(q_BxTxNxH, segments)

    def part(first: int) -> jax.Array:
        end = min(first + size, T)
        S = last.offset + end
        bias = None if last.bias is None else last.bias[:, :S]
        seen = dataclasses.replace(last, k=last.k[:, :S], v=last.v[:, :S], bias=bias, offset=last.offset + first)
        return _segment_attention(q_BxTxNxH[:, first:end], (*(_queries(s, T, first, end) for s in others), seen))

    return jnp.concatenate([part(first) for first in range(0, T, size)], axis=1)


def _queries(segment: Segment, T: int, first: int, end: int) -> Segment:
    """The segment as some of T queries see it."""
    if segment.visible is None or segment.visible.shape[2] != T:
        return segment
    return dataclasses.replace(segment, visible=segment.visible[:, :, first:end])


@jax.custom_vjp
def _segment_attention(q_BxTxNxH: jax.Array, segments: tuple[Segment, ...]) -> jax.Array:
    return _in_blocks(_attend_block, q_BxTxNxH, segments)[0]


def attention_with_weights(
    q_BxTxNxH: jax.Array, segments: tuple[Segment, ...], return_attention: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`segment_attention`, and the attention that the keys of some segments received. For passes without a gradient.

    Returns:
      [B, T, N, H], and for each of the segments numbered in `return_attention` float32 [B, T, S]: the mean of the
      probabilities over the heads.
    """

    def block(q: jax.Array, segments: tuple[Segment, ...], first: Any) -> tuple[jax.Array, ...]:
        out, lse = _attend_block(q, segments, first)
        return out, *(segment_weights(q, segments[number], lse, first) for number in return_attention)

    out, *received = _in_blocks(block, q_BxTxNxH, segments)
    return out, tuple(received)


class Partial(NamedTuple):
    """Attention of queries to some of their keys, before the softmax is made whole; all float32.

    Attributes:
      top_BxTxN: the largest score.
      total_BxTxN: the sum of exp(score - top).
      out_BxTxNxH: the values, weighted by exp(score - top), summed.
    """

    top_BxTxN: jax.Array
    total_BxTxN: jax.Array
    out_BxTxNxH: jax.Array


def joined(parts: Sequence[Partial]) -> tuple[jax.Array, jax.Array]:
    """One softmax over the keys of all parts: float32 output [B, T, N, H] and log-sum-exp [B, T, N]."""
    top = functools.reduce(jnp.maximum, [part.top_BxTxN for part in parts])
    weights = [jnp.exp(part.top_BxTxN - top) for part in parts]
    total = sum(w * part.total_BxTxN for w, part in zip(weights, parts, strict=True))
    out = sum(w[..., None] * part.out_BxTxNxH for w, part in zip(weights, parts, strict=True))
    assert isinstance(out, jax.Array) and isinstance(total, jax.Array)  # there is a part
    return out / total[..., None], top + jnp.log(total)


def attend_segment(q_BxTxNxH: jax.Array, segment: Segment) -> Partial:
    """Attention to the keys of one segment alone."""
    lay, s = _layout(q_BxTxNxH, segment), _scores(q_BxTxNxH, segment, 0)
    top = s.max(-1)
    e = jnp.exp(s - top[..., None])
    out = jnp.einsum("qkms,qskh->qkmh", e.astype(segment.v.dtype), segment.v, preferred_element_type=jnp.float32)
    return Partial(lay.ungroup(top), lay.ungroup(e.sum(-1)), lay.ungroup(out))


def segment_weights(q_BxTxNxH: jax.Array, segment: Segment, lse_BxTxN: jax.Array, first: Any = 0) -> jax.Array:
    """The attention that a segment's keys received: float32 [B, T, S], the mean of the probabilities over the heads."""
    lay = _layout(q_BxTxNxH, segment)
    p = jnp.exp(_scores(q_BxTxNxH, segment, first) - lay.group(lse_BxTxN)[..., None])
    return lay.ungroup(p).mean(2)


class RowLayout(NamedTuple):
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


def _layout(q_BxTxNxH: jax.Array, segment: Segment) -> RowLayout:
    B, T, N, _ = q_BxTxNxH.shape
    Q, _, K, _ = segment.k.shape
    return RowLayout(Q, B // Q, T, K, N // K)


def _seen(segment: Segment, T: int, first: Any) -> jax.Array | None:
    """bool, broadcastable to [Q, G, T, S], for T queries from the call's query `first` on; None: everything."""
    slot_S = jnp.arange(segment.k.shape[1])
    masks = [] if segment.visible is None else [segment.visible]
    if segment.length_Q is not None:
        masks.append((slot_S < segment.length_Q[:, None])[:, None, None, :])
    if segment.causal:
        masks.append((slot_S <= segment.offset + first + jnp.arange(T)[:, None])[None, None])
    return functools.reduce(operator.and_, masks) if masks else None


def _scores(q_BxTxNxH: jax.Array, segment: Segment, first: Any) -> jax.Array:
    """Masked, scaled scores, float32 [Q, K, G * T * J, S]; the first query is number `first` of the call."""
    lay = _layout(q_BxTxNxH, segment)
    S = segment.k.shape[1]
    scale = q_BxTxNxH.shape[-1] ** -0.5
    s = jnp.einsum("qkmh,qskh->qkms", lay.group(q_BxTxNxH), segment.k, preferred_element_type=jnp.float32) * scale
    if segment.bias is not None:
        s = s + segment.bias[:, None, None, :]
    seen = _seen(segment, lay.T, first)
    if seen is None:
        return s
    seen = jnp.broadcast_to(seen, (lay.Q, lay.G, lay.T, S))[:, None, :, :, None]
    return jnp.where(seen, s.reshape(lay.Q, lay.K, lay.G, lay.T, lay.J, S), MASK_VALUE).reshape(s.shape)


def _attend_block(q: jax.Array, segments: tuple[Segment, ...], first: Any) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and float32 log-sum-exp [B, T, N]."""
    layouts = [_layout(q, segment) for segment in segments]
    scores = [_scores(q, segment, first) for segment in segments]
    tops = [lay.ungroup(s.max(-1)) for lay, s in zip(layouts, scores, strict=True)]
    top = jnp.stack(tops).max(0) if len(tops) > 1 else tops[0]
    total, out = 0.0, 0.0
    for lay, s, segment in zip(layouts, scores, segments, strict=True):
        e = jnp.exp(s - lay.group(top)[..., None])
        total = total + lay.ungroup(e.sum(-1))
        part = jnp.einsum("qkms,qskh->qkmh", e.astype(segment.v.dtype), segment.v, preferred_element_type=jnp.float32)
        out = out + lay.ungroup(part)
    assert isinstance(out, jax.Array) and isinstance(total, jax.Array)  # there is a segment
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)


def _in_blocks(work: Callable[..., Any], q: jax.Array, segments: tuple[Segment, ...]) -> tuple[jax.Array, ...]:
    """`work(queries, segments, first query)` of all queries, in blocks where they are many."""
    size, T = _block_size(q, segments), q.shape[1]
    if size >= T:
        return work(q, segments, 0)
    blocks = jax.lax.map(lambda part: work(*_take(segments, part)), _query_blocks(q, segments, size))
    return tuple(_join(x, T) for x in blocks)


def _forward(q: jax.Array, segments: tuple[Segment, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in _in_blocks(_attend_block, q, segments))
    return out, (q, segments, out, lse)


Sums = tuple[tuple[jax.Array, jax.Array], ...]


def _backward_block(
    q: jax.Array, segments: tuple[Segment, ...], first: Any, lse: jax.Array, delta: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, Sums]:
    """Gradient of the queries in their type, and of each segment's keys and values in float32."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    d_q, sums = 0.0, []
    for segment in segments:
        lay = _layout(q, segment)
        p = jnp.exp(_scores(q, segment, first) - lay.group(lse)[..., None])
        d_o = lay.group(d_out)
        d_v = jnp.einsum("qkms,qkmh->qskh", p.astype(dtype), d_o, preferred_element_type=jnp.float32)
        d_p = jnp.einsum("qkmh,qskh->qkms", d_o, segment.v, preferred_element_type=jnp.float32)
        d_s = (p * (d_p - lay.group(delta)[..., None]) * scale).astype(dtype)
        d_k = jnp.einsum("qkms,qkmh->qskh", d_s, lay.group(q), preferred_element_type=jnp.float32)
        part = jnp.einsum("qkms,qskh->qkmh", d_s, segment.k, preferred_element_type=jnp.float32)
        d_q = d_q + lay.ungroup(part)
        sums.append((d_k, d_v))
    assert isinstance(d_q, jax.Array)  # there is a segment
    return d_q.astype(dtype), tuple(sums)


def _backward(saved: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array, tuple[Segment, ...]]:
    q, segments, out, lse = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    size, T = _block_size(q, segments), q.shape[1]
    if size >= T:
        d_q, sums = _backward_block(q, segments, 0, lse, delta, d_out)
    else:
        # In padding the log-sum-exp is so large that every probability is 0.
        others = (_split(lse, 1, size, -MASK_VALUE), _split(delta, 1, size), _split(d_out, 1, size))

        def step(sums: Sums, part: Any) -> tuple[Sums, jax.Array]:
            d_q, more = _backward_block(*_take(segments, part[0]), *part[1])
            return jax.tree.map(jnp.add, sums, more), d_q

        zeros = tuple((jnp.zeros(s.k.shape, jnp.float32), jnp.zeros(s.v.shape, jnp.float32)) for s in segments)
        sums, d_q = jax.lax.scan(step, zeros, (_query_blocks(q, segments, size), others))
        d_q = _join(d_q, T)
    pairs = zip(segments, sums, strict=True)
    cast = lambda s, k, v: Segment(k.astype(s.k.dtype), v.astype(s.v.dtype), causal=s.causal, offset=s.offset)  # noqa: E731
    return d_q, tuple(cast(s, *sums) for s, sums in pairs)


_segment_attention.defvjp(_forward, _backward)


def query_block(queries: int, heads: int, keys: int) -> int:
    """Queries worked on at once: all of them where their float32 scores are small, else a power of two."""
    query_bytes = 4 * heads * keys
    if queries * query_bytes <= SCORE_BYTES:
        return queries
    return max(LEAST_QUERIES, 2 ** (SCORE_BYTES // query_bytes).bit_length() // 2)


def _block_size(q_BxTxNxH: jax.Array, segments: Sequence[Segment]) -> int:
    return query_block(q_BxTxNxH.shape[1], q_BxTxNxH.shape[2], sum(segment.k.shape[1] for segment in segments))


def _split(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    """Blocks of `size` along an axis, which is padded, on a new leading axis."""
    count = -(-x.shape[axis] // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: jax.Array, T: int) -> jax.Array:
    """The inverse of `_split` along axis 1, T long."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _query_blocks(q: jax.Array, segments: tuple[Segment, ...], size: int) -> Any:
    """Of each block: its queries, the number of the first, and of each segment the part of `visible` that differs."""
    T = q.shape[1]
    queries = _split(q, 1, size)
    each = lambda mask: None if mask is None or mask.shape[2] != T else _split(mask, 2, size)  # noqa: E731
    visible = tuple(each(s.visible) for s in segments)
    return queries, jnp.arange(len(queries), dtype=jnp.int32) * size, visible


def _take(segments: tuple[Segment, ...], block: Any) -> tuple[jax.Array, tuple[Segment, ...], jax.Array]:
    """Queries, segments and first query of one of `_query_blocks`."""
    queries, first, visible = block
    pairs = zip(segments, visible, strict=True)
    return queries, tuple(s if part is None else dataclasses.replace(s, visible=part) for s, part in pairs), first
