"""Oracle: values worked out by hand from 1 - |L_r / N_r - lambda| / lambda."""

import pytest

from qwenla_jax.rewards import balance_reward


@pytest.mark.parametrize(
    ("lengths", "target", "expected"),
    [
        ([100], 100, 1.0),
        ([50], 100, 0.5),
        ([150], 100, 0.5),
        ([200], 100, 0.0),
        ([450], 100, -2.5),
        ([0], 100, 0.0),
        ([0, 0, 0], 100, 0.0),
        ([50, 150], 100, 1.0),  # the mean counts, not the sum and not each length
        ([0, 100], 100, 0.5),
        ([30, 60, 30], 100, 0.4),
        ([12], 8, 0.5),
        ([5], 2.5, 0.0),
        ([], 100, 0.0),  # not the formula's 0/0
    ],
)
def test_balance_by_hand(lengths, target, expected):
    assert balance_reward(lengths, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("lengths", "floor", "expected"),
    [([450], -1.0, -1.0), ([450], 0.0, 0.0), ([450], -3.0, -2.5), ([50], 0.0, 0.5), ([], -1.0, 0.0), ([], 0.5, 0.0)],
)
def test_floor(lengths, floor, expected):
    assert balance_reward(lengths, 100, floor) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("lengths", "target", "floor", "message"),
    [
        ([1], 0, None, "target_length"),
        ([1], -5.0, None, "target_length"),
        ([1], float("inf"), None, "target_length"),
        ([1], float("nan"), None, "target_length"),
        ([], 0, None, "target_length"),
        ([3, -1], 100, None, "reflection_lengths: -1"),
        ([1], 100, 1.5, "balance_floor"),
        ([1], 100, float("nan"), "balance_floor"),
    ],
)
def test_refused(lengths, target, floor, message):
    with pytest.raises(ValueError, match=message):
        balance_reward(lengths, target, floor)
