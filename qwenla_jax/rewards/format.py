"""The format reward."""

from dataclasses import dataclass

from qwenla_jax.config.schema import option
from qwenla_jax.rewards.built_in_reward import BuiltInReward
from qwenla_jax.text.response_format import parse


@dataclass(frozen=True)
class FormatOptions:
    """Options of the format reward. Paper silent: the weight; 1."""

    format: float = option(1.0, "weight of the format reward", low=0)


def format_reward(response: str) -> float:
    """1.0 where the response is in the answer format, else 0.0 (paper, section BRPO).

    Args:
      response: the generated text without control tokens; any string; `text.response_format` has the rules.
    """
    return 1.0 if parse(response).ok else 0.0


FORMAT = BuiltInReward("format", FormatOptions, lambda settings, record: format_reward(record.response))
