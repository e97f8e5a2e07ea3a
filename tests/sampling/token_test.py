"""Choosing a token, against transformers' warpers and the distribution that was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TopKLogitsWarper, TopPLogitsWarper

from qwenla_jax.sampling import token
from qwenla_jax.sampling.token import (
    MASK_VALUE,
    draw,
    drawn,
    group_sizes,
    most_likely,
    nucleus,
    rising_sums,
    suppression_bias,
    uniforms,
)


def token_keys(seed, step, sample_B, token_B):
    """Of one seed and step for all rows, or of one each."""
    B = np.shape(sample_B)
    return token.token_keys(
        jnp.broadcast_to(jnp.uint32(seed), B), jnp.broadcast_to(jnp.uint32(step), B), sample_B, token_B
    )


def sample_token(logits_BxV, bias_V, temperature, top_p, keys_B, top_k=0):
    """With settings for all rows, or one each."""
    each = lambda x, dtype: jnp.broadcast_to(jnp.asarray(x, dtype), (len(logits_BxV),))  # noqa: E731
    settings = each(temperature, jnp.float32), each(top_p, jnp.float32), each(top_k, jnp.int32)
    return token.sample_token(logits_BxV, bias_V, *settings, keys_B)


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_nucleus_is_transformers(top_p, ties, monkeypatch):
    """Which of equal tokens transformers keeps is left to a sort that is not stable: any by itself, the later ids if
    the sort is made stable.
    """
    logits = np.random.default_rng(0).normal(size=(200, 41)).astype(np.float32) * 2
    if ties:
        logits = np.round(logits)
        logits[0] = 1.0  # 41 equal ones: no sum of them is near 1 - top_p
    got = np.asarray(nucleus(logits, top_p))
    as_it_is = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, descending: sort(x, descending=descending, stable=True))
    want = TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    assert np.array_equal(np.sort(np.maximum(as_it_is, MASK_VALUE), -1), np.sort(got, -1))
    assert np.array_equal(got, np.maximum(want, MASK_VALUE))


def test_samples_follow_the_distribution():
    logits = np.array([[0.0, 1.0, 2.0, -1.0, 0.5, 3.0]], np.float32)
    bias = suppression_bias(6, 6, [2])
    rows = 20_000
    keys = token_keys(3, 5, np.arange(rows, dtype=np.uint32), np.zeros(rows, np.int32))
    tokens, logp = sample_token(np.repeat(logits, rows, 0), bias, 0.7, 1.0, keys)
    p = np.exp(logits[0] / 0.7) * [1, 1, 0, 1, 1, 1]
    p /= p.sum()
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert counts[2] == 0
    allowed = p > 0
    assert stats.chisquare(counts[allowed], p[allowed] * rows).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(logp), p[np.asarray(tokens)], rtol=1e-5)


def test_forbidden_tokens_are_never_taken_even_at_the_ends():
    """8 tokens are groups of 4, 0 2 4 6 and 1 3 5 7, of which 2 and 4, and 1 and 5, may come with the same weight."""
    bias = suppression_bias(8, 6, [0, 3])
    assert group_sizes(8) == (4, 2)
    ends = np.array([0.0, 2.0**-64, 0.25, 0.75, 1.0], np.float32)
    pairs = np.stack(np.meshgrid(ends, ends, indexing="ij"), -1).reshape(-1, 2)
    tokens = np.asarray(draw(np.zeros((25, 8), np.float32) + bias, pairs)).reshape(5, 5)
    assert tokens.tolist() == [[2, 2, 2, 4, 4]] * 3 + [[1, 1, 1, 5, 5]] * 2


def test_greedy_takes_the_likeliest_allowed_token():
    logits = np.array([[1.0, 5.0, 3.0]], np.float32)
    keys = token_keys(0, 0, np.zeros(1, np.uint32), np.zeros(1))
    tokens, logp = sample_token(logits, suppression_bias(3, 3, [1]), 0.0, 1.0, keys)
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


def boundaries(weights):
    """Probability of each index under `drawn`, exactly: from its own float32 sums, and the random numbers below each.

    A random number is the float32 nearest to one of 2**64 evenly spaced ones, so half of the gap below the first that
    passes belongs to it.
    """
    order = np.argsort(weights, axis=-1, kind="stable")
    sums = np.asarray(jax.jit(rising_sums)(weights)[1])
    whole, one = sums[:, -1:], np.float32(1)
    # The least float32 number u with u * whole >= sum, all in float32: near the quotient.
    least = np.nextafter(np.nextafter(sums / whole, -one), -one)
    for _ in range(5):
        least = np.where(least * whole >= sums, least, np.nextafter(least, 2 * one))
    assert (least * whole >= sums).all() and (np.nextafter(least, -one) * whole < sums).all()
    below = (least.astype(np.float64) + np.nextafter(least, -one)) / 2
    below[:, -1] = 1
    share = np.empty(weights.shape)
    np.put_along_axis(share, order, np.diff(below, prepend=0.0), axis=-1)
    return share


@pytest.mark.parametrize(
    ("vocab", "spread"), [(152_064, 4.0), (151_936, 4.0), (152_064, 1.0), (151_667, 8.0), (512, 4.0)]
)
def test_the_distribution_that_is_drawn_from_is_the_one_asked_for(vocab, spread):
    """The probability of every token, the tail among them, from the float32 numbers that it is drawn by."""
    logits = np.random.default_rng(0).normal(size=vocab).astype(np.float32) * np.float32(spread)
    W, N = group_sizes(vocab)
    padded = np.concatenate([logits, np.full(W * N - vocab, MASK_VALUE, np.float32)]).reshape(W, N)
    weights = np.asarray(jax.jit(lambda x: jax.numpy.exp(x - x.max()).sum(0))(padded))
    within = np.asarray(jax.jit(lambda x: jax.numpy.exp(x - x.max(0)))(padded))
    share = (boundaries(weights[None])[0] * boundaries(within.T).T).reshape(-1)[:vocab]
    want = np.exp(logits.astype(np.float64) - logits.max())
    want /= want.sum()
    reached = want > 1e-25
    assert np.abs(share - want).sum() / 2 < 1e-5
    np.testing.assert_allclose(share[reached], want[reached], rtol=max(W, N) * 2.0**-22)


def test_each_token_comes_for_its_own_random_numbers():
    """Every 97th token and the 64 least likely of 152,064, at both ends of what is theirs: intervals in float64."""
    vocab = 152_064
    logits = np.random.default_rng(1).normal(size=vocab).astype(np.float32) * 4
    W, N = group_sizes(vocab)
    p = np.exp(logits.astype(np.float64) - logits.max()).reshape(W, N)
    tokens = np.union1d(np.arange(0, vocab, 997), np.argsort(logits)[:64])

    def ends(weights, index):
        """Of index's interval, a thousandth inside; weights are summed from the smallest on."""
        before = weights[weights < weights[index]].sum()
        return np.array([before + weights[index] * part for part in (1e-3, 0.999)]) / weights.sum()

    outer = np.stack([ends(p.sum(0), token % N) for token in tokens])
    inner = np.stack([ends(p[:, token % N], token // N) for token in tokens])
    run = jax.jit(lambda u: draw(jax.numpy.broadcast_to(logits, (len(u), vocab)), u))
    for side in (0, 1):
        for other in (0, 1):
            pairs = np.stack([outer[:, side], inner[:, other]], -1).astype(np.float32)
            np.testing.assert_array_equal(run(pairs), tokens)


def test_one_token_that_dominates_leaves_the_others_their_share():
    """1 and 1e-9, 1e-9, 1e-17 of it, in one group and in others: a sum in float32 would be 1 with or without them."""
    for apart in (1, 8):
        weights = np.zeros(64, np.float32)
        weights[[8, 8 + apart, 8 + 2 * apart, 8 + 3 * apart]] = [1e-9, 1, 1e-17, 1e-9]
        edges = np.array([0.5e-17, 0.5e-9, 1.5e-9, 3e-9, 1 - 2.0**-24, 1.0], np.float32)
        assert np.array_equal(drawn(np.tile(weights, (6, 1)), edges), 8 + apart * np.array([2, 0, 3, 1, 1, 1]))
        with np.errstate(divide="ignore"):
            logits = np.maximum(np.log(weights), MASK_VALUE)
        W, N = group_sizes(64)
        assert (W, N) == (8, 8)
        pairs = np.full((6, 2), 0.5, np.float32)
        pairs[:, 1 if apart == 8 else 0] = edges
        assert np.array_equal(draw(np.tile(logits, (6, 1)), pairs), 8 + apart * np.array([2, 0, 3, 1, 1, 1]))


def test_random_numbers_are_even_and_fine_near_zero():
    keys = token_keys(0, 0, np.arange(200_000, dtype=np.uint32), np.zeros(200_000, np.int32))
    u = np.asarray(uniforms(keys))
    for each in (u[:, 0], u[:, 1]):
        assert stats.kstest(each, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.01
    small = np.sort(u.reshape(-1))[:100]
    assert small[-1] < 1e-3 and (small * 2.0**24 % 1 > 0).sum() > 90  # between the numbers that are 2**-24 apart


@pytest.mark.parametrize("vocab", [24, 96, 97, 104, 512, 151_667, 151_936, 152_064])
def test_groups_hold_every_token_once(vocab):
    W, N = group_sizes(vocab)
    assert vocab <= W * N < vocab + W and W & (W - 1) == 0 and N <= 16 * W


def test_a_small_vocabulary_by_its_definition():
    """Against float64 sums over the groups, each in rising order, where no random number lies at an edge."""
    rng = np.random.default_rng(4)
    for vocab in (24, 97):
        logits = rng.normal(size=(2000, vocab)).astype(np.float32)
        logits[:, [0, 7, 8, 23]] = MASK_VALUE
        uniform = rng.random((2000, 2)).astype(np.float32)
        W, N = group_sizes(vocab)
        p = np.pad(np.exp(logits.astype(np.float64)), [(0, 0), (0, W * N - vocab)]).reshape(-1, W, N)

        def pick(weights, u):
            order = np.argsort(weights, kind="stable")
            cdf = np.cumsum(weights[order]) / weights.sum()
            return order[np.searchsorted(cdf, u)], np.abs(cdf - u).min() > 1e-5

        got, compared = np.asarray(draw(logits, uniform)), 0
        for b in range(2000):
            group, clear = pick(p[b].sum(0), uniform[b, 0])
            member, also = pick(p[b, :, group], uniform[b, 1])
            if clear and also:
                assert got[b] == member * N + group
                compared += 1
        assert compared > 1950


def test_top_k_masks_as_in_transformers():
    """Ties at the border stay; 0 masks nothing."""
    rng = np.random.default_rng(9)
    logits = np.round(rng.normal(size=(60, 50)).astype(np.float32) * 2, 1)
    ks = np.array([0, 1, 2, 5, 49, 50, 80])[np.arange(60) % 7]
    got = np.asarray(most_likely(jnp.asarray(logits), jnp.asarray(ks)[:, None]))
    for row, k in enumerate(ks.tolist()):
        want = TopKLogitsWarper(k)(None, torch.tensor(logits[row : row + 1])).numpy()[0] if k else logits[row]
        assert np.array_equal(got[row] == MASK_VALUE, np.isinf(want))
        assert np.array_equal(got[row][got[row] > MASK_VALUE], want[np.isfinite(want)])


def test_settings_of_each_row_give_what_one_setting_for_all_gives():
    """A row's token is the same whatever its neighbours' settings are; it is one that top-k and then top-p leave."""
    rng = np.random.default_rng(3)
    settings = [(0.0, 1.0, 0), (0.7, 0.9, 0), (1.0, 1.0, 0), (1.5, 0.5, 0), (2.0, 1.0, 3), (1.5, 0.6, 9)]
    logits = rng.normal(size=(600, 300)).astype(np.float32) * 3
    bias, rows = suppression_bias(300, 290, [7]), np.arange(600)
    keys = token_keys(3, 5, rows.astype(np.uint32), np.zeros(600, np.int32))
    of_row = np.array(settings)[rows % len(settings)]
    tokens, logp = sample_token(logits, bias, of_row[:, 0], of_row[:, 1], keys, of_row[:, 2])
    for number, (temperature, top_p, top_k) in enumerate(settings):
        want, want_logp = sample_token(logits, bias, temperature, top_p, keys, top_k)
        mine = rows % len(settings) == number
        assert np.array_equal(tokens[mine], want[mine])
        np.testing.assert_allclose(logp[mine], want_logp[mine], atol=2e-6, rtol=0)
        if temperature:
            left = torch.tensor((logits + bias)[mine] / temperature)
            left = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, left) if top_k else left)
            assert torch.isfinite(left[torch.arange(mine.sum()), torch.tensor(np.array(tokens[mine]))]).all()
            assert len(set(np.asarray(tokens[mine]).tolist())) > 20
