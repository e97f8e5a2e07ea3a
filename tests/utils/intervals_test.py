"""Oracle: scipy.stats.binomtest (Wilson's interval, exact binomial test) and numbers from textbooks."""

import math

import pytest
from scipy import stats

from qwenla_jax.utils.intervals import paired, wilson


@pytest.mark.parametrize("right, total", [(0, 10), (10, 10), (1, 1), (7, 10), (754, 1000), (9999, 10000)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_wilson_equals_scipy(right, total, confidence):
    ours = wilson(right, total, confidence)
    want = stats.binomtest(right, total).proportion_ci(confidence, method="wilson")
    assert ours.share == right / total
    assert ours.low == pytest.approx(want.low, abs=1e-12)
    assert ours.high == pytest.approx(want.high, abs=1e-12)
    assert 0 <= ours.low <= ours.share <= ours.high <= 1


def test_wilson_by_hand():
    # 5 of 10, z = 1.959964: centre 0.5, half width sqrt(z2 * (2.5 + z2 / 4)) / (10 + z2) = 0.263408...
    interval = wilson(5, 10)
    assert interval.low == pytest.approx(0.236593, abs=1e-6)
    assert interval.high == pytest.approx(0.763407, abs=1e-6)
    assert str(interval) == "50.0% [23.7%, 76.3%]"


def test_wilson_of_nothing_knows_nothing():
    share, low, high = wilson(0, 0)
    assert math.isnan(share) and (low, high) == (0.0, 1.0)


@pytest.mark.parametrize("right, total, confidence", [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 95)])
def test_wilson_refuses(right, total, confidence):
    with pytest.raises(ValueError, match="expected"):
        wilson(right, total, confidence)


@pytest.mark.parametrize(
    "gained, lost, same", [(8, 1, 20), (1, 8, 0), (0, 0, 5), (5, 5, 1), (70, 40, 890), (900, 1100, 0)]
)
def test_paired_equals_scipy(gained, lost, same):
    before = [False] * gained + [True] * lost + [True] * same
    after = [True] * gained + [False] * lost + [True] * same
    result = paired(before, after)
    want = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert (result.gained, result.lost) == (gained, lost)
    assert result.p_value == pytest.approx(want, rel=1e-9)
    assert result.difference == pytest.approx((gained - lost) / len(before))


def test_paired_by_hand():
    # Three gains, no loss: 2 * (1/2)**3.
    assert paired([False] * 3, [True] * 3).p_value == 0.25


@pytest.mark.parametrize("before, after", [([True], []), ([], [])])
def test_paired_refuses(before, after):
    with pytest.raises(ValueError, match="before, after"):
        paired(before, after)
