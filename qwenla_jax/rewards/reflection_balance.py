"""The reflection balance reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwenla_jax.config.schema import option
from qwenla_jax.rewards.accuracy import ACCURACY, AccuracyOptions
from qwenla_jax.rewards.built_in_reward import BuiltInReward
from qwenla_jax.rewards.reward_record import RewardRecord


@dataclass(frozen=True)
class BalanceOptions(AccuracyOptions):
    """Options of the balance reward, and those that say which answer is right. Paper silent: the weight; 1.

    Not in the paper: `balance_only_if_correct`. Without a floor of about 0 or more a wrong answer avoids a large
    negative balance, so set one with it.
    """

    balance: float = option(1.0, "weight of the reflection balance reward", low=0)
    target_length: float = option(100.0, "lambda: ideal tokens of one reflection", above=0)
    balance_floor: float | None = option(
        None, "least balance reward, before its weight; none or -inf: no floor", high=1
    )
    balance_only_if_correct: bool = option(False, "give the balance reward only to responses with the right answer")


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
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target_length: {target!r} tokens; want a positive finite number, the paper's is 100")
    if floor is not None and not (math.isfinite(floor) and floor <= 1):
        raise ValueError(f"balance_floor: {floor!r}; want None or a finite number of at most 1, the largest balance")
    negative = [length for length in reflection_lengths if length < 0]
    if negative:
        raise ValueError(f"reflection_lengths: {negative[0]} is negative; a length counts tokens")
    if not reflection_lengths:
        return 0.0
    mean = sum(reflection_lengths) / len(reflection_lengths)
    reward = 1.0 - abs(mean - target) / target
    return reward if floor is None else max(reward, floor)


def _value(settings: BalanceOptions, record: RewardRecord) -> float:
    balance = balance_reward(record.reflection_tokens, settings.target_length, settings.balance_floor)
    return 0.0 if settings.balance_only_if_correct and ACCURACY.value(settings, record) == 0.0 else balance


BALANCE = BuiltInReward("balance", BalanceOptions, _value)
