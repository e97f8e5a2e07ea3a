"""The rule rewards of BRPO: they see strings and numbers, never the model."""

from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.balance import balance_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.rewards.total import RewardScores, RewardSettings, score

__all__ = ["RewardScores", "RewardSettings", "accuracy_reward", "balance_reward", "format_reward", "score"]
