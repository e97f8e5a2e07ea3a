"""Taking and putting back rows, against numpy's own indexing."""

import jax.numpy as jnp
import numpy as np
import pytest

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
