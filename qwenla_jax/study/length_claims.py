"""The hypotheses of docs/study-protocol.md as differences between arms, and what the results say about each."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_analysis import Contrast, Measure, Study, Weighed, right
from qwenla_jax.study.length_arms import (
    BLANK,
    COPY,
    LONG,
    OTHER,
    PAPER,
    PAUSE,
    PRIMARY_TOKENS,
    ROUTE_25,
    ROUTE_50,
    SHORT,
    SQUEEZED,
    TEXT,
    TRAINED_TOKENS,
    VISION,
)
from qwenla_jax.study.length_results import CONTINUED, FORCED, FREE, Result
from qwenla_jax.study.statistics import Ratio
from qwenla_jax.study.tables import Table

AGREES, OPPOSITE, OPEN = "as stated", "the opposite", "cannot be told"
HEADS = ("difference", "stated", "points [95%]", "by seed", "sd (scenes)", "result")
CONTROLS = (TEXT, BLANK, OTHER)
# Shares that CHAIR_i and recall are made of, and marks: words, counted, out of which.
TOLD = (
    ("CHAIR_i", "invented", "named"),
    ("left out", "missed", "objects"),
    ("wrong marks", "wrong_details", "details"),
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A row of a claim.

    Attributes:
      words: what is compared.
      terms: the arms' measures with their coefficients; none where the study has no such arm.
      stated: 1 where the claim says above 0, -1 below 0, 0 where it says neither.
    """

    words: str
    terms: Sequence[Weighed]
    stated: int = 0


def _colours(result: Result) -> Ratio:
    """Colour words that are the likeliest token, at N of the primary hypothesis."""
    return result.ratio("chain", PRIMARY_TOKENS, FORCED, "right_colours", "colours")


def _told(over: str, under: str, tokens: int = PRIMARY_TOKENS) -> Measure:
    """A share of what continued answers tell after the look."""
    return lambda result: result.ratio("chain", tokens, CONTINUED, over, under)


def _less(after: str, before: str, of: Measure, condition: str = SHORT.name) -> list[Weighed]:
    return [(1.0, condition, after, of), (-1.0, condition, before, of)]


def _telling(words: str, over: str, under: str) -> tuple[Difference, ...]:
    """Of one of `TOLD`: COPY less its controls, and at a trained length less text-only."""
    far, near = _told(over, under), _told(over, under, TRAINED_TOKENS)
    rows = [Difference(f"COPY - {name}, {words}", _less(COPY, name, far)) for name in CONTROLS]
    return (*rows, Difference(f"COPY - {TEXT}, {words}, N = {TRAINED_TOKENS}", _less(COPY, TEXT, near)))


def _negative(terms: Sequence[Weighed]) -> list[Weighed]:
    return [(-weight, condition, arm, of) for weight, condition, arm, of in terms]


def claims() -> tuple[tuple[str, str, tuple[Difference, ...]], ...]:
    """Each hypothesis as (number, statement, differences), and at the end what stands beside them."""
    far, near, free = right(PRIMARY_TOKENS), right(TRAINED_TOKENS), right(PRIMARY_TOKENS, way=FREE)
    filler, against = right(PRIMARY_TOKENS, "filler"), f"COPY - {TEXT}"
    gain = _less(COPY, TEXT, far)
    paper = _less(COPY, TEXT, far, PAPER.name)

    def helps(condition: str) -> tuple[Difference, ...]:
        rows = [Difference(f"COPY - {name}", _less(COPY, name, far, condition), 1) for name in CONTROLS]
        return (*rows, Difference(f"{against}, filler (control)", _less(COPY, TEXT, filler, condition)))

    def half(name: str) -> list[Weighed]:
        """Below 0 where a control gains less than half of what COPY gains."""
        return [(1.0, SHORT.name, name, far), (-0.5, SHORT.name, COPY, far), (-0.5, SHORT.name, TEXT, far)]

    return (
        ("H1 (primary)", "Beyond the trained length looking again helps; trained on short answers.", helps(SHORT.name)),
        (
            "H2",
            "Within the trained length there is less to gain.",
            (
                Difference(
                    f"{against}, less that at N = {TRAINED_TOKENS}", gain + _negative(_less(COPY, TEXT, near)), 1
                ),
                Difference(f"{against}, N = {TRAINED_TOKENS}", _less(COPY, TEXT, near)),
            ),
        ),
        ("H3", "Something remains once training covers the length; trained on all lengths.", helps(LONG.name)),
        (
            "H4",
            "What helps is the image, not the added tokens: each control gains less than half of what COPY gains.",
            (
                *(Difference(f"{name} - {TEXT}, less half of COPY's", half(name), -1) for name in (BLANK, PAUSE)),
                *(Difference(f"{name} - {TEXT}", _less(name, TEXT, far)) for name in (BLANK, PAUSE)),
            ),
        ),
        (
            "H5",
            "Distance is part of the cause: squeezed positions help text-only (teacher-forced colour words).",
            (Difference(f"squeezed - {TEXT}", _less(SQUEEZED, TEXT, _colours), 1),),
        ),
        (
            "H6",
            "Half of the visual tokens are enough, a quarter is not. How far half may lie below was not stated.",
            (
                Difference(f"{ROUTE_50} - COPY", _less(ROUTE_50, COPY, far)),
                Difference(f"{ROUTE_25} - COPY", _less(ROUTE_25, COPY, far), -1),
            ),
        ),
        (
            "H7",
            "It matters that the answer comes after the look.",
            (
                Difference(f"{against}, less that in the paper's order", gain + _negative(paper), 1),
                Difference(f"{against}, the paper's order", paper),
            ),
        ),
        (
            "H8",
            "Words in the reflection add something to the look.",
            (Difference(f"COPY - {VISION}", _less(COPY, VISION, far), 1),),
        ),
        (
            "H9",
            "BRPO learns to look where it pays.",
            (
                Difference("BRPO with COPY - text-only BRPO", (), 1),
                Difference(f"BRPO: reflections an answer, less those at N = {TRAINED_TOKENS}", (), 1),
            ),
        ),
        (
            "Told after the look",
            "What continued answers tell: objects that are not there, objects left out, and wrong marks.",
            tuple(row for words, over, under in TOLD for row in _telling(words, over, under)),
        ),
        (
            "Beside them",
            "The same differences otherwise measured.",
            (
                Difference(f"{against}, free answers", _less(COPY, TEXT, free)),
                Difference(f"{against}, colour words", _less(COPY, TEXT, _colours)),
                Difference(f"COPY - {OTHER}, colour words", _less(COPY, OTHER, _colours)),
            ),
        ),
    )


def claim_tables(study: Study) -> Iterator[Table]:
    """A table for each hypothesis, with its controls. What cannot be judged has its reason in the place of a result."""
    for number, statement, differences in claims():
        rows = tuple(_row(study, one) for one in differences)
        yield Table(number, statement, HEADS, rows, prose=True)


def _row(study: Study, one: Difference) -> tuple[str, ...]:
    stated = {1: "above 0", -1: "below 0", 0: "-"}[one.stated]
    try:
        if not one.terms:
            raise StudyError("the study has no such arm")
        result = study.weighed(one.terms)
    except StudyError as error:
        return one.words, stated, "", "", "", f"not judged: {reason(error, study)}"
    if math.isnan(result.value):
        return one.words, stated, "", "", "", "not judged: nothing was counted"
    bases = sorted({base for base, _, condition, arm in study.results if _needs(one, condition, arm)})
    seeds = (", ".join(map(points, values)) for values in result.seeds)
    by_seed = "; ".join(f"{base}: {values}" for base, values in zip(bases, seeds, strict=True))
    interval = f"{points(result.value)} [{points(result.low)}, {points(result.high)}]"
    spread = "-" if math.isnan(result.spread) else f"{100 * result.spread:.1f}"
    return (
        one.words,
        stated,
        interval,
        by_seed,
        f"{spread} ({100 * result.scenes_spread:.1f})",
        reading(result, one.stated),
    )


def _needs(one: Difference, condition: str, arm: str) -> bool:
    return any((condition, arm) == (name, of) for _, name, of, _ in one.terms)


def points(value: float) -> str:
    """A difference of shares in points of 100 percent."""
    return f"{100 * value:+.1f}"


def reading(result: Contrast, stated: int) -> str:
    """What a difference says about a claim.

    Args:
      result: the difference.
      stated: its sign in the claim; 0 where it has none.

    Returns:
      AGREES or OPPOSITE where the 95% interval and every seed lie on one side of 0, else OPEN; "-" without a claim.
    """
    if not stated:
        return "-"
    for sign, words in ((stated, AGREES), (-stated, OPPOSITE)):
        if all(sign * value > 0 for value in (result.low, result.high, *result.every)):
            return words
    return OPEN


def reason(error: StudyError, study: Study) -> str:
    """Why something was not measured; files by their name, not by where they lie."""
    text = str(error)
    for folder in {result.path.parent for result in study.results.values()}:
        text = text.replace(f"{folder}{os.sep}", "")
    return text
