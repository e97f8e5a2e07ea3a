"""How sure an accuracy is: Wilson's interval for one, the exact paired test for two on the same questions.

Paper silent: it gives accuracies without intervals. Kept by hand beside scipy.stats: its interval differs in the last
bit, and the test divides whole numbers once, which holds for any number of changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """A share and the ends of its confidence interval, all in 0 to 1; nan, 0, 1 where nothing was counted."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}]"


class Paired(NamedTuple):
    """Two results on the same questions.

    Attributes:
      gained: questions wrong before and right after.
      lost: questions right before and wrong after.
      difference: accuracy after minus accuracy before.
      p_value: two-sided, of a split at least this uneven where gains and losses are equally likely.
    """

    gained: int
    lost: int
    difference: float
    p_value: float


def wilson(right: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (without continuity correction) of `right` successes in `total` trials.

    Raises:
      ValueError: counts that cannot be, or a confidence outside (0, 1).
    """
    if not 0 <= right <= total:
        raise ValueError(f"right: got {right}, expected 0 to total ({total})")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    share = right / total
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = (right + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (share * (1 - share) * total + z2 / 4)) / (total + z2)
    # Rounding must not push the end at 0 or 1 past the share itself.
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == total else centre + half
    return Interval(share, low, high)


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """McNemar's exact test: were the same questions answered better or worse?

    Args:
      before: whether each question was answered right, in some order.
      after: the same questions in the same order.

    Raises:
      ValueError: different or no lengths.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(f"before, after: got {len(before)} and {len(after)} answers, expected one number above 0")
    gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    # Whole numbers divided once: 2**changed does not fit a float for many changes, their ratio does.
    p_value = min(1.0, (2 * tail) / (1 << changed))
    return Paired(gained, lost, (gained - lost) / len(before), p_value)
