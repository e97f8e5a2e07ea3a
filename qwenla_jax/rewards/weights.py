"""All rewards of a response and their weighted sum."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Self

from qwenla_jax.config.schema import ConfigError, build, refuse
from qwenla_jax.rewards.built_in import BUILT_IN, BuiltInOptions
from qwenla_jax.rewards.pool.plugins import Reward, as_number, load_reward, names_of
from qwenla_jax.rewards.reward_record import RewardRecord


@dataclass(frozen=True)
class RewardSettings(BuiltInOptions):
    """How the rewards are summed: the options of each built-in reward, documented in its file, and the following.

    The defaults are the paper's form.

    Attributes:
      max_tokens: the limit, the most tokens of a response.
      extra: the user's own rewards, pairs (`module:function`, weight); they are called with a
        `reward_record.RewardRecord`.

    Raises:
      ValueError: values are out of range or contradict each other; the message names the settings.
    """

    max_tokens: int = 0
    extra: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        try:
            checked = build(BuiltInOptions, _built_in_options(self))
        except ConfigError as error:
            refuse(line.removeprefix("config.") for line in str(error).splitlines())
        for name, value in vars(checked).items():
            object.__setattr__(self, name, value)  # in the options' own types
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens: {self.max_tokens} is negative; it counts the tokens of a response")
        refuse(problem for reward in BUILT_IN.values() for problem in reward.problems(self))
        for pair in self.extra:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ValueError(f"extra: {pair!r}; want a pair (module:function, weight)")
            if not (math.isfinite(pair[1]) and pair[1] >= 0):
                raise ValueError(f"extra, weight of {pair[0]!r}: {pair[1]!r}; want a finite number of at least 0")
        names_of([spec for spec, _ in self.extra])

    @classmethod
    def from_options(cls, options: BuiltInOptions, extra: Sequence[str], max_tokens: int) -> Self:
        """The settings of a run from `config.rewards`; `extra` are texts `module:function` or `module:function=WEIGHT`.

        Raises:
          ConfigError: the built-in rewards' options; one line each. ValueError: `max_tokens` or `extra`.
        """
        pairs = [text.partition("=") for text in extra]
        weighted = tuple((spec, float(weight or 1)) for spec, _, weight in pairs)
        return cls(**_built_in_options(options), max_tokens=max_tokens, extra=weighted)

    def weights(self) -> dict[str, float]:
        """Name of each component -> its factor in the sum: the built-in ones, then the user's in their order."""
        built_in = {name: getattr(self, name) for name in BUILT_IN}
        names = names_of([spec for spec, _ in self.extra])
        return built_in | {name: weight for name, (_, weight) in zip(names, self.extra, strict=True)}


@dataclass(frozen=True)
class RewardScores(make_dataclass("Values", [(name, float) for name in BUILT_IN], frozen=True)):
    """The rewards of one response. Each built-in reward is a field of its name: its value before weighting.

    Attributes:
      total: the weighted sum, the r_i of the advantages.
      num_reflections: N_r.
      reflection_tokens: L_r, tokens in all reflections together, tags excluded.
      extra: name of each of the user's rewards -> its value, before weighting.
    """

    total: float
    num_reflections: int
    reflection_tokens: int
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def components(self) -> dict[str, float]:
        """Everything that is summed, before weighting; the names are those of `RewardSettings.weights`."""
        return {name: getattr(self, name) for name in BUILT_IN} | dict(self.extra)


def rewards_of(settings: RewardSettings, loading: Callable[[str], None] = lambda spec: None) -> dict[str, Reward]:
    """Name of each component -> the function of a record that computes it, in the order of `settings.weights()`.

    Args:
      settings: the built-in rewards' options and the user's rewards.
      loading: called with each `module:function` before it is imported.

    Raises:
      ValueError: a reward of the user's cannot be loaded; see `plugins.load_reward`. Or a built-in one needs a package
        that is not installed.
    """
    rewards: list[Reward] = []
    for reward in BUILT_IN.values():
        reward.prepare(settings)
        rewards.append(functools.partial(reward.value, settings))
    for spec, _ in settings.extra:
        loading(spec)
        rewards.append(load_reward(spec))
    return dict(zip(settings.weights(), rewards, strict=True))


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

    Paper silent: reflections are counted in responses that violate the format too, anywhere, nested ones included: a
    reflection is an opening tag whose next tag is its own closing tag. So a reflection that is cut off, or that holds
    another tag, does not count, and no token counts twice.

    Args:
      record: the response.
      settings: weights and options of the sum.

    Raises:
      ValueError: a count of tokens is negative; a reward of the user's cannot be loaded or returned no finite number.
      Exception: whatever a reward of the user's raises.
    """
    components = {name: as_number(reward(record)) for name, reward in rewards_of(settings).items()}
    return combine(record, components, settings)


def _built_in_options(options: BuiltInOptions) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(BuiltInOptions)}
