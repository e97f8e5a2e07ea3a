"""Intervals against SciPy's bootstrap, p values against its binomial test, ratios against numbers counted by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from studies import attention, line, records, write_run

from qwenla_jax.study import statistics as st
from qwenla_jax.study.collect import COPY, TEXT, collect


def scipy_ends(over, under, count=4000):
    value = lambda o, u, axis: o.sum(axis) / u.sum(axis)  # noqa: E731
    result = stats.bootstrap(
        (over, under), value, paired=True, vectorized=True, n_resamples=count, method="percentile", rng=1
    )
    return result.confidence_interval


def test_a_ratio_and_its_interval():
    rng = np.random.default_rng(0)
    under = rng.integers(1, 4, 300).astype(float)
    over = rng.binomial(under.astype(int), 0.2).astype(float)
    got = st.ratio([st.Ratio(over, under)], null=0.3)
    assert got.value == pytest.approx(over.sum() / under.sum())
    low, high = scipy_ends(over, under)
    assert (got.low, got.high) == (pytest.approx(low, abs=0.003), pytest.approx(high, abs=0.003))
    assert got.p < 0.002
    assert math.isnan(st.ratio([st.Ratio(over, under)]).p)
    # At its own value the null is anything but far; the same numbers as columns give the same.
    assert st.ratio([st.Ratio(over, under)], null=got.value).p > 0.9
    values, lows, highs = st.ratios([st.Ratio(np.stack([over, over], 1), np.stack([under, under], 1))])
    assert values == pytest.approx([got.value] * 2)
    assert (lows[1], highs[1]) == (pytest.approx(got.low), pytest.approx(got.high))


def test_a_difference_is_paired():
    """Two systems that differ in few questions: resampled apart, their difference would be far less sure."""
    rng = np.random.default_rng(1)
    before = (rng.random(400) < 0.5).astype(float)
    after = before.copy()
    after[:12] = 1
    one = np.ones(400)
    got = st.difference([st.Ratio(after, one)], [st.Ratio(before, one)])
    assert got.value == pytest.approx((after - before).mean())
    low, high = scipy_ends(after - before, one)
    assert (got.low, got.high) == (pytest.approx(low, abs=0.004), pytest.approx(high, abs=0.004))
    assert got.high - got.low < 0.03
    with pytest.raises(ValueError, match="same questions"):
        st.difference([st.Ratio(after, one)], [st.Ratio(before[1:], one[1:])])


def test_seeds_are_resampled_each_by_itself():
    """Each seed is all of one kind, so nothing can vary; questions drawn over both seeds would."""
    one = np.ones(50)
    got = st.ratio([st.Ratio(one, one), st.Ratio(0 * one, one)])
    assert got[:3] == (0.5, 0.5, 0.5)
    assert st.per_seed([st.Ratio(one, one), st.Ratio(0 * one, 0 * one)])[0] == 1.0


def test_seeds_do_not_share_their_draws():
    """The second seed answers wrongly what the first answers rightly: drawn alike, they would always make a half."""
    right = np.arange(50) % 2.0
    one = np.ones(50)
    got = st.ratio([st.Ratio(right, one), st.Ratio(1 - right, one)])
    low, high = scipy_ends(np.concatenate([right, 1 - right]), np.ones(100))
    assert (got.low, got.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert got.low < 0.45 < 0.55 < got.high


def test_nothing_counted():
    none = np.zeros(30)
    got = st.ratio([st.Ratio(none, none)], null=0.0)
    assert math.isnan(got.value) and math.isnan(got.low) and math.isnan(got.p)
    values, low, _ = st.ratios([st.Ratio(np.stack([none, none + 1], 1), np.stack([none, none + 2], 1))])
    assert math.isnan(values[0]) and math.isnan(low[0]) and values[1] == low[1] == 0.5
    # One question in thirty has anything: a third of the draws miss it, so there is no interval.
    rare = none.copy()
    rare[0] = 1
    assert math.isnan(st.ratio([st.Ratio(rare, rare)]).low)


def test_accuracy_is_tested_by_mcnemar(tmp_path):
    """Seed 0: 10 against 4 right of 40, seed 1: 3 against 5. Gained 6 + 0, lost 0 + 2."""
    for seed, right in enumerate(({COPY: 10, TEXT: 4}, {COPY: 3, TEXT: 5})):
        write_run(tmp_path / f"seed_{seed}", seed, (TEXT, COPY), right)
    study = collect([tmp_path / "seed_0", tmp_path / "seed_1"])
    got = st.accuracy_difference(study.of(COPY), study.of(TEXT))
    assert got.value == pytest.approx(4 / 80)
    assert got.p == pytest.approx(stats.binomtest(2, 8, 0.5).pvalue)
    assert got.low < 4 / 80 < got.high
    steps, result = st.curve_accuracy([seed.curve for seed in study.seeds])
    assert steps.tolist() == [0, 30, 60] and result[:, 0].tolist() == [0.25, 0.5, 0.75]
    wilson = stats.binomtest(64, 128).proportion_ci(method="wilson")
    assert result[1, 1:].tolist() == pytest.approx([wilson.low, wilson.high])


def test_counted_by_hand(tmp_path):
    asked = records(0, 3)
    lines = [
        line(asked[0], objects=((3, True), (7, False), (11, True)), tokens=20, missed=0),
        line(asked[1], objects=((3, False),), tokens=30, missed=2),
        line(asked[2], objects=(), tokens=40, missed=3),
    ]
    sums = attention(early=0.4, middle=0.3, late=0.2, inside=0.1, even=0.25, count=3)
    write_run(tmp_path, systems=(TEXT,), count=3, text_only={"lines": lines, "attention": sums})
    study = collect([tmp_path])
    (one,) = study.of(TEXT)
    value = lambda r: (r.over.sum(), r.under.sum())  # noqa: E731
    assert value(st.share(one, "invented", "named")) == (2, 4)
    assert value(st.recall(one)) == (2, 7)  # named and there: 2; missed: 0 + 2 + 3
    assert value(st.objects_between(one, 3, 7)) == (1, 2)  # up to the end, without it
    assert value(st.objects_between(one, 7, math.inf)) == (1, 2)
    assert value(st.answers_between(one, st.share(one, "invented", "named"), 20, 30)) == (1, 3)
    assert st.middle_token(study, TEXT) == 5  # 3, 3, 7, 11
    mass, even = st.visual_mass(one.attention.positions), st.visual_ratio(one.attention.positions, slice(1, None))
    assert (mass.over.sum(0) / mass.under.sum(0)).tolist() == pytest.approx([0.4, 0.3, 0.2])
    assert even.over.sum() / even.under.sum() == pytest.approx(0.5 / 0.5)
    inside = st.visual_ratio(one.attention.parts, 1)
    assert inside.over.sum() / inside.under.sum() == pytest.approx(0.1 / 0.25)
