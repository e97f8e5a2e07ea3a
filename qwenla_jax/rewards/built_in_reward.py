"""What a built-in reward declares; `built_in` lists them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qwenla_jax.rewards.reward_record import RewardRecord


@dataclass(frozen=True)
class BuiltInReward:
    """One built-in reward: its name, its options, its value and its checks.

    Each function is called with the run's `weights.RewardSettings`: the options are its attributes, and `max_tokens`.

    Attributes:
      name: the reward's name in metrics (`rewards/NAME/mean`), in `RewardScores` and in the settings.
      options: frozen dataclass of `config.schema.option` fields, the keys under `config.rewards`. The field called
        `name` is the reward's weight in the sum. No two rewards may share a key; a reward that reads the options of an
        earlier one inherits from them.
      value: (settings, record) -> the reward before weighting, a finite number.
      problems: settings -> one text "KEY: what is wrong" for each contradiction between settings whose bounds hold.
      prepare: settings -> None; imports what `value` needs, once a process, before any deadline counts. Raises
        ValueError where it is not installed.
    """

    name: str
    options: type
    value: Callable[[Any, RewardRecord], float]
    problems: Callable[[Any], Iterable[str]] = lambda settings: ()
    prepare: Callable[[Any], None] = lambda settings: None
