"""Keys and values in pages: written as numpy writes them, read as attention over whole rows reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenla_jax.model import pages
from qwenla_jax.model.attention import Segment, attend_segment, attention_with_weights, joined
from qwenla_jax.model.pages import Pages, append, attend_pages, empty_pages, page_weights, reads, whole_rows

L, R, F, K, W, H, J, T = 2, 6, 5, 2, 8, 16, 3, 3


def of_slots(x_LxAxKxWxH):
    """[L, R, S, K, H], slot by slot."""
    return np.moveaxis(np.asarray(x_LxAxKxWxH), 2, 3).reshape(len(x_LxAxKxWxH), R, -1, K, H)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_append_writes_behind_each_row_and_drops_what_finds_no_slot(biased, shards):
    rng = np.random.default_rng(0)
    F, W = 3, 4
    filled = empty_pages(L, R, F, W, K, H, "float32", biased)
    want = {name: np.zeros((L, R, F * W, K, H), np.float32) for name in "kv"}
    bias, length = np.zeros((R, F * W), np.float32), np.zeros(R, int)
    # Some readers read all rows, some one or two of each shard. The last piece brings no bias: a free slot holds 0.
    pieces = [
        (None, [2, 0, 4, 1, 3, 5], biased),
        ([1, 0, 5, 3], [3, 5, 1, 5], biased),
        (None, [5, 2, 3, 5, 0, 4], biased),
        ([2, 4], [5, 5], biased),
        (None, [1, 1, 1, 1, 1, 1], False),
    ]
    for rows, lengths, own in pieces:
        new_k, new_v = (rng.normal(size=(L, len(lengths), 5, K, H)).astype(np.float32) for _ in range(2))
        new_bias = rng.normal(size=(len(lengths), 5)).astype(np.float32) if own else None

        @jax.jit
        def write(filled, row_E, *new):
            return append(reads(filled, row_E, shards), *new)

        row_E = None if rows is None else jnp.asarray(rows)
        filled = write(filled, row_E, new_k, new_v, jnp.asarray(lengths), new_bias)
        for e, n in enumerate(lengths):
            b = e if rows is None else rows[e]
            for t in range(min(n, F * W - length[b])):
                want["k"][:, b, length[b]], want["v"][:, b, length[b]] = new_k[:, e, t], new_v[:, e, t]
                bias[b, length[b]] = new_bias[e, t] if own else 0
                length[b] += 1
    assert filled.length_R.tolist() == length.tolist() and length.max() == F * W > length.min()
    np.testing.assert_array_equal(of_slots(filled.k_LxAxKxWxH), want["k"])
    np.testing.assert_array_equal(of_slots(filled.v_LxAxKxWxH), want["v"])
    assert (filled.bias_RxS is None) != biased
    assert not biased or np.array_equal(filled.bias_RxS, bias)


# All pages at once, a few a round, or page by page of all rows together.
@pytest.mark.parametrize("round_bytes", [pages.ROUND_BYTES, 2000, None])
@pytest.mark.parametrize(("rows", "share"), [(None, 1), ([4, 1], 1), (None, 2)])
def test_pages_are_attended_as_whole_rows_are(rows, share, round_bytes, monkeypatch):
    monkeypatch.setattr(pages, "ROUND_BYTES", round_bytes)
    together = round_bytes is None
    rng = np.random.default_rng([len(rows or []), share])
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    length_R = jnp.asarray([0, W, W + 1, F * W, 2 * W + 1, 3], jnp.int32)
    bias_RxS = jnp.where(jnp.asarray(rng.random((R, F * W)) < 0.3), -1e30, normal(R, F * W))
    paged = Pages(normal(L, R * F, K, W, H), normal(L, R * F, K, W, H), length_R, bias_RxS)
    row_E = None if rows is None else jnp.asarray(rows)
    B = (R if rows is None else len(rows)) * share
    q_BxTxNxH, layer = normal(B, T, K * J, H), jnp.int32(1)
    new = Segment(normal(B, T, K, H), normal(B, T, K, H), causal=True)
    read = reads(paged, row_E, together=together)
    part, scores = attend_pages(q_BxTxNxH, read, layer, keep_scores=True)
    out, lse_BxTxN = joined([part, attend_segment(q_BxTxNxH, new)])
    one_page = lambda x: jnp.moveaxis(jnp.asarray(of_slots(x)), 3, 2)  # noqa: E731
    k, v = one_page(paged.k_LxAxKxWxH), one_page(paged.v_LxAxKxWxH)
    whole = whole_rows(reads(Pages(k, v, length_R, bias_RxS), row_E), layer)
    want, (received,) = attention_with_weights(q_BxTxNxH, (whole, new), (0,))
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(page_weights(q_BxTxNxH, read, scores, lse_BxTxN), received, atol=1e-6)
    alone, none = attend_pages(q_BxTxNxH, read, layer)
    assert none is None and all(np.array_equal(a, b) for a, b in zip(alone, part, strict=True))
