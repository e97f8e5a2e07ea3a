"""Rewards of BRPO: the paper's three rules and users' own. Their input is text and numbers, never the model."""

from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.rewards.overlong import overlong_reward
from qwenla_jax.rewards.pool.pool import RewardError, RewardPool
from qwenla_jax.rewards.reflection_balance import balance_reward
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardScores, RewardSettings, score

__all__ = [
    "RewardError",
    "RewardPool",
    "RewardRecord",
    "RewardScores",
    "RewardSettings",
    "accuracy_reward",
    "balance_reward",
    "format_reward",
    "overlong_reward",
    "score",
]
