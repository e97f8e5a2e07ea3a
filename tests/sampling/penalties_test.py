"""Penalties at their extremes, and in rows side by side; engine_test.py has the rest."""

import jax.numpy as jnp
import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from qwenla_jax.sampling.penalties import LARGEST, RowPenalties, counted, first_counts, penalized
from qwenla_jax.sampling.token import MASK_VALUE, sample_token, suppression_bias, token_keys
from qwenla_jax.types import PromptBatch

V, P, G, TOKENS = 60, 9, 2, 12


def asked(rng, questions):
    """Prompts of different lengths; what is behind their end is in none of them."""
    ids = rng.integers(0, V, (questions, P)).astype(np.int32)
    length = rng.integers(1, P + 1, questions).astype(np.int32)
    return PromptBatch(ids, np.zeros((questions, P, 3), np.int32), np.full((questions, P), -1), length, length)


def test_rows_side_by_side_are_transformers_and_openais_formula():
    """Each with its settings; rows that are not active count nothing; neutral rows keep their bits."""
    rng = np.random.default_rng(0)
    Q = 20
    B, prompts = Q * G, asked(rng, Q)
    counts = first_counts(prompts, G, V, TOKENS)
    assert counts.response_BxV.dtype == jnp.int16 and first_counts(prompts, G, V, 2**15).response_BxV.dtype == jnp.int32
    said = [[] for _ in range(B)]
    for _ in range(TOKENS):
        ids, active = rng.integers(0, 20, B).astype(np.int32), rng.random(B) < 0.7
        counts = counted(counts, jnp.asarray(ids), jnp.asarray(active))
        for row in np.flatnonzero(active):
            said[row].append(int(ids[row]))
    presence, frequency = rng.uniform(-2, 2, (2, B)).astype(np.float32)
    repetition = np.exp(rng.uniform(-2, 2, B)).astype(np.float32)
    presence[::5], frequency[::5], repetition[::5] = 0, 0, 1
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    settings = RowPenalties(*map(jnp.asarray, (presence, frequency, repetition)))
    got = np.asarray(penalized(jnp.asarray(logits), counts, settings, jnp.ones(B, bool)))
    for b in range(B):
        before = [*prompts.ids_QxP[b // G, : prompts.length_Q[b // G]].tolist(), *said[b]]
        processor = RepetitionPenaltyLogitsProcessor(float(repetition[b]))
        want = processor(torch.tensor([before]), torch.tensor(logits[b : b + 1]))[0].numpy().astype(np.float64)
        count = np.bincount(said[b], minlength=V)
        want = want - count * frequency[b] - (count > 0) * presence[b]
        np.testing.assert_allclose(got[b], want, atol=2e-5)
    assert np.array_equal(got[::5], logits[::5]) and not np.array_equal(got, logits)
    assert np.array_equal(penalized(jnp.asarray(logits), counts, settings, jnp.zeros(B, bool)), logits)


def test_the_smallest_and_largest_penalties_draw_no_suppressed_token():
    """Although the prompt has one; what is drawn is finite, and log-probabilities are those without penalties."""
    rng = np.random.default_rng(1)
    repetition = np.array([0.0, 1e-38, 1e-9, 1e9, 1e30], np.float32)  # 0: what smaller numbers are in float32
    B = len(repetition)
    prompts = asked(rng, B)
    counts = counted(first_counts(prompts, 1, V, TOKENS), jnp.full((B,), 3), jnp.ones(B, bool))
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    logits[:, 3] = [0.0, 1.0, -1.0, 0.0, 2.0]
    bias = suppression_bias(V, V - 2, prompts.ids_QxP[:, 0])
    two = jnp.full((B,), 2.0)
    got = penalized(jnp.asarray(logits), counts, RowPenalties(two, -two, jnp.asarray(repetition)), jnp.ones(B, bool))
    assert np.isfinite(got).all() and np.abs(got).max() <= LARGEST < -MASK_VALUE / 1e6
    for temperature in (0.0, 1e-5, 1.0, 1e6):
        keys = token_keys(*jnp.zeros((2, B), jnp.uint32), jnp.arange(B, dtype=jnp.uint32), jnp.zeros(B, jnp.int32))
        each = jnp.full((B,), temperature), jnp.ones(B), jnp.zeros(B, jnp.int32)
        ids, logp = sample_token(jnp.asarray(logits), bias, *each, keys, True, got)
        assert (bias[np.asarray(ids)] == 0).all()
        scaled = torch.tensor(logits + bias).double() / (temperature or 1)
        want = torch.log_softmax(scaled, -1).numpy()[np.arange(B), np.asarray(ids)]
        np.testing.assert_allclose(logp, want, rtol=1e-5, atol=1e-5)
