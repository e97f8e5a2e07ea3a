"""Taking and putting back rows, and caches, against numpy's own indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenla_jax.model.kv_cache import KeyValues, append, empty_cache, grow
from qwenla_jax.sampling.sample_state import RowSubset


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("rows", [4, 8, 16])
def test_take_and_put_are_fancy_indexing(shards, rows):
    rng = np.random.default_rng([shards, rows])
    B = 16
    for wanted in (rng.random(B) < 0.3, rng.random(B) < 0.8, np.zeros(B, bool), np.ones(B, bool)):
        chosen = RowSubset(jnp.asarray(wanted), shards, rows)
        run = np.arange(B).reshape(shards, -1)
        each = rows // shards
        want = [[b for b in part if wanted[b]] + [b for b in part if not wanted[b]] for part in run]
        row_C = np.array([part[:each] for part in want]).reshape(-1)
        np.testing.assert_array_equal(chosen.row_C, row_C)
        np.testing.assert_array_equal(chosen.wanted_C, wanted[row_C])
        assert wanted[row_C].sum() == sum(min(each, wanted[part].sum()) for part in run)
        for shape, axis in (((B,), 0), ((B, 3), 0), ((2, B, 5), 1), ((2, 3, B), 2)):
            x = rng.normal(size=shape).astype(np.float32)
            got = np.asarray(chosen.take(jnp.asarray(x), axis))
            np.testing.assert_array_equal(got, np.take(x, row_C, axis))
            new = rng.normal(size=got.shape).astype(np.float32)
            out = np.moveaxis(x.copy(), axis, 0)
            out[row_C[wanted[row_C]]] = np.moveaxis(new, axis, 0)[wanted[row_C]]
            np.testing.assert_array_equal(chosen.put(jnp.asarray(x), jnp.asarray(new), axis), np.moveaxis(out, 0, axis))
        shared = rng.normal(size=(2, B // 4, 3)).astype(np.float32)
        np.testing.assert_array_equal(chosen.take(jnp.asarray(shared), 1, 4), shared[:, row_C // 4])


def some(rng, rows, tokens, lengths, biased):
    k, v = (rng.normal(size=(2, rows, tokens, 1, 3)).astype(np.float32) for _ in range(2))
    bias = rng.normal(size=(rows, tokens)).astype(np.float32) if biased else None
    return KeyValues(k, v, np.asarray(lengths, np.int32), bias)


@pytest.mark.parametrize("biased", [True, False])
def test_append_writes_behind_each_row_and_drops_what_finds_no_slot(biased):
    rng = np.random.default_rng(0)
    S, cache = 8, empty_cache(2, 3, 8, 1, 3, "float32", biased)
    want = {name: np.zeros((2, 3, S, 1, 3), np.float32) for name in "kv"}
    bias, length = np.zeros((3, S), np.float32), np.zeros(3, int)
    # The last piece brings no bias of its own: a free slot holds 0.
    for lengths, own in (([2, 0, 4], biased), ([3, 1, 0], biased), ([4, 2, 3], biased), ([1, 1, 1], False)):
        new = some(rng, 3, 4, lengths, own)
        cache = jax.jit(append)(cache, new)
        for b, n in enumerate(lengths):
            for t in range(n):
                if length[b] < S:
                    want["k"][:, b, length[b]] = new.k_LxBxSxKxH[:, b, t]
                    want["v"][:, b, length[b]] = new.v_LxBxSxKxH[:, b, t]
                    bias[b, length[b]] = new.bias_BxS[b, t] if own else 0
                    length[b] += 1
    assert length.tolist() == [8, 4, 8] == cache.length_B.tolist()
    np.testing.assert_array_equal(cache.k_LxBxSxKxH, want["k"])
    np.testing.assert_array_equal(cache.v_LxBxSxKxH, want["v"])
    assert (cache.bias_BxS is None) != biased
    if biased:
        np.testing.assert_array_equal(cache.bias_BxS, bias)
    more = grow(cache, 11)
    assert more.k_LxBxSxKxH.shape == (2, 3, 11, 1, 3) and more.length_B.tolist() == [8, 4, 8]
    np.testing.assert_array_equal(more.k_LxBxSxKxH[:, :, :8], want["k"])
    assert not np.asarray(more.k_LxBxSxKxH[:, :, 8:]).any()
    assert not biased or not np.asarray(more.bias_BxS[:, 8:]).any()
