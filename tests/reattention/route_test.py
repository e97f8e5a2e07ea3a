"""ROUTE's choice and its arithmetic, by hand and by exact numbers; attention from the log-sum-exp in numpy."""

import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from models import CLOSE, OPEN, looking_questions

from qwenla_jax.model.attention import Segment, attention_with_weights, segment_attention
from qwenla_jax.model.layers import MASK_VALUE
from qwenla_jax.reattention.options import ReattentionConfig, exact_ratio, inserted_slots, most_slots, selected_tokens
from qwenla_jax.reattention.route import all_slots, compact, hiding_bias, select
from qwenla_jax.types import ReinsertedImages


def options(share, form="compact"):
    return ReattentionConfig("route", share, form, open_id=OPEN, close_id=CLOSE)


def block_of(tokens, delimiters=2):
    """Prompts with one image each, of so many tokens."""
    tokens = np.asarray(tokens, np.int32)
    X = int(tokens.max()) + delimiters
    empty = np.zeros((len(tokens), X), np.int32)
    return ReinsertedImages(empty, empty, empty, tokens + delimiters, tokens, tokens[:, None])


SHARES = [Fraction(1, 10), Fraction(1, 4), Fraction(3, 10), Fraction(1, 3), Fraction(1, 2), Fraction(2, 3),
          Fraction(7, 10), Fraction(3, 4), Fraction(9, 10), Fraction(1, 100), Fraction(99, 100)]  # fmt: skip


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_the_share_is_rounded_up_in_exact_numbers(share):
    tokens = np.arange(0, 3000)
    block = block_of(tokens)
    for reattention in (options(float(share)), options(float(share), "bias")):
        want = [math.ceil(share * int(n)) for n in tokens]
        selected = np.asarray(selected_tokens(reattention, block))
        np.testing.assert_array_equal(selected, want)
        slots = np.asarray(inserted_slots(reattention, block))
        np.testing.assert_array_equal(slots, tokens + 2 if reattention.masks else np.add(want, 2))
        assert slots.max() <= most_slots(reattention, block) <= 3001


def test_every_share_of_three_decimals():
    tokens = np.arange(0, 16_385)
    for thousandths in (1, 7, 143, 333, 999):
        want = -(-thousandths * tokens // 1000)
        selected = np.asarray(selected_tokens(options(thousandths / 1000), block_of(tokens)))
        np.testing.assert_array_equal(selected, want)
    for thousandths in range(1001):
        assert exact_ratio(thousandths / 1000) == Fraction(thousandths, 1000)


def test_shares_by_hand():
    count = lambda share, n: int(selected_tokens(options(share), block_of([n]))[0])  # noqa: E731
    assert [count(0.1, 30), count(0.3, 10), count(1 / 3, 30), count(1 / 3, 31), count(0.5, 7)] == [3, 3, 10, 11, 4]
    assert [count(0.001, 1), count(0.007, 143), count(1e-9, 5), count(5 / 6, 6)] == [1, 2, 1, 5]
    assert exact_ratio(0.12345678901) == Fraction(12_345_678_901, 10**11) and exact_ratio(5 / 6) == Fraction(5, 6)
    everything = ReattentionConfig("route", 1.0, open_id=OPEN, close_id=CLOSE)
    assert int(selected_tokens(everything, block_of([7]))[0]) == 7


def test_select_against_sorting_each_row():
    """With many equal scores: they go by raster order. Rows share prompts, have 0, 1 and 2 images."""
    _, prompts, grids = looking_questions(6, seed=3)
    question = np.array([0, 0, 1, 1, 2, 3, 4, 5, 5])
    asked = jax.tree.map(lambda x: x[question], prompts)
    rng = np.random.default_rng(0)
    for share in (0.25, 0.3, 0.5, 0.9):
        received = rng.integers(0, 3, (len(question), prompts.ids_QxP.shape[1])).astype(np.float32)
        received[0] = 0
        got = np.asarray(select(options(share), asked, received, selected_tokens(options(share), asked.block)))
        for b, q in enumerate(question):
            source = prompts.block.source_QxX[q]
            tokens = [(-received[b, s], x) for x, s in enumerate(source) if s >= 0 and prompts.visual_QxP[q, s] >= 0]
            assert len(tokens) == sum(r * c for r, c in grids[q])
            best = {x for _, x in sorted(tokens)[: math.ceil(Fraction(str(share)) * len(tokens))]}
            edges = {x for x, s in enumerate(source) if s >= 0 and prompts.visual_QxP[q, s] < 0}
            assert set(np.flatnonzero(got[b])) == best | edges
        first = [x for x in np.flatnonzero(got[0]) if prompts.visual_QxP[0, prompts.block.source_QxX[0, x]] >= 0]
        assert first == list(range(1, 1 + len(first)))
    whole = np.asarray(
        select(ReattentionConfig("copy", open_id=OPEN, close_id=CLOSE), asked, received, np.zeros(9, np.int32))
    )
    np.testing.assert_array_equal(whole, all_slots(asked))
    np.testing.assert_array_equal(whole.sum(1), prompts.block.length_Q[question])


def test_both_forms_of_a_choice():
    selected = np.random.default_rng(1).random((5, 9)) < 0.5
    selected[0] = False
    slots = np.asarray(compact(selected, 7))
    for row, want in zip(slots, selected, strict=True):
        chosen = np.flatnonzero(want)
        assert row.tolist() == [*chosen, *[-1] * (7 - len(chosen))][:7]
    np.testing.assert_array_equal(
        np.asarray(hiding_bias(selected)), np.where(selected, np.float32(0), np.float32(MASK_VALUE))
    )


def segments(rng, Q, G, T, K, H):
    """Keys shared by groups, keys of a row's own of which some are hidden by a bias, and causal new ones."""
    B, sizes = Q * G, (Q, Q * G, Q * G)
    made = []
    for rows, S in zip(sizes, (7, 5, T), strict=True):
        k, v = (rng.normal(size=(rows, S, K, H)).astype(np.float32) for _ in range(2))
        visible = rng.random((rows, 1, 1, S)) < 0.8
        visible[..., 0] = True
        made.append(Segment(k, v, visible, None))
    hide = np.where(rng.random((B, 5)) < 0.4, MASK_VALUE, rng.normal(size=(B, 5))).astype(np.float32)
    return made[0], made[1].replace(bias=hide), made[2].replace(visible=np.tril(np.ones((T, T), bool))[None, None])


def test_watched_attention_is_the_plain_softmax():
    """One softmax over all runs of keys; what it paid to each of them, the mean over heads."""
    rng = np.random.default_rng(4)
    Q, G, T, N, K, H = 2, 3, 4, 6, 2, 8
    B = Q * G
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    runs = segments(rng, Q, G, T, K, H)
    out, received = jax.jit(lambda q, runs: attention_with_weights(q, runs, (0, 1, 2)))(q, runs)
    for b in range(B):
        total = np.zeros((T, 7 + 5 + T))
        for n in range(N):
            scores, values = [], []
            for run in runs:
                rows = len(run.k)
                own = b // (B // rows)
                s = q[b, :, n].astype(np.float64) @ run.k[own, :, n // (N // K)].astype(np.float64).T / math.sqrt(H)
                if run.bias is not None:
                    s = s + run.bias[own]
                visible = np.broadcast_to(run.visible, (rows, 1, T, s.shape[1]))[own, 0]
                scores.append(np.where(visible, s, -np.inf))
                values.append(run.v[own, :, n // (N // K)])
            s = np.concatenate(scores, 1)
            p = np.exp(s - s.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            np.testing.assert_allclose(out[b, :, n], p @ np.concatenate(values), atol=1e-5)
            total += p / N
        for got, want in zip(received, np.split(total, [7, 12], axis=1), strict=True):
            np.testing.assert_allclose(got[b], want, atol=1e-6)
    np.testing.assert_allclose(sum(np.asarray(p).sum(-1) for p in received), 1.0, atol=1e-5)
    np.testing.assert_array_equal(out, jax.jit(segment_attention)(q, runs))
    (only,) = attention_with_weights(q, runs, (1,))[1]
    np.testing.assert_allclose(only, received[1], atol=1e-6)


def test_a_bias_gets_no_gradient_and_a_hidden_key_none():
    rng = np.random.default_rng(5)
    q = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
    runs = segments(rng, 2, 1, 3, 2, 4)
    weight = rng.normal(size=q.shape).astype(np.float32)
    loss = lambda q, k, v, runs: (  # noqa: E731
        weight * segment_attention(q, (runs[0], runs[1].replace(k=k, v=v), runs[2]))
    ).sum()
    d_q, d_k, d_v = jax.jit(jax.grad(loss, (0, 1, 2)))(q, runs[1].k, runs[1].v, runs)
    hidden = (runs[1].bias < -1e29) | ~runs[1].visible[:, 0, 0]
    assert hidden.any() and not hidden.all()
    assert not np.asarray(d_k)[hidden].any() and not np.asarray(d_v)[hidden].any()
    assert np.asarray(d_k)[~hidden].any() and np.isfinite(d_q).all()
    # Without the hidden keys at all the gradients are the same.
    shut = runs[1].replace(visible=~hidden[:, None, None], bias=np.where(hidden, 0, runs[1].bias))
    for one, other in zip(
        (d_q, d_k, d_v), jax.grad(loss, (0, 1, 2))(q, runs[1].k, runs[1].v, (runs[0], shut, runs[2])), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
