"""Keys and values of rows that grow at different speeds, in pages; each row is read no further than it is filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType, PartitionSpec

from qwenla_jax.model.attention import Partial, RowLayout, Segment
from qwenla_jax.model.kernels import mesh_axes
from qwenla_jax.model.layers import MASK_VALUE

# Bytes of keys that one round of `attend_pages` reads: about what a core's cache holds.
ROUND_BYTES = 2**21


@struct.dataclass
class Pages:
    """Keys and values of all layers for R rows of F pages, each of W slots; a row is filled from its first slot on.

    Attributes:
      k_LxAxKxWxH, v_LxAxKxWxH: the keys (already rotated) and values of A = R F pages; row r has those from r F on.
      length_R: int32, filled slots of each row; slots from there on are masked.
      bias_RxS: float32, added to every score of the slot's key (`layers.MASK_VALUE` masks it), or None for none.
    """

    k_LxAxKxWxH: jax.Array
    v_LxAxKxWxH: jax.Array
    length_R: jax.Array
    bias_RxS: jax.Array | None = None

    @property
    def row_pages(self) -> int:
        """F, the pages of a row."""
        return self.k_LxAxKxWxH.shape[1] // len(self.length_R)

    @property
    def row_slots(self) -> int:
        """F W, the slots of a row."""
        return self.row_pages * self.k_LxAxKxWxH.shape[3]


@struct.dataclass
class PageReads:
    """Which pages the queries of a call read; the same for all layers.

    Attributes:
      pages: the keys and values.
      row_E: int32, the row of each reader, by shards of rows; None: every row is a reader. B // E consecutive rows of
        queries belong to a reader.
      shards: equal shards of rows, each on its own devices; a reader's row is of its own shard. Static.
      count_E: pages that each reader has filled; None where a row has one page.
      page_N: numbers e * F + f of the readers' pages, the filled ones first; None where a row has one page, and where
        all readers read their pages f together.
      rounds: where they do, pages that the fullest reader has filled; else None.
    """

    pages: Pages
    row_E: jax.Array | None
    shards: int = struct.field(pytree_node=False, default=1)
    count_E: jax.Array | None = None
    page_N: jax.Array | None = None
    rounds: jax.Array | None = None

    def rows(self) -> jax.Array:
        """int32 [E], the row of each reader."""
        return jnp.arange(len(self.pages.length_R)) if self.row_E is None else self.row_E

    def take(self, x: jax.Array) -> jax.Array:
        """The readers' lines of an array whose first axis is rows; each device takes from its own."""
        if self.row_E is None:
            return x
        row_UxE = self.row_E.reshape(self.shards, -1) % (len(x) // self.shards)
        split = x.reshape(self.shards, -1, *x.shape[1:])
        return jax.vmap(lambda x, row: jnp.take(x, row, axis=0))(split, row_UxE).reshape(-1, *x.shape[1:])


def empty_pages(
    num_layers: int, rows: int, pages: int, slots: int, heads: int, head_dim: int, dtype: str, biased: bool = False
) -> Pages:
    """Pages of rows without a token, with a bias (of 0) where `biased`."""
    zeros = jnp.zeros((num_layers, rows * pages, heads, slots, head_dim), dtype)
    bias_RxS = jnp.zeros((rows, pages * slots), jnp.float32) if biased else None
    return Pages(zeros, jnp.zeros_like(zeros), jnp.zeros((rows,), jnp.int32), bias_RxS)


def reads(pages: Pages, row_E: jax.Array | None = None, shards: int = 1, together: bool = False) -> PageReads:
    """What readers of the given rows read; see `PageReads`."""
    read = PageReads(pages, row_E, shards)
    F, W = pages.row_pages, pages.k_LxAxKxWxH.shape[3]
    if F == 1:
        return read
    count_E = -(-read.take(pages.length_R) // W)
    if together:
        return dataclasses.replace(read, count_E=count_E, rounds=count_E.max())
    filled_N = (jnp.arange(F) < count_E[:, None]).reshape(-1)
    page_N = jnp.argsort(~filled_N, stable=True).astype(jnp.int32)
    return dataclasses.replace(read, page_N=page_N, count_E=count_E)


def append(
    read: PageReads, k_LxExTxKxH: jax.Array, v_LxExTxKxH: jax.Array, length_E: jax.Array, bias_ExT: jax.Array | None
) -> Pages:
    """The pages with `length_E` new tokens after the filled slots of the readers' rows; no row has two readers.

    Args:
      read: see there.
      k_LxExTxKxH, v_LxExTxKxH: T tokens a reader, of which the first `length_E` count.
      length_E: int32. Tokens beyond the last slot are dropped.
      bias_ExT: their bias, if the pages have one; None: 0.
    """
    pages, U = read.pages, read.shards
    R, F, K, W = len(pages.length_R), pages.row_pages, *pages.k_LxAxKxWxH.shape[2:4]
    T = k_LxExTxKxH.shape[2]
    row_E = read.rows()
    first_E = read.take(pages.length_R)
    offset_T = jnp.arange(T, dtype=jnp.int32)
    slot_ExT = jnp.where(offset_T < length_E[:, None], first_E[:, None] + offset_T, F * W)
    # By shards, so that rows are written without communication.
    by_shard = lambda x: x.reshape(U, -1, *x.shape[1:])  # noqa: E731
    row_UxE, slot_UxExT = by_shard(row_E) % (R // U), by_shard(slot_ExT)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        page_UxExT = jnp.where(slot_UxExT < F * W, row_UxE[..., None] * F + slot_UxExT // W, R // U * F)
        mesh = jax.sharding.get_abstract_mesh()
        if U == 1 and (mesh.empty or mesh.size == 1):  # lines would lie across the devices that have the heads
            return _write_lines(old, new, page_UxExT[0], slot_ExT % W)
        if read.rounds is not None and (on_devices := _on_devices(U, K)) is not None:
            return on_devices(old, new, page_UxExT, slot_UxExT % W)
        new_UxExTxLxKxH = by_shard(jnp.moveaxis(new.astype(old.dtype), 0, 2))
        put = lambda old, page, slot, new: old.at[:, page, :, slot].set(new, mode="drop")  # noqa: E731
        split = old.reshape(old.shape[0], U, -1, *old.shape[2:])
        return jax.vmap(put, (1, 0, 0, 0), 1)(split, page_UxExT, slot_UxExT % W, new_UxExTxLxKxH).reshape(old.shape)

    bias_RxS = pages.bias_RxS
    if bias_RxS is not None and bias_ExT is not None:  # a slot that is free holds 0
        put = lambda old, row, slot, new: old.at[row[:, None], slot].set(new, mode="drop")  # noqa: E731
        bias_RxS = jax.vmap(put)(by_shard(bias_RxS), row_UxE, slot_UxExT, by_shard(bias_ExT)).reshape(bias_RxS.shape)
    length_R = jax.vmap(lambda old, row, new: old.at[row].set(new))(
        by_shard(pages.length_R), row_UxE, by_shard(jnp.minimum(first_E + length_E, F * W))
    )
    return Pages(
        write(pages.k_LxAxKxWxH, k_LxExTxKxH), write(pages.v_LxAxKxWxH, v_LxExTxKxH), length_R.reshape(R), bias_RxS
    )


def _write_lines(old_LxAxKxWxH: jax.Array, new: jax.Array, page_ExT: jax.Array, slot_ExT: jax.Array) -> jax.Array:
    """Keys or values written line by line into the array seen as a matrix; a page beyond the last is dropped.

    A scatter whose indexes are of other axes than the first would copy the whole array, twice, at every token.
    """
    L, A, K, W, H = old_LxAxKxWxH.shape
    at_LxKxExT = (jnp.arange(L)[:, None, None, None] * A + page_ExT) * K + jnp.arange(K)[:, None, None]
    line_LxKxExT = jnp.where(page_ExT < A, at_LxKxExT * W + slot_ExT, L * A * K * W)
    lines = jnp.moveaxis(new.astype(old_LxAxKxWxH.dtype), 3, 1).reshape(-1, H)
    flat = old_LxAxKxWxH.reshape(-1, H)
    return flat.at[line_LxKxExT.reshape(-1)].set(lines, mode="drop").reshape(old_LxAxKxWxH.shape)


def _on_devices(shards: int, heads: int) -> Callable[..., jax.Array] | None:
    """`_write_lines` on each device's own rows and heads; None where these do not divide over the devices.

    A TPU's scatter over rows and slots would lay the array out as it likes, and reading it in pages as that likes: the
    array would be copied twice for every token.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (by_row, rows), (by_head, parts) = mesh_axes("batch", "act_heads")
    if rows != shards or heads % parts or AxisType.Manual in mesh.axis_types:
        return None
    keys = PartitionSpec(None, by_row, by_head)
    return jax.shard_map(
        lambda old, new, page, slot: _write_lines(old, new, page[0], slot[0]),
        in_specs=(keys, PartitionSpec(None, by_row, None, by_head), PartitionSpec(by_row), PartitionSpec(by_row)),
        out_specs=keys,
        check_vma=False,
    )


def whole_rows(read: PageReads, layer: jax.Array) -> Segment:
    """A layer's keys and values of rows of one page, as a segment with a line for each reader."""
    pages, take = read.pages, read.take
    one = lambda x: take(jnp.swapaxes(jax.lax.dynamic_index_in_dim(x, layer, 0, False), 1, 2))  # noqa: E731
    bias_QxS = None if pages.bias_RxS is None else take(pages.bias_RxS)
    return Segment(one(pages.k_LxAxKxWxH), one(pages.v_LxAxKxWxH), bias=bias_QxS, length_Q=take(pages.length_R))


def attend_pages(
    q_BxTxNxH: jax.Array, read: PageReads, layer: jax.Array, keep_scores: bool = False
) -> tuple[Partial, jax.Array | None]:
    """Attention to the filled pages of a layer, some pages a round; as many rounds as what is filled takes.

    What a row gets does not depend on how far other rows are filled.

    Returns:
      the attention before its softmax is made whole, and with `keep_scores` the scores, float32 [N, K, M, W], see
      `page_weights`.
    """
    pages, row_E, page_N = read.pages, read.rows(), read.page_N
    assert read.count_E is not None  # rows have several pages
    if page_N is None:
        return _attend_together(q_BxTxNxH, read, layer, keep_scores)
    F, (_, _, K, W, H) = pages.row_pages, pages.k_LxAxKxWxH.shape
    lay = _layout(q_BxTxNxH, read)
    q_ExKxMxH = lay.group(q_BxTxNxH)
    N, M, scale = len(page_N), q_ExKxMxH.shape[2], H**-0.5
    C = min(N, max(1, ROUND_BYTES // (4 * K * H * (W + M))))
    page_N = jnp.pad(page_N, (0, -N % C), constant_values=N - 1)

    def some(first: jax.Array) -> tuple[jax.Array, ...]:
        page_C = jax.lax.dynamic_slice_in_dim(page_N, first, C)
        reader_C, f_C = page_C // F, page_C % F
        row_C = row_E[reader_C]
        k_CxKxWxH, v_CxKxWxH = (x[layer, row_C * F + f_C] for x in (pages.k_LxAxKxWxH, pages.v_LxAxKxWxH))
        s = jnp.einsum("ckmh,ckwh->ckmw", q_ExKxMxH[reader_C], k_CxKxWxH, preferred_element_type=jnp.float32) * scale
        slot_CxW = f_C[:, None] * W + jnp.arange(W)
        if pages.bias_RxS is not None:
            s = s + pages.bias_RxS[row_C[:, None], slot_CxW][:, None, None]
        s = jnp.where((slot_CxW < pages.length_R[row_C][:, None])[:, None, None], s, MASK_VALUE)
        top = s.max(-1)
        e = jnp.exp(s - top[..., None])
        out = jnp.einsum("ckmw,ckwh->ckmh", e.astype(v_CxKxWxH.dtype), v_CxKxWxH, preferred_element_type=jnp.float32)
        return (top, e.sum(-1), out) + ((s,) if keep_scores else ())

    if C == N:
        got = some(jnp.int32(0))
    else:
        shapes = [(K, M), (K, M), (K, M, H)] + [(K, M, W)] * keep_scores
        start = tuple(jnp.zeros((len(page_N), *shape), jnp.float32) for shape in shapes)

        def turn(carry: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            first, whole = carry
            put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, first, 0)  # noqa: E731
            return first + C, tuple(map(put, whole, some(first)))

        filled = read.count_E.sum()
        _, got = jax.lax.while_loop(lambda carry: carry[0] < filled, turn, (jnp.int32(0), start))
    top_N, total_N, out_N, *scores = got
    at_ExF, filled_ExF = _places(read, F)
    wide = lambda x, like: x.reshape(*x.shape, *[1] * (like.ndim - 1))  # noqa: E731
    top_ExFxKxM = jnp.where(wide(filled_ExF, top_N), top_N[at_ExF], MASK_VALUE)
    top_ExKxM = top_ExFxKxM.max(1)
    weight_ExFxKxM = jnp.where(wide(filled_ExF, top_N), jnp.exp(top_ExFxKxM - top_ExKxM[:, None]), 0.0)
    total_ExKxM = jnp.sum(weight_ExFxKxM * total_N[at_ExF], axis=1)
    out_ExKxMxH = jnp.sum(weight_ExFxKxM[..., None] * jnp.where(wide(filled_ExF, out_N), out_N[at_ExF], 0.0), axis=1)
    partial = Partial(lay.ungroup(top_ExKxM), lay.ungroup(total_ExKxM), lay.ungroup(out_ExKxMxH))
    return partial, scores[0] if keep_scores else None


def _attend_together(
    q_BxTxNxH: jax.Array, read: PageReads, layer: jax.Array, keep_scores: bool
) -> tuple[Partial, jax.Array | None]:
    """`attend_pages` where every round is of page f of all readers, up to the last that any of them has filled.

    A page that a reader has not filled adds exactly nothing to what it has.
    """
    pages, F = read.pages, read.pages.row_pages
    (L, A, K, W, H), lay = pages.k_LxAxKxWxH.shape, _layout(q_BxTxNxH, read)
    rounds = read.rounds
    assert rounds is not None
    q_ExKxMxH = lay.group(q_BxTxNxH)
    E, M, scale = len(q_ExKxMxH), q_ExKxMxH.shape[2], H**-0.5
    rows = A // F
    length_E = read.take(pages.length_R)

    def page(x_LxAxKxWxH: jax.Array, f: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice(
            x_LxAxKxWxH.reshape(L, rows, F, K, W, H), (layer, 0, f, 0, 0, 0), (1, rows, 1, K, W, H)
        )
        return read.take(own.reshape(rows, K, W, H))

    def turn(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        f, top, total, out, *scores = carry
        s = jnp.einsum("ekmh,ekwh->ekmw", q_ExKxMxH, page(pages.k_LxAxKxWxH, f), preferred_element_type=jnp.float32)
        s = s * scale
        if pages.bias_RxS is not None:
            bias_RxW = jax.lax.dynamic_slice_in_dim(pages.bias_RxS, f * W, W, axis=1)
            s = s + read.take(bias_RxW)[:, None, None]
        s = jnp.where((f * W + jnp.arange(W) < length_E[:, None])[:, None, None], s, MASK_VALUE)
        new = jnp.maximum(top, s.max(-1))
        # Where nothing is filled yet, the scores are not above the mask's, and must not count as even attention.
        e = jnp.where(s > MASK_VALUE, jnp.exp(s - new[..., None]), 0.0)
        v_ExKxWxH = page(pages.v_LxAxKxWxH, f)
        part = jnp.einsum("ekmw,ekwh->ekmh", e.astype(v_ExKxWxH.dtype), v_ExKxWxH, preferred_element_type=jnp.float32)
        keep = jnp.exp(top - new)
        scores = [jax.lax.dynamic_update_slice_in_dim(x, s[:, None], f, axis=1) for x in scores]
        return f + 1, new, total * keep + e.sum(-1), out * keep[..., None] + part, *scores

    zeros = jnp.zeros((E, K, M, H), jnp.float32)
    scores = [jnp.full((E, F, K, M, W), MASK_VALUE, jnp.float32)] * keep_scores
    start = (jnp.int32(0), jnp.full((E, K, M), MASK_VALUE, jnp.float32), zeros[..., 0], zeros, *scores)
    # The name tells the loops apart in a compiled program's text: of a row's own pages, or of those that rows share.
    with jax.named_scope("own_pages" if lay.G == 1 else "shared_pages"):
        _, top, total, out, *scores = jax.lax.while_loop(lambda carry: carry[0] < rounds, turn, start)
    partial = Partial(lay.ungroup(top), lay.ungroup(total), lay.ungroup(out))
    return partial, scores[0].reshape(E * F, K, M, W) if keep_scores else None


def page_weights(q_BxTxNxH: jax.Array, read: PageReads, scores: jax.Array, lse_BxTxN: jax.Array) -> jax.Array:
    """The attention that each slot received: float32 [B, T, F * W], the mean of the probabilities over the heads."""
    lay, F = _layout(q_BxTxNxH, read), read.pages.row_pages
    at_ExF, filled_ExF = _places(read, F)
    own = scores[at_ExF] if read.page_N is not None else scores.reshape(-1, F, *scores.shape[1:])  # in order already
    p = jnp.exp(own - lay.group(lse_BxTxN)[:, None, :, :, None])
    p_ExFxKxMxW = jnp.where(filled_ExF[:, :, None, None, None], p, 0.0)
    p_ExKxMxFxW = jnp.moveaxis(p_ExFxKxMxW, 1, 3)
    return lay.ungroup(p_ExKxMxFxW.reshape(*p_ExKxMxFxW.shape[:3], -1)).mean(2)


def _layout(q_BxTxNxH: jax.Array, read: PageReads) -> RowLayout:
    B, T, N, _ = q_BxTxNxH.shape
    E, K = len(read.rows()), read.pages.k_LxAxKxWxH.shape[2]
    return RowLayout(E, B // E, T, K, N // K)


def _places(read: PageReads, pages: int) -> tuple[jax.Array, jax.Array]:
    """Where each reader's pages lie among `page_N`, and which of them are filled: int32 and bool [E, F]."""
    assert read.count_E is not None
    first_E = jnp.cumsum(read.count_E) - read.count_E
    f_F, last = jnp.arange(pages), len(read.count_E) * pages - 1
    return jnp.minimum(first_E[:, None] + f_F, last), f_F < read.count_E[:, None]
