"""The sum of the three rewards, and what is worth recording about the reflections."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.balance import balance_reward, check_floor, check_target
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.text.sections import parse


@dataclass(frozen=True)
class RewardSettings:
    """How the rewards are added up. The defaults are the paper's form.

    Attributes:
      format_weight, accuracy_weight, balance_weight: factors of the sum, finite and not negative. Paper silent: 1 each.
      target_length: the paper's lambda, the ideal number of tokens in a reflection.
      balance_floor: least value of the balance formula, None leaves it unbounded as the paper does.
      balance_only_if_correct: the balance counts as 0 where the answer is wrong. Not in the paper. Without a floor of
        about 0 or more this makes a wrong answer the way out of a large negative balance, so set one with it.

    Raises:
      ValueError: a value is out of range; the message names the setting.
    """

    format_weight: float = 1.0
    accuracy_weight: float = 1.0
    balance_weight: float = 1.0
    target_length: float = 100.0
    balance_floor: float | None = None
    balance_only_if_correct: bool = False

    def __post_init__(self) -> None:
        for name in ("format_weight", "accuracy_weight", "balance_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {value!r}; want a finite number of at least 0")
        check_target(self.target_length)
        check_floor(self.balance_floor)


@dataclass(frozen=True)
class RewardScores:
    """The rewards of one response.

    Attributes:
      format, accuracy: 0.0 or 1.0, before weighting.
      balance: at most 1.0, before weighting; floor and `balance_only_if_correct` already applied.
      total: the weighted sum, the r_i of the advantages.
      num_reflections: N_r.
      reflection_tokens: L_r, tokens in all reflections together, tags excluded.
    """

    format: float
    accuracy: float
    balance: float
    total: float
    num_reflections: int
    reflection_tokens: int


def score(response: str, answer: str, settings: RewardSettings, count_tokens: Callable[[str], int]) -> RewardScores:
    """All rewards of one response.

    Paper silent: reflections are counted in responses that break the format too, wherever they stand, nested ones
    included: a reflection is an opening tag whose next tag is its own closing tag. So a reflection that is cut off, or
    that holds another tag, does not count, and no token counts twice.

    Args:
      response: the generated text without control tokens; any string.
      answer: the right answer.
      settings: weights and options of the sum.
      count_tokens: number of tokens in a text. It is handed the content of each reflection as it stands, whitespace
        included; since the tags are single tokens that nothing merges with, this is the count within the response.

    Raises:
      ValueError: count_tokens returned a negative number.
    """
    reflections = parse(response).reflections
    lengths = [count_tokens(reflection.text) for reflection in reflections]
    accuracy = accuracy_reward(response, answer)
    balance = balance_reward(lengths, settings.target_length, settings.balance_floor)
    if settings.balance_only_if_correct and accuracy == 0.0:
        balance = 0.0
    form = format_reward(response)
    total = settings.format_weight * form + settings.accuracy_weight * accuracy + settings.balance_weight * balance
    return RewardScores(form, accuracy, balance, total, len(lengths), sum(lengths))
