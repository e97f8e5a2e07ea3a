"""The built-in rewards. A further one is a file in this folder that declares it, and its entry in the list here."""

from dataclasses import dataclass

from qwenla_jax.rewards.accuracy import ACCURACY
from qwenla_jax.rewards.format import FORMAT
from qwenla_jax.rewards.overlong import OVERLONG
from qwenla_jax.rewards.reflection_balance import BALANCE

# Rewards are summed in this order. Sums of floats depend on their order, so that a new one belongs at the end.
BUILT_IN = {reward.name: reward for reward in (FORMAT, ACCURACY, BALANCE, OVERLONG)}


@dataclass(frozen=True)
class BuiltInOptions(*(reward.options for reward in reversed(BUILT_IN.values()))):
    """The options of all built-in rewards, in the order of `BUILT_IN`; a dataclass has the last base's fields first."""
