"""The accuracy reward."""

from qwenla_jax.text.answers import extract_conclusion, matches


def accuracy_reward(response: str, answer: str) -> float:
    """1.0 where the content of the conclusion matches the right answer, else 0.0 (paper, section BRPO).

    Paper silent: a response that breaks the format elsewhere can still be accurate; of several conclusions the last
    complete one counts; without one the reward is 0.

    Args:
      response: the generated text without control tokens; any string.
      answer: the right answer. `text.answers` lists the writings in which it is recognised.
    """
    conclusion = extract_conclusion(response)
    return 1.0 if conclusion is not None and matches(conclusion, answer) else 0.0
