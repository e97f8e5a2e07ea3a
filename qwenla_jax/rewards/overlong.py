"""The overlong reward: a soft penalty near the limit of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwenla_jax.config.schema import option
from qwenla_jax.rewards.built_in_reward import BuiltInReward
from qwenla_jax.rewards.reward_record import RewardRecord


@dataclass(frozen=True)
class OverlongOptions:
    """Options of the overlong reward. Not in the paper, so its weight is 0."""

    overlong: float = option(0.0, "weight of the penalty for responses that come near the longest length (DAPO)", low=0)
    overlong_buffer: int = option(0, "tokens before the longest length in which that penalty falls from 0 to -1", low=0)


def overlong_reward(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, falling linearly to -1 at max_tokens, and -1 beyond.

    Not in the paper of Qwen-LA; DAPO (arXiv 2503.14476), equation 13.

    Args:
      num_tokens: tokens in the response.
      max_tokens: the equation's L_max, the most tokens that a response may have.
      buffer: the equation's L_cache, how many tokens before the limit the penalty starts; 0 switches it off.

    Raises:
      ValueError: a number of tokens is negative or no whole number, or buffer is above max_tokens.
    """
    for name, value in (("overlong_buffer", buffer), ("max_tokens", max_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: {value!r}; want a whole number of tokens, at least 0")
    if buffer > max_tokens:
        raise ValueError(f"overlong_buffer: {buffer} tokens of max_tokens {max_tokens}; want at most max_tokens")
    if num_tokens < 0:
        raise ValueError(f"num_tokens: {num_tokens} is negative; it counts the tokens of a response")
    if buffer == 0 or num_tokens <= max_tokens - buffer:
        return 0.0
    return max(-1.0, (max_tokens - buffer - num_tokens) / buffer)


def _value(settings: Any, record: RewardRecord) -> float:
    buffer = settings.overlong_buffer if settings.overlong else 0  # without weight the buffer is not checked
    return overlong_reward(record.num_tokens, settings.max_tokens, buffer)


def _problems(settings: Any) -> Iterator[str]:
    weight, buffer, limit = settings.overlong, settings.overlong_buffer, settings.max_tokens
    if (weight and not 0 < buffer <= limit) or (buffer and not limit):
        yield f"overlong_buffer: got {buffer}, expected 1 to config.data.max_response_tokens ({limit})"


OVERLONG = BuiltInReward("overlong", OverlongOptions, _value, _problems)
