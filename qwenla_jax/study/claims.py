"""The paper's claims against a study's numbers, judged by one rule and never by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from qwenla_jax.inference.attention_mass import PARTS
from qwenla_jax.study import statistics as st
from qwenla_jax.study.collect import (
    BASE,
    COLD,
    COPY,
    COPY_BLANK,
    COPY_OTHER,
    RAW_COPY,
    RAW_ROUTE,
    ROUTE,
    ROUTE_25,
    ROUTE_75,
    TEXT,
    VISION,
    ZERO,
    Measured,
    Study,
    StudyError,
)
from qwenla_jax.study.statistics import Estimate, Ratio, share

HOLDS, FAILS, UNKNOWN, NOT_JUDGED = "holds", "does not hold", "cannot be told", "not judged"
RULE = (
    "A claim says that a difference is above 0, or below. It holds where the whole 95% interval of the difference lies "
    "on the claim's side of 0, does not hold where the whole interval lies on the other side, and cannot be told where "
    "the interval holds 0. Intervals: paired bootstrap over questions within each seed (overhead: over batches), "
    "pooled over all seeds. p: McNemar's exact test for accuracies, else the bootstrap's, two-sided; not corrected "
    "for the number of claims. Both speak of these trained models on other questions; what another training would give "
    "is told by how many seeds lie on the claim's side."
)
Parts = tuple[Sequence[Ratio], Sequence[Ratio]]  # after, before


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim, judged.

    Attributes:
      number: the claim's; letters where it has several parts.
      claim: what the paper says, in words.
      paper: the paper's figure for it, "" where it gives none.
      measure: what was measured here.
      sign: +1 where the claim is that the difference is above 0, -1 where below.
      unit: "points" of 100 percent, "%" on top of the other, "" for plain numbers.
      result: the difference; nan where it could not be measured.
      seeds: the same in each seed by itself.
      verdict: HOLDS, FAILS, UNKNOWN or NOT_JUDGED.
      reason: why it was not judged, or what to know beside the number.
    """

    number: str
    claim: str
    paper: str
    measure: str
    sign: int
    unit: str
    result: Estimate
    seeds: tuple[float, ...]
    verdict: str
    reason: str = ""

    @property
    def agreeing(self) -> int:
        """Seeds on the claim's side of 0."""
        return sum(self.sign * value > 0 for value in self.seeds)

    def sentence(self) -> str:
        """The verdict in one sentence, with its numbers."""
        if self.verdict == NOT_JUDGED:
            return f"Not judged: {self.reason}."
        number = f"{written(self.result.value, self.unit)} {bounds(self.result, self.unit)}, {p_text(self.result.p)}"
        why = " (the interval holds 0)" if self.verdict == UNKNOWN else ""
        word = self.verdict[0].upper() + self.verdict[1:]
        return f"{word}{why}: {number}; on the claim's side in {self.agreeing} of {len(self.seeds)} seeds."


def decide(result: Estimate, sign: int) -> str:
    """RULE for one difference. An interval that ends at 0 holds 0."""
    if not all(map(math.isfinite, (result.value, result.low, result.high))):
        return NOT_JUDGED
    low, high = sorted((sign * result.low, sign * result.high))
    return HOLDS if low > 0 else FAILS if high < 0 else UNKNOWN


def written(value: float, unit: str) -> str:
    """A difference with its sign, without one where it rounds to zero."""
    if not math.isfinite(value):
        return "-"
    scale, places = (100, 1) if unit in ("points", "%") else (1, 2)
    rounded = round(scale * value, places)
    number = f"{rounded:+.{places}f}" if rounded else f"{0:.{places}f}"
    return number + {"points": " points", "%": "%"}.get(unit, "")


def bounds(result: Estimate, unit: str) -> str:
    """The ends of its interval."""
    scale, form = (100, "+.1f") if unit in ("points", "%") else (1, "+.2f")
    return f"[{scale * result.low:{form}}, {scale * result.high:{form}}]"


def p_text(p: float) -> str:
    """A p value as one writes it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def verdicts(study: Study) -> list[Verdict]:
    """Every claim of the paper that this study can speak to, judged; those whose systems are missing say so."""
    return [*_learning(study), *_length(study), *_looking(study), *_results(study), *_sweep(study), *_overhead(study)]


def _judged(
    number: str,
    claim: str,
    paper: str,
    measure: str,
    sign: int,
    unit: str,
    parts: Callable[[], Parts],
    estimate: Callable[[], Estimate] | None = None,
    reason: str = "",
) -> Verdict:
    try:
        after, before = parts()
        result = estimate() if estimate is not None else st.difference(after, before)
        seeds = tuple(a - b for a, b in zip(st.per_seed(after), st.per_seed(before), strict=True))
    except StudyError as error:
        nothing = Estimate(math.nan, math.nan, math.nan)
        return Verdict(number, claim, paper, measure, sign, unit, nothing, (), NOT_JUDGED, str(error))
    verdict = decide(result, sign)
    if verdict == NOT_JUDGED:
        reason = "too little was counted on one side"
    return Verdict(number, claim, paper, measure, sign, unit, result, seeds, verdict, reason)


def _accuracy(
    study: Study, number: str, claim: str, paper: str, sign: int, after: str, before: str, reason: str = ""
) -> Verdict:
    return _judged(
        number,
        claim,
        paper,
        f"accuracy: {after} less {before}",
        sign,
        "points",
        lambda: ([share(m, "right") for m in study.of(after)], [share(m, "right") for m in study.of(before)]),
        lambda: st.accuracy_difference(study.of(after), study.of(before)),
        reason,
    )


def _number(
    study: Study,
    number: str,
    claim: str,
    paper: str,
    sign: int,
    unit: str,
    measure: str,
    of: Callable[[Measured], Ratio],
    after: str,
    before: str,
) -> Verdict:
    return _judged(
        number,
        claim,
        paper,
        f"{measure}: {after} less {before}",
        sign,
        unit,
        lambda: ([of(m) for m in study.of(after)], [of(m) for m in study.of(before)]),
    )


def _learning(study: Study) -> list[Verdict]:
    count, tokens = (lambda m: share(m, "reflections")), (lambda m: share(m, "reflection_tokens"))
    frequent, shorter = "reflections become frequent over BRPO", "the total length of reflections falls over BRPO"
    return [
        _accuracy(study, "1", "BRPO raises accuracy", "rises (figure 7)", +1, ZERO, COLD),
        _number(
            study, "2a", frequent, "from 1 to several (figure 6)", +1, "", "reflections an answer", count, ZERO, COLD
        ),
        _number(study, "2b", shorter, "falls (figure 6)", -1, "", "reflection tokens an answer", tokens, ZERO, COLD),
    ]


def _length(study: Study) -> list[Verdict]:
    """Hallucination against length, late less early and long less short."""
    result = []
    for letter, name, what in (("a", BASE, "plain answers"), ("b", TEXT, "text-only reflection")):

        def by_place(name: str = name) -> Parts:
            middle = st.middle_token(study, name)
            ones = study.of(name)
            cut = lambda low, high: [st.objects_between(m, low, high) for m in ones]  # noqa: E731
            return cut(middle, math.inf), cut(0, middle)

        def by_length(name: str = name) -> Parts:
            ones = study.of(name)
            middle = float(np.median(np.concatenate([m.numbers["tokens"] for m in ones])))
            chair = [share(m, "invented", "named") for m in ones]
            cut = lambda low, high: [st.answers_between(m, c, low, high) for m, c in zip(ones, chair, strict=True)]  # noqa: E731
            return cut(middle + 1, math.inf), cut(0, middle + 1)

        claim = f"CHAIR_i grows with the length of {what}"
        late = f"{name}, CHAIR_i: objects named behind the middle one less those before"
        long = f"{name}, CHAIR_i: answers longer than the median less the others"
        order = "captions name small objects first, so place is not length alone"
        more = "longer answers are about fuller scenes, so length is not length alone"
        paper = "grows (figure 1)"
        result.append(_judged(f"3{letter}", claim, paper, long, +1, "points", by_length, reason=more))
        result.append(_judged(f"3{letter}'", claim, paper, late, +1, "points", by_place, reason=order))
    return result


def _looking(study: Study) -> list[Verdict]:
    """Attention on visual tokens."""
    result = []
    before, inside = PARTS.index("before"), PARTS.index("in")
    measures = (("share of attention", st.visual_mass, "points"), ("ratio to an even share", st.visual_ratio, ""))
    for letter, (measure, of, unit) in zip("ab", measures, strict=True):

        def decay(of: Callable[..., Ratio] = of) -> Parts:
            ones = study.of(BASE)
            tokens = np.sum([m.attention.positions["tokens"].sum(0) for m in ones], axis=0)
            # The bound of bins that halves the tokens best, so that neither half is a few of the longest answers.
            cut = 1 + int(np.abs(np.cumsum(tokens)[:-1] / tokens.sum() - 0.5).argmin())
            late, early = slice(cut, None), slice(None, cut)
            return [of(m.attention.positions, late) for m in ones], [of(m.attention.positions, early) for m in ones]

        claim = "visual attention decays with length in plain answers"
        words = f"{BASE}, {measure}: later half of the tokens less the earlier"
        result.append(_judged(f"4{letter}", claim, "decays (figure 2)", words, -1, unit, decay))
    for letter, (measure, of, unit) in zip("cd", measures, strict=True):

        def low(of: Callable[..., Ratio] = of) -> Parts:
            ones = study.of(TEXT)
            return [of(m.attention.parts, inside) for m in ones], [of(m.attention.parts, before) for m in ones]

        claim = "text-only reflection does not bring visual attention back"
        words = f"{TEXT}, {measure}: in reflections less before them"
        result.append(_judged(f"4{letter}", claim, "stays low (figure 2)", words, -1, unit, low))
    claims = (
        ("a", "COPY restores visual attention", "restored (figure 9)", COPY, TEXT),
        ("b", "ROUTE restores it", "in part (figure 9)", ROUTE, TEXT),
        ("c", "ROUTE restores it less than COPY", "in part (figure 9)", COPY, ROUTE),
    )
    for letter, claim, paper, after, other in claims:
        for mark, (measure, of, unit) in zip(("", "'"), measures, strict=True):
            inner = lambda m, of=of: of(m.attention.parts, inside)  # noqa: E731
            words = f"{measure} in reflections"
            result.append(_number(study, f"5{letter}{mark}", claim, paper, +1, unit, words, inner, after, other))
    return result


def _results(study: Study) -> list[Verdict]:
    chair = lambda m: share(m, "invented", "named")  # noqa: E731
    fewer = lambda number, claim, paper, after: _number(  # noqa: E731
        study, number, claim, paper, -1, "points", "CHAIR_i", chair, after, TEXT
    )
    detail = lambda m: share(m, "wrong_details", "details")  # noqa: E731
    seen = lambda number, claim, after: _number(  # noqa: E731
        study, number, claim, "not measured", -1, "points", "wrong marks among those told", detail, after, TEXT
    )
    return [
        _accuracy(study, "6a", "COPY is better than text-only reflection", "+1.5 points (MMMU)", +1, COPY, TEXT),
        _accuracy(study, "6b", "ROUTE is better than text-only reflection", "+0.3 points (MMMU)", +1, ROUTE, TEXT),
        _accuracy(study, "6c", "COPY is better than ROUTE", "+1.2 points (MMMU)", +1, COPY, ROUTE),
        _accuracy(study, "6d", "the copy is used: a blank image is worse", "not measured", -1, COPY_BLANK, COPY),
        _accuracy(study, "6e", "the copy is used: another image is worse", "not measured", -1, COPY_OTHER, COPY),
        fewer("7a", "COPY hallucinates less than text-only reflection", "-5.0 points (CHAIR_i)", COPY),
        fewer("7b", "ROUTE hallucinates less than text-only reflection", "-3.1 points (CHAIR_i)", ROUTE),
        seen("7c", "COPY tells details that captions leave out more truly", COPY),
        seen("7d", "ROUTE tells them more truly", ROUTE),
        _accuracy(study, "8", "looking without words is worse than COPY", "-4.2 points (MMMU)", -1, VISION, COPY),
        _accuracy(study, "9a", "COPY without BRPO is worse", "-3.1 points (MMMU)", -1, RAW_COPY, COPY),
        _accuracy(study, "9b", "ROUTE without BRPO is worse", "-2.1 points (MMMU)", -1, RAW_ROUTE, ROUTE),
    ]


def _sweep(study: Study) -> list[Verdict]:
    grows = "accuracy grows with m from 50% to 100%"
    return [
        _accuracy(study, "10a", grows, "50% to 75%: +0.4 points (MMMU)", +1, ROUTE_75, ROUTE),
        _accuracy(study, "10b", grows, "75% to 100%: +0.8 points (MMMU)", +1, COPY, ROUTE_75),
        _accuracy(study, "10c", "m = 25% is worse than text-only", "-3.2 points (MMMU)", -1, ROUTE_25, TEXT),
    ]


def _overhead(study: Study) -> list[Verdict]:
    """Time over that of text-only reflection, by batches of the same questions."""

    def over(name: str, other: str) -> Sequence[Ratio]:
        for seed in study.seeds:
            study.require(name, other)
            sizes = [(len(m.batch_s), m.batch_rows) for m in (seed.systems[name], seed.systems[other])]
            if sizes[0] != sizes[1] or not sizes[0][0]:
                raise StudyError(f"{seed.path}: {name} and {other} were not timed in the same batches")
        pairs = zip(study.of(name), study.of(other), strict=True)
        return [Ratio(a.batch_s, b.batch_s) for a, b in pairs]

    def one(number: str, claim: str, paper: str, after: str, before: str) -> Verdict:
        def parts() -> Parts:
            result = over(after, before)
            return result, [Ratio(r.under, r.under) for r in result]  # less 1: what comes on top

        words = f"seconds an answer: {after} over {before}, less 1"
        noisy = "wall time of batches, compilation left out; the machine's other work is in it"

        def on_top() -> Estimate:
            e = st.ratio(over(after, before), null=1.0)
            return Estimate(e.value - 1, e.low - 1, e.high - 1, e.p)

        return _judged(number, claim, paper, words, +1, "%", parts, on_top, noisy)

    return [
        one("11a", "COPY costs time over text-only reflection", "+27% (table 6)", COPY, TEXT),
        one("11b", "ROUTE costs time over text-only reflection", "+4% (table 6)", ROUTE, TEXT),
        one("11c", "COPY costs more than ROUTE", "+22% (table 6)", COPY, ROUTE),
    ]
