"""The reflection balance reward."""

import math
from collections.abc import Sequence


def balance_reward(reflection_lengths: Sequence[int], target: float, floor: float | None = None) -> float:
    """1 - |L_r / N_r - lambda| / lambda (paper, section BRPO).

    N_r is the number of reflections, L_r the sum of their lengths, lambda the ideal length of one. So 1.0 where the
    mean length is the target, 0.0 where it is zero or twice the target, and negative without bound beyond that.

    Paper silent: no reflection at all gives 0.0, as empty reflections do. The floor is optional and off by default.

    Args:
      reflection_lengths: tokens in each reflection, its tags excluded; 0 for an empty one.
      target: lambda, in tokens; the paper's is 100.
      floor: the least value of the formula, at most 1; None leaves it unbounded. It does not move the 0.0 of a response
        without reflections.

    Raises:
      ValueError: target is not a positive finite number, a length is negative, or floor is above 1 or not finite.
    """
    check_target(target)
    check_floor(floor)
    negative = [length for length in reflection_lengths if length < 0]
    if negative:
        raise ValueError(f"reflection_lengths: {negative[0]} is negative; a length counts tokens")
    if not reflection_lengths:
        return 0.0
    mean = sum(reflection_lengths) / len(reflection_lengths)
    reward = 1.0 - abs(mean - target) / target
    return reward if floor is None else max(reward, floor)


def check_target(target: float) -> None:
    """Raises ValueError where the ideal length of a reflection is not a positive finite number of tokens."""
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target_length: {target!r} tokens; want a positive finite number, the paper's is 100")


def check_floor(floor: float | None) -> None:
    """Raises ValueError where the floor of the balance reward could never or always apply."""
    if floor is not None and not (math.isfinite(floor) and floor <= 1):
        raise ValueError(f"balance_floor: {floor!r}; want None or a finite number of at most 1, the largest balance")
