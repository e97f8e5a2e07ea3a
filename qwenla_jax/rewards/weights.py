"""All rewards of a response and their weighted sum."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwenla_jax.rewards.accuracy import accuracy_reward, check_match
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.rewards.overlong import check_overlong, overlong_reward
from qwenla_jax.rewards.pool.plugins import BUILT_IN, Reward, as_number, load_rewards, names_of
from qwenla_jax.rewards.reflection_balance import balance_reward, check_floor, check_target
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.text.answers.algebra import require_math


@dataclass(frozen=True)
class RewardSettings:
    """How the rewards are added up. The defaults are the paper's form.

    Attributes:
      format_weight, accuracy_weight, balance_weight: factors of the sum, finite and not negative. Paper silent: 1 each.
      target_length: the paper's lambda, the ideal number of tokens in a reflection.
      balance_floor: least value of the balance formula, None leaves it unbounded as the paper does.
      balance_only_if_correct: the balance counts as 0 where the answer is wrong. Not in the paper. Without a floor of
        about 0 or more this makes a wrong answer the way out of a large negative balance, so set one with it.
      overlong_weight: factor of `overlong_reward`. Not in the paper, so 0.
      overlong_buffer: tokens before the limit at which that reward starts to fall; 0 switches it off.
      max_tokens: the limit, the most tokens of a response.
      extra: the user's own rewards, pairs (`module:function`, weight); `record.RewardRecord` is what they are handed.
      match: how a conclusion is compared with the right answer: "usual" writings of it (`text.answers`), or "bare",
        letter by letter. Paper: "by regular expression", which "bare" is at its plainest; "usual" is our choice.
      math: expressions that are equal by algebra count as the right answer too (`text.math_answers`). Not in the paper.

    Raises:
      ValueError: a value is out of range; the message names the setting.
    """

    format_weight: float = 1.0
    accuracy_weight: float = 1.0
    balance_weight: float = 1.0
    target_length: float = 100.0
    balance_floor: float | None = None
    balance_only_if_correct: bool = False
    overlong_weight: float = 0.0
    overlong_buffer: int = 0
    max_tokens: int = 0
    extra: tuple[tuple[str, float], ...] = ()
    match: str = "normalized"
    math: bool = False

    def __post_init__(self) -> None:
        for name in BUILT_IN:
            _check_weight(f"{name}_weight", getattr(self, f"{name}_weight"))
        check_target(self.target_length)
        check_floor(self.balance_floor)
        check_overlong(self.overlong_weight, self.overlong_buffer, self.max_tokens)
        for pair in self.extra:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ValueError(f"extra: {pair!r}; want a pair (module:function, weight)")
            _check_weight(f"extra, weight of {pair[0]!r}", pair[1])
        names_of([spec for spec, _ in self.extra])
        check_match(self.match, self.math)

    def weights(self) -> dict[str, float]:
        """Name of each component -> its factor in the sum: the four rules, then the user's rewards in their order."""
        rules = {name: getattr(self, f"{name}_weight") for name in BUILT_IN}
        names = names_of([spec for spec, _ in self.extra])
        return rules | {name: weight for name, (_, weight) in zip(names, self.extra, strict=True)}


@dataclass(frozen=True)
class RewardScores:
    """The rewards of one response.

    Attributes:
      format, accuracy: 0.0 or 1.0, before weighting.
      balance: at most 1.0, before weighting; floor and `balance_only_if_correct` already applied.
      overlong: from -1.0 to 0.0, before weighting.
      total: the weighted sum, the r_i of the advantages.
      num_reflections: N_r.
      reflection_tokens: L_r, tokens in all reflections together, tags excluded.
      extra: name of each of the user's rewards -> its value, before weighting.
    """

    format: float
    accuracy: float
    balance: float
    overlong: float
    total: float
    num_reflections: int
    reflection_tokens: int
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def components(self) -> dict[str, float]:
        """Everything that is summed, before weighting; the names are those of `RewardSettings.weights`."""
        return {name: getattr(self, name) for name in BUILT_IN} | dict(self.extra)


def rewards_of(settings: RewardSettings) -> dict[str, Reward]:
    """Name of each component -> the function of a record that computes it, in the order of `settings.weights()`.

    Raises:
      ValueError: a reward of the user's cannot be loaded; see `plugins.load_reward`. Or `settings.math` needs a package
        that is not installed.
    """
    if settings.math:
        require_math()
    return {
        "format": _format,
        "accuracy": functools.partial(_accuracy, settings),
        "balance": functools.partial(_balance, settings),
        "overlong": functools.partial(_overlong, settings),
    } | load_rewards(spec for spec, _ in settings.extra)


def combine(record: RewardRecord, components: Mapping[str, float], settings: RewardSettings) -> RewardScores:
    """The scores of a response from the values of its components.

    Args:
      record: the response.
      components: the value of each function of `rewards_of(settings)`.
      settings: weights and options of the sum.
    """
    weights = settings.weights()
    return RewardScores(
        **{name: components[name] for name in BUILT_IN},
        total=sum(weight * components[name] for name, weight in weights.items()),
        num_reflections=len(record.reflection_tokens),
        reflection_tokens=sum(record.reflection_tokens),
        extra={name: components[name] for name in weights if name not in BUILT_IN},
    )


def score(record: RewardRecord, settings: RewardSettings) -> RewardScores:
    """All rewards of one response, computed in this process. `pool.RewardPool` computes the same in others.

    Paper silent: reflections are counted in responses that break the format too, wherever they stand, nested ones
    included: a reflection is an opening tag whose next tag is its own closing tag. So a reflection that is cut off, or
    that holds another tag, does not count, and no token counts twice.

    Args:
      record: the response.
      settings: weights and options of the sum.

    Raises:
      ValueError: a count of tokens is negative; a reward of the user's cannot be loaded or returned no finite number.
      Exception: whatever a reward of the user's raises.
    """
    components = {name: as_number(reward(record)) for name, reward in rewards_of(settings).items()}
    return combine(record, components, settings)


def _format(record: RewardRecord) -> float:
    return format_reward(record.response)


def _accuracy(settings: RewardSettings, record: RewardRecord) -> float:
    return accuracy_reward(record.response, record.answer, record.options, match=settings.match, math=settings.math)


def _balance(settings: RewardSettings, record: RewardRecord) -> float:
    balance = balance_reward(record.reflection_tokens, settings.target_length, settings.balance_floor)
    return 0.0 if settings.balance_only_if_correct and _accuracy(settings, record) == 0.0 else balance


def _overlong(settings: RewardSettings, record: RewardRecord) -> float:
    return overlong_reward(record.num_tokens, settings.max_tokens, settings.overlong_buffer)


def _check_weight(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: {value!r}; want a finite number of at least 0")
