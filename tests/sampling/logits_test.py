"""Choosing a token, against transformers' warpers and the distribution that was asked for."""

import jax
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TopPLogitsWarper

from qwenla_jax.sampling.logits import HIDDEN, choose, forbidden_bias, inverse_cdf, nucleus, token_keys


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 0.999])
def test_nucleus_is_transformers(top_p):
    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * 2
    want = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    got = np.asarray(nucleus(logits, top_p))
    assert np.array_equal(got > HIDDEN, np.isfinite(want))
    assert np.array_equal(got[got > HIDDEN], want[np.isfinite(want)])


def test_samples_follow_the_distribution():
    logits = np.array([[0.0, 1.0, 2.0, -1.0, 0.5, 3.0]], np.float32)
    bias = forbidden_bias(6, 6, [2])
    rows = 20_000
    keys = token_keys(3, 5, np.arange(rows, dtype=np.uint32), np.zeros(rows, np.int32))
    tokens, logp = choose(np.repeat(logits, rows, 0), bias, 0.7, 1.0, keys)
    p = np.exp(logits[0] / 0.7) * [1, 1, 0, 1, 1, 1]
    p /= p.sum()
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert counts[2] == 0
    allowed = p > 0
    assert stats.chisquare(counts[allowed], p[allowed] * rows).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(logp), p[np.asarray(tokens)], rtol=1e-5)


def test_forbidden_tokens_are_never_taken_even_at_the_ends():
    bias = forbidden_bias(8, 6, [0, 3])
    logits = np.zeros((5, 8), np.float32) + bias
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    tokens = np.asarray(inverse_cdf(logits, np.array([0.0, 0.25, 0.5, 0.75, almost_one], np.float32)))
    assert tokens.tolist() == [1, 2, 4, 5, 5]


def test_greedy_takes_the_likeliest_allowed_token():
    logits = np.array([[1.0, 5.0, 3.0]], np.float32)
    keys = token_keys(0, 0, np.zeros(1, np.uint32), np.zeros(1))
    tokens, logp = choose(logits, forbidden_bias(3, 3, [1]), 0.0, 1.0, keys)
    assert tokens.tolist() == [2]
    np.testing.assert_allclose(np.asarray(logp), [3 - np.log(np.exp(1) + np.exp(3))], rtol=1e-6)


def test_keys_depend_on_seed_step_sample_and_token_alone():
    def draw(seed, step, samples, tokens):
        keys = token_keys(seed, step, np.array(samples, np.uint32), np.array(tokens, np.int32))
        return np.asarray(jax.vmap(jax.random.uniform)(keys))

    base = draw(1, 2, [3, 4], [5, 5])
    assert draw(1, 2, [4, 9, 3], [5, 5, 5])[2] == base[0]
    others = [draw(2, 2, [3], [5]), draw(1, 3, [3], [5]), draw(1, 2, [4], [5]), draw(1, 2, [3], [6])]
    assert len({float(base[0]), *(float(x[0]) for x in others)}) == 5


def test_a_vocabulary_in_parts_gives_the_same_tokens():
    """Against float64 sums, where the random number is not within rounding of a token's edge."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(2000, 24)).astype(np.float32)
    logits[:, [0, 7, 8, 23]] = HIDDEN
    uniform = rng.random(2000).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    cdf = np.cumsum(p, 1) / p.sum(1, keepdims=True)
    clear = np.abs(cdf - uniform[:, None]).min(1) > 1e-5
    want = np.argmax(cdf > uniform[:, None], 1)
    assert clear.mean() > 0.99
    for shards in (1, 2, 3, 8):
        got = np.asarray(inverse_cdf(logits, uniform, shards))
        np.testing.assert_array_equal(got[clear], want[clear])
