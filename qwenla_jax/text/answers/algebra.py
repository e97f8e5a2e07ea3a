r"""Answers that are equal by algebra: `\sqrt{12}` is `2\sqrt{3}`. Not in the paper; by the library math-verify.

The library is made to find something to compare in any text, and its answer depends on which side is which. So it sees
one expression at a time, the right answer first, both inside `$...$`, and only where
- neither of them is a plain number: those have exact values already (`units`);
- neither holds words, which it reads as products of letters ("cat" is "act"), or two numbers with only a space between
  them, of which it takes the sum;
- the conclusion has no relation, sum, integral, limit or letter that the right answer has not: they would let a
  response repeat the question, or chain "1 = 2 = 3";
- neither has dots, colons or a percent sign that the other has not (to it 50% is 0.5 and 50).
Lists are taken apart before. Values have to agree to a millionth of the right one, because the library rounds to six
places: to it 10^-8 pi is 0.

It can take for ever and eat all memory; what is plainly too large is not shown to it, but that is not all. Its own time
limits work by a signal and only in a main thread, so they are off: let a process run it that can be killed, as
`rewards.pool.pool.RewardPool` does.
"""

import functools
import importlib
import logging
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from qwenla_jax.text.answers.lists import parts
from qwenla_jax.text.answers.match import is_letter, option_text, right_option, same
from qwenla_jax.text.answers.normalize import plain
from qwenla_jax.text.answers.units import same_unit, split_unit, value

_MAX_LENGTH = 200
_MAX_DEPTH = 24  # of brackets; the time to parse grows fast with it
_AGREEMENT = 1e-6
_PLAIN_MATH = (
    (re.compile(r"√ ?([0-9]+|[A-Za-z]\b)|√ ?\(([^()]*)\)|\bsqrt ?\(([^()]*)\)"), r"\\sqrt{\1\2\3}"),
    (re.compile(r"π|(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"[*×·]"), r"\\cdot "),
    (re.compile(r"²"), "^2"),
    (re.compile(r"³"), "^3"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    # The library reads 2^{12} 13 as 2^{12} times 1 times 3, and (2)13 as 15.
    (re.compile(r"(\^ ?\{[^{}]*\}|\\sqrt ?\{[^{}]*\}|\)) ?(?=[0-9])"), r"\1 \\cdot "),
)
_EXPRESSION = re.compile(r"[0-9]|\\[A-Za-z]")
_ENVIRONMENT = re.compile(r"\\(?:begin|end) ?\{[bpv]?matrix\}")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_COMMANDS = frozenset(
    "frac sqrt pi times cdot div pm mp infty cup cap mid vert circ % { } | le ge leq geq lt gt in overline vec "
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd lcm "
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi omega Delta Omega "
    "int iint oint sum prod lim binom det".split()
)
_WORD = re.compile(r"[^\W\d_]{3,}|\b(?:or|is|no|not)\b|[^\x00-\x7f°∞∪∩≤≥]")
_FUNCTION = re.compile(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc|log|ln|exp)(?![A-Za-z])")
# Two numbers side by side, a number that it is not clear where it ends, and what the library drops or stumbles over.
_REFUSED = re.compile(
    r"(?<!_)[0-9] +[0-9]|(?<!_\{[0-9]\})(?<!_\{[0-9]{2}\})(?<=\}) ?[0-9]{2}|\\sqrt ?[0-9]{2}|\\frac ?[0-9]{3}"
    r"|\.[0-9]*\.|[$?@#&:;~]"
)
# Numbers too long to write down: 10^{10^{10}}, 2^{99999}, (99!)!. Not all of them: the rest is the deadline's work.
HUGE = re.compile(r"\^ ?\{?[-+]? ?[0-9]{5}|\^ ?\{?[-+]? ?[0-9]+ ?\^|\^ ?\{[^{}]*[0-9)] ?[\^!]|[0-9]{4} ?!|[)}!\]] ?!")
_RELATION = re.compile(r"[<>=≤≥]|\\(?:le|ge|leq|geq|lt|gt|in)(?![A-Za-z])")
_OF_THE_QUESTION = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|binom|det|begin)(?![A-Za-z])")
_COUNTED = re.compile(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])|\\?%|=")


def require_math() -> None:
    """Imports the library, which takes a second; to be called before forking. Raises ValueError without it."""
    _library()


def math_matches(conclusion: str, answer: str, options: Sequence[str] = ()) -> bool:
    """Whether a conclusion and the right answer are expressions, or lists of expressions, that are equal by algebra.

    For conclusions that `match.matches` rejects; it does not compare letters of options, yes and no, words and plain
    numbers. Can take for ever; see the module. Of `options`, texts as there, a conclusion may equal only the right one.

    Raises:
      ValueError: the library math-verify is not installed.
    """
    require_math()
    got, want = plain(conclusion), plain(answer)
    if not got or not want or is_letter(got, options):
        return False
    if options and (index := right_option(want, options)) is not None:
        texts = [option_text(number, options) for number in range(len(options))]
        # The right one first: most conclusions are not it, and need no look at the others.
        return same(got, texts[index], _verified) and not any(
            same(got, text, _verified) for number, text in enumerate(texts) if number != index
        )
    return same(got, want, _verified)


def _verified(got: str, want: str) -> bool:
    """Whether the library is to be asked about two expressions, and says that they are equal."""
    (got, got_unit), (want, want_unit) = split_unit(got), split_unit(want, glued=False)
    if not same_unit(got_unit, want_unit) or value(got) is not None and value(want) is not None:
        return False
    got, want = _latex(got), _latex(want)
    if not (_is_expression(got) and _is_expression(want)) or parts(want):
        return False
    if parts(got) and not _RELATION.search(want):
        return False  # but (2, 3) may be said for 2 < x < 3
    if _RELATION.search(got) and not _RELATION.search(want):
        return False
    if not set(_OF_THE_QUESTION.findall(got)) <= set(_OF_THE_QUESTION.findall(want)):
        return False
    if sorted(_COUNTED.findall(got)) != sorted(_COUNTED.findall(want)):
        return False
    library = _library()
    first, second = _parse(library, want), _parse(library, got)
    if first is None or second is None or not second.free_symbols <= first.free_symbols:
        return False
    return library.verify(first, second, timeout_seconds=None) and _close(second, first)


def _latex(text: str) -> str:
    for pattern, latex in _PLAIN_MATH:
        text = pattern.sub(latex, text) if len(text) <= _MAX_LENGTH else text
    return text.strip()


def _is_expression(text: str) -> bool:
    if not 0 < len(text) <= _MAX_LENGTH or not _EXPRESSION.search(text):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    # Rows of a matrix and what separates its columns are fine there, and only there.
    rest = re.sub(r"\\\\|&", " , ", _ENVIRONMENT.sub(" ", text)) if _ENVIRONMENT.search(text) else text
    if deepest > _MAX_DEPTH or _REFUSED.search(rest) or HUGE.search(text):
        return False
    if not _COMMANDS.issuperset(_COMMAND.findall(rest)):
        return False
    return not _WORD.search(_FUNCTION.sub(" ", _COMMAND.sub(" ", rest)))


def _parse(library: ModuleType, text: str) -> Any | None:
    """The expression that the whole text is; None where it is none."""
    result = library.parse(
        f"${text}$",
        [library.LatexExtractionConfig(boxed_match_priority=-1)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return result[0] if len(result) == 1 and hasattr(result[0], "free_symbols") else None


def _close(got: Any, want: Any) -> bool:
    """Whether two numbers agree to a millionth of the second; True where one of them is no number."""
    if not (getattr(got, "is_number", False) and getattr(want, "is_number", False)):
        return True
    try:
        first, second = got.evalf(30), want.evalf(30)
        return bool(first == second or abs(first - second) <= _AGREEMENT * abs(second))
    except Exception:  # infinities and what the library calls a number but cannot work out
        return False


@functools.cache
def _library() -> ModuleType:
    try:
        library = importlib.import_module("math_verify")
    except ModuleNotFoundError as error:
        raise ValueError(
            "math: True needs the package math-verify: pip install 'qwenla_jax[math]'; or switch it off (math: False)"
        ) from error
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns that its time limits are off, which they should be
    return library
