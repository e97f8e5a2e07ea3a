"""The accuracy reward."""

from collections.abc import Sequence

from qwenla_jax.text.answers.algebra import math_matches
from qwenla_jax.text.answers.match import exact_matches, extract_conclusion, matches

MATCHES = ("normalized", "exact")


def accuracy_reward(
    response: str, answer: str, options: Sequence[str] = (), *, match: str = "normalized", math: bool = False
) -> float:
    """1.0 where the content of the conclusion matches the right answer, else 0.0 (paper, section BRPO).

    Paper silent: a response that breaks the format elsewhere can still be accurate; of several conclusions the last
    complete one counts; without one the reward is 0.

    Args:
      response: the generated text without control tokens; any string.
      answer: the right answer. `text.answers` lists the writings in which it is recognised.
      options: the texts of options A, B, C, ... where the question has them.
      match: "usual" for those writings, "bare" for the answer letter by letter, the paper's form.
      math: whether expressions that are equal by algebra count too (`text.math_answers`). That can take for ever, so
        let `pool.RewardPool` compute it.

    Raises:
      ValueError: see `check_match`; or math is asked for and its library is not installed.
    """
    check_match(match, math)
    conclusion = extract_conclusion(response)
    if conclusion is None:
        return 0.0
    if match == "exact":
        return float(exact_matches(conclusion, answer))
    return float(matches(conclusion, answer, options) or (math and math_matches(conclusion, answer, options)))


def check_match(match: str, math: bool) -> None:
    """Checks how answers are to be matched.

    Raises:
      ValueError: no such way, or math together with "bare".
    """
    if match not in MATCHES:
        raise ValueError(f"match: {match!r}; want one of {', '.join(MATCHES)}")
    if not isinstance(math, bool):
        raise ValueError(f"math: {math!r}; want True or False")
    if math and match == "exact":
        raise ValueError("math: True with match bare, which compares letter by letter; want match usual, or no math")
