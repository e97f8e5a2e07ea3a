"""The accuracy reward."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwenla_jax.config.schema import option
from qwenla_jax.rewards.built_in_reward import BuiltInReward
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.text.answers.algebra import math_matches, require_math
from qwenla_jax.text.answers.match import exact_matches, extract_conclusion, matches

MATCHES = ("normalized", "exact")


@dataclass(frozen=True)
class AccuracyOptions:
    """Options of the accuracy reward. Paper: "by regular expression", of which "exact" is the simplest.

    Paper silent: the weight; 1. "normalized" is our choice. Not in the paper: math.
    """

    accuracy: float = option(1.0, "weight of the accuracy reward", low=0)
    match: str = option(
        "normalized",
        "normalized: conclusions are right in any usual writing of the answer; exact: letter by letter, the paper's",
        choices=MATCHES,
    )
    math: bool = option(
        False, "expressions that are equal by algebra are right too, while training; needs the extra `math`"
    )


def accuracy_reward(
    response: str, answer: str, options: Sequence[str] = (), *, match: str = "normalized", math: bool = False
) -> float:
    """1.0 where the content of the conclusion matches the right answer, else 0.0 (paper, section BRPO).

    Paper silent: a response that breaks the format elsewhere can still be accurate; of several conclusions the last
    complete one counts; without one the reward is 0.

    Args:
      response: the generated text without control tokens; any string.
      answer: the right answer. `text.answers.match` lists the writings in which it is recognised.
      options: the texts of options A, B, C, ... where the question has them.
      match: "normalized" for those writings, "exact" for the answer letter by letter, the paper's form.
      math: whether expressions that are equal by algebra count too (`text.answers.algebra`). That may not terminate, so
        let `pool.RewardPool` compute it.

    Raises:
      ValueError: no such match; math with "exact"; or math is asked for and its library is not installed.
    """
    if match not in MATCHES or not isinstance(math, bool) or (math and match == "exact"):
        raise ValueError(f"match: {match!r} with math {math!r}; want one of {', '.join(MATCHES)}, and math only with "
                         "normalized")  # fmt: skip
    conclusion = extract_conclusion(response)
    if conclusion is None:
        return 0.0
    if match == "exact":
        return float(exact_matches(conclusion, answer))
    return float(matches(conclusion, answer, options) or (math and math_matches(conclusion, answer, options)))


def _value(settings: AccuracyOptions, record: RewardRecord) -> float:
    return accuracy_reward(record.response, record.answer, record.options, match=settings.match, math=settings.math)


def _problems(settings: AccuracyOptions) -> Iterator[str]:
    if settings.math and settings.match == "exact":
        yield "math: exact compares letter by letter; expected match=normalized, or no math"
    if settings.math and importlib.util.find_spec("math_verify") is None:
        yield "math: math-verify is not installed; the extra `math` brings it"


def _prepare(settings: AccuracyOptions) -> None:
    if settings.math:
        require_math()


ACCURACY = BuiltInReward("accuracy", AccuracyOptions, _value, _problems, _prepare)
