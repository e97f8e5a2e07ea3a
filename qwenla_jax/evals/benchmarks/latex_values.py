"""Values of LaTeX expressions, compared in processes that can be killed.

Reading LaTeX by sympy can take for ever and eat all memory, so nothing here is called outside `same_values`' workers:
these are the reward pool's, which import this module once, have a deadline for each pair and are replaced when it is
over. A pair that times out or crashes counts as not equal, and is counted.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from qwenla_jax.rewards import RewardPool, RewardRecord, RewardSettings
from qwenla_jax.rewards.pool.pool import RewardError
from qwenla_jax.text.answers.algebra import HUGE

DEADLINE_S = 5.0  # a pair; what is not hopeless takes less than a tenth of a second of an idle processor
MAX_LENGTH = 300  # characters; no right answer of MathVision is half as long
_STEP = 512
_ENDS = re.compile(r"\\.|[][(){}]|\.(?![0-9])")  # behind a backslash they are other signs
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_NAMES = ("a", "-a")  # parts of tuples that stay as they are


def require_latex() -> None:
    """Raises ValueError where the library is not installed; it is not imported."""
    if importlib.util.find_spec("latex2sympy2_extended") is None:
        raise ValueError(
            "MathVision compares values of LaTeX by latex2sympy2_extended: pip install 'qwenla_jax[evals]'; "
            "or leave that out: --noalgebra"
        )


def value_reward(record: RewardRecord) -> float:
    """1.0 where a record's response and its answer have one value, or are the same tuple; as a worker asks it."""
    return float(_same(record.response, record.answer))


def _same(got: str, want: str) -> bool:
    got_parts, want_parts = _tuple(got), _tuple(want)
    if (got_parts or got) == (want_parts or want):
        return True
    if got_parts or want_parts:
        return False
    first, second = _value(want), _value(got)
    return first is not None and second is not None and round(first, 2) == round(second, 2)


def _tuple(text: str) -> str | None:
    """A tuple or list with its parts' values to two places; None where it is none or a part has no value."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or text[0] + text[-1] not in ("()", "[]"):
        return None
    result = []
    for part in parts:
        value = None if "infty" in part or part in _NAMES else _value(part)
        if value is None and not ("infty" in part or part in _NAMES):
            return None
        result.append(part if value is None else str(round(value, 2)))
    return text[0] + ",".join(result) + text[-1]


def _value(text: str) -> float | None:
    """The number that a LaTeX expression is, None where it is none."""
    if not 0 < len(text) <= MAX_LENGTH or HUGE.search(text):
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        result: Any = _read(text)
        if getattr(result, "free_symbols", True) or not getattr(result, "is_number", False):
            return None
        return float(result.doit())  # a percentage comes as a product that is not worked out
    except Exception:  # the library's own errors are many, a complex number is a TypeError
        return None


def _read(text: str) -> Any:
    import latex2sympy2_extended  # takes a second; `latex_worker` has done it before

    result: Any = latex2sympy2_extended.latex2sympy(_first(text))
    # Braces around a number are brackets to the official scorer's library, and a set to this one.
    single = "," not in text and getattr(result, "is_FiniteSet", False) and len(result) == 1
    return next(iter(result)) if single else result


def _first(text: str) -> str:
    """The first expression of a text, which is all that the official scorer's library reads.

    Outside of brackets it ends before a bracket that closes none, and before a full stop without a digit behind it;
    most of what else may stand behind an expression is an error to that library.
    """
    depth = 0
    for token in _ENDS.finditer(text):
        if token[0] in _OPENING:
            depth += 1
        elif len(token[0]) == 1 and not depth:
            return text[: token.start()]
        elif token[0] in _CLOSING:
            depth -= 1
    return text


def same_values(pairs: Sequence[tuple[str, str]], workers: int = 1) -> list[bool | None]:
    """Whether the two texts of each pair have one value to two places, so that 1/55 passes for 1/60, as officially.

    None where a pair took more than `DEADLINE_S` or crashed; `workers` processes compare.

    Raises:
      ValueError: the library is not installed.
    """
    if not pairs:
        return []
    require_latex()
    same = "qwenla_jax.evals.benchmarks.latex_worker:same"
    settings = RewardSettings(format=0.0, accuracy=0.0, balance=0.0, extra=((same, 1.0),))
    records = [RewardRecord(str(n), "", want, "", got, (), 0, True) for n, (got, want) in enumerate(pairs)]
    result: list[bool | None] = []
    with RewardPool(settings, workers=workers, deadline_s=DEADLINE_S, step_deadline_s=_STEP * DEADLINE_S) as pool:
        for start in range(0, len(records), _STEP):
            for score in pool.score(records[start : start + _STEP]):
                result.append(None if isinstance(score, RewardError) else bool(score.extra["same"]))
    return result
