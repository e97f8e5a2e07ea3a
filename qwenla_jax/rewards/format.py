"""The format reward."""

from qwenla_jax.text.response_format import parse


def format_reward(response: str) -> float:
    """1.0 where the response is in the answer format, else 0.0 (paper, section BRPO).

    Args:
      response: the generated text without control tokens; any string. `text.sections` says what is strict about it.
    """
    return 1.0 if parse(response).ok else 0.0
