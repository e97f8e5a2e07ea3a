"""Differences between arms of the length study with their intervals, and the verdict; docs/study-protocol.md.

The bootstrap has two levels: seeds are drawn with replacement within each base model, and within each drawn seed its
scenes. The same draw serves all arms of a difference, which pairs them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_arms import BLANK, COPY, OTHER, PRIMARY_TOKENS, SHORT, TEXT, TRAINED_TOKENS
from qwenla_jax.study.length_results import CONTINUED, Result
from qwenla_jax.study.statistics import DRAWS, Ratio, scene_weights

HELPS, HELPS_NOT, UNKNOWN = "helps", "does not help", "cannot be told"
LEAST_DIFFERENCE = 0.01  # a whole interval below it: does not help
FLOOR, CEILING = 0.5, 0.97  # of text-only, at N of training and at N of the primary hypothesis
GUESSING = 0.3  # about what guessing reaches; if COPY and text-only are both below it, answers have broken down
Term = tuple[float, Ratio]  # a coefficient and what it weighs
Measure = Callable[[Result], Ratio]
Weighed = tuple[float, str, str, Measure]  # a coefficient, a condition, an arm, and what is measured of it
Models = Sequence[Sequence[Sequence[Term]]]  # base models, of each its seeds, of each the terms


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A sum of weighted ratios, such as the difference of two accuracies.

    Attributes:
      value: the mean over base models of the means over their seeds.
      low, high: the 95% interval of the two-level bootstrap.
      scenes_low, scenes_high: of scenes alone, the models as they are.
      seeds: the value in every seed, by base model.
      spread: standard deviation between seeds within a base model, pooled; nan for a single seed each.
      scenes_spread: that of one seed which its scenes alone explain.
    """

    value: float
    low: float
    high: float
    scenes_low: float
    scenes_high: float
    seeds: tuple[tuple[float, ...], ...]
    spread: float
    scenes_spread: float

    @property
    def every(self) -> tuple[float, ...]:
        """The value in every seed of every base model."""
        return tuple(value for base in self.seeds for value in base)


def contrast(models: Models) -> Contrast:
    """The value of weighted ratios with its intervals.

    Raises:
      ValueError: no base model or seed, or seeds with other terms or numbers of scenes.
    """
    if not models or not all(models) or not all(terms for base in models for terms in base):
        raise ValueError("models: expected at least one base model, each with at least one seed and one term")
    values = [[_value(terms) for terms in base] for base in models]
    both = np.zeros((len(models), DRAWS))
    alone = np.zeros((len(models), DRAWS))
    spreads = []
    for number, base in enumerate(models):
        k = len(base)
        chosen = np.random.default_rng([number, k, 11]).integers(0, k, (DRAWS, k))
        for slot in range(k):
            # Every slot has draws of its own, so that a seed that is drawn twice is not drawn with the same scenes.
            drawn = _drawn(base, number * k + slot)
            both[number] += np.take_along_axis(drawn, chosen[:, slot, None], axis=1)[:, 0] / k
            alone[number] += drawn[:, slot] / k
            spreads.append(float(np.var(drawn[:, slot])))
    within = [np.var(base, ddof=1) for base in values if len(base) > 1]
    ends = [_ends(drawn.mean(0)) for drawn in (both, alone)]
    return Contrast(
        value=float(np.mean([np.mean(base) for base in values])),
        low=ends[0][0],
        high=ends[0][1],
        scenes_low=ends[1][0],
        scenes_high=ends[1][1],
        seeds=tuple(tuple(base) for base in values),
        spread=math.sqrt(np.mean(within)) if within else math.nan,
        scenes_spread=math.sqrt(np.mean(spreads)),
    )


def _value(terms: Sequence[Term]) -> float:
    if not all(part.under.sum() for _, part in terms):
        return math.nan
    return sum(weight * float(part.over.sum() / part.under.sum()) for weight, part in terms)


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    """The 95% interval of resamples; nan where more than one in twenty has no value."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < 0.95 * len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _drawn(base: Sequence[Sequence[Term]], slot: int) -> np.ndarray:
    """Resamples of every seed's value by the same draws of scenes: float [DRAWS, seeds]."""
    sides = [np.stack([side for _, part in seed for side in part], axis=1) for seed in base]  # [scenes, 2 terms]
    columns = np.stack(sides, axis=2).reshape(len(sides[0]), -1)
    sums = np.repeat(columns.sum(0, keepdims=True), DRAWS, axis=0)
    varying = np.ptp(columns, axis=0) > 0  # what is the same for every scene has the same sum in every draw
    sums[:, varying] = scene_weights(len(columns), slot) @ columns[:, varying]
    over_under = sums.reshape(DRAWS, -1, 2, len(base))
    coefficients = np.array([weight for weight, _ in base[0]])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.einsum("t,dts->ds", coefficients, over_under[:, :, 0] / over_under[:, :, 1])


@dataclasses.dataclass(frozen=True)
class Study:
    """Checked results of one size.

    Attributes:
      results: by (base, seed, condition, arm).
    """

    results: Mapping[tuple[str, int, str, str], Result]

    @classmethod
    def of(cls, results: Sequence[Result]) -> Study:
        """Of results as `read_results` gives them."""
        return cls({(r.base, r.seed, r.condition, r.arm): r for r in results})

    def weighed(self, terms: Sequence[Weighed]) -> Contrast:
        """A sum of weighted measures over the base models and seeds that have them.

        Raises:
          StudyError: no seed has one of these arms, or one that has some of them lacks another.
        """
        wanted = {(condition, arm) for _, condition, arm, _ in terms}
        there = {(base, seed) for base, seed, *key in self.results if tuple(key) in wanted}
        if absent := wanted - {(condition, arm) for _, _, condition, arm in self.results}:
            raise StudyError(f"no results of {', '.join(sorted(f'{arm} ({name})' for name, arm in absent))}")
        models: dict[str, list[list[Term]]] = {}
        for base, seed in sorted(there):
            for condition, arm in sorted(wanted):
                if (base, seed, condition, arm) not in self.results:
                    raise StudyError(f"base {base}, seed {seed}, {condition}: no result of {arm}")
            weighted = [(weight, of(self.results[base, seed, name, arm])) for weight, name, arm, of in terms]
            models.setdefault(base, []).append(weighted)
        return contrast(list(models.values()))

    def share(self, condition: str, arm: str, of: Measure) -> Contrast:
        """A measure of one arm."""
        return self.weighed([(1.0, condition, arm, of)])

    def difference(self, condition: str, after: str, before: str, of: Measure) -> Contrast:
        """A measure of one arm less that of another."""
        return self.weighed([(1.0, condition, after, of), (-1.0, condition, before, of)])


def right(tokens: int, working: str = "chain", way: str = CONTINUED) -> Measure:
    """Accuracy at N tokens."""
    return lambda result: result.ratio(working, tokens, way, "right")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The protocol's verdict: HELPS, HELPS_NOT or UNKNOWN, why, and the differences it rests on by their arm."""

    verdict: str
    reason: str
    differences: Mapping[str, Contrast]


def verdict(
    study: Study,
    condition: str = SHORT.name,
    tokens: int = PRIMARY_TOKENS,
    learned: tuple[int, float] = (TRAINED_TOKENS, FLOOR),
) -> Verdict:
    """Whether COPY helps at a length.

    Args:
      study: checked results.
      condition, tokens: which.
      learned: N, and how often text-only has to be right there for the model to have learned the task; with 0 neither
        this nor guessing excludes anything.

    Raises:
      StudyError: an arm that the verdict needs was not measured.
    """
    of = right(tokens)
    differences = {name: study.difference(condition, COPY, name, of) for name in (TEXT, BLANK, OTHER)}
    near, least = learned
    floor = study.share(condition, TEXT, right(near)).value
    ceiling = study.share(condition, TEXT, of).value
    if floor < least:
        return Verdict(UNKNOWN, f"{TEXT} is right in {floor:.0%} at {near} tokens: not learned", differences)
    if ceiling > CEILING:
        return Verdict(UNKNOWN, f"{TEXT} is right in {ceiling:.0%} at {tokens} tokens: nothing to gain", differences)
    if least and max(ceiling, study.share(condition, COPY, of).value) < GUESSING:
        reason = f"{TEXT} and COPY are both right in less than {GUESSING:.0%} at {tokens} tokens: answers break down"
        return Verdict(UNKNOWN, reason, differences)
    failing = []
    for name, one in differences.items():
        if not one.low > 0:
            failing.append(f"the interval of COPY - {name} holds 0 or lies below")
        if not all(value > 0 for value in one.every):
            failing.append(f"COPY - {name} is not positive in every seed")
    if not failing:
        return Verdict(HELPS, "better than text-only, blank and another image, in every seed", differences)
    if differences[TEXT].high < LEAST_DIFFERENCE:
        return Verdict(HELPS_NOT, f"the interval of COPY - {TEXT} lies below {LEAST_DIFFERENCE:.0%}", differences)
    return Verdict(UNKNOWN, "; ".join(failing), differences)
