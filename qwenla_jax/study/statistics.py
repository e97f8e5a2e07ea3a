"""Numbers of a study with their intervals: ratios of sums over questions, resampled by question within each seed.

Accuracy, CHAIR_i, recall, tokens an answer, attention a token and its ratio to an even share are all one sum over
questions divided by another, so one bootstrap serves them all. Questions are drawn with replacement within each seed
and the same draw serves both sides of a difference, which pairs them. The models stay as they are: an interval says
what other questions would have given, not what other trainings would have; for that the seeds stand side by side.

Paper silent: it gives no intervals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qwenla_jax.study.collect import Curve, Measured, Study
from qwenla_jax.utils.intervals import paired, wilson

DRAWS = 2000
LEAST = 30  # units behind a point of a curve; with fewer it is not drawn


class Estimate(NamedTuple):
    """A number with its 95% interval and the two-sided p of its being the null value; nan where there is none."""

    value: float
    low: float
    high: float
    p: float = math.nan


class Ratio(NamedTuple):
    """Sums by question of one seed: float [Q] or [Q, K]. Its value is `over.sum(0) / under.sum(0)`."""

    over: np.ndarray
    under: np.ndarray


def ratio(parts: Sequence[Ratio], null: float = math.nan) -> Estimate:
    """The ratio of pooled sums over all seeds' questions; `parts` has one column a seed, `p` tests `null`."""
    (value,), drawn = _pooled(parts)
    return _estimate(float(value), drawn[:, 0], null)


def ratios(parts: Sequence[Ratio]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for K columns at once: values, lower and upper ends, float [K] each."""
    values, drawn = _pooled(parts)
    ends = np.full((2, len(values)), np.nan)
    for column, draws in enumerate(drawn.T):
        if np.isfinite(draws).mean() >= 0.95:
            ends[:, column] = np.nanquantile(draws, (0.025, 0.975))
    return values, ends[0], ends[1]


def difference(after: Sequence[Ratio], before: Sequence[Ratio]) -> Estimate:
    """The ratio of `after` less that of `before`, over the same questions in the same order.

    Raises:
      ValueError: different numbers of seeds or questions.
    """
    if [len(a.over) for a in after] != [len(b.over) for b in before]:
        raise ValueError("after, before: other numbers of seeds or questions; expected the same questions")
    (high,), drawn_high = _pooled(after)
    (low,), drawn_low = _pooled(before)
    return _estimate(float(high - low), (drawn_high - drawn_low)[:, 0], null=0.0)


def accuracy_difference(after: Sequence[Measured], before: Sequence[Measured]) -> Estimate:
    """Share of right answers of one system less that of another; p by McNemar's exact test over all seeds."""
    result = difference([share(one, "right") for one in after], [share(one, "right") for one in before])
    right = [np.concatenate([one.numbers["right"] for one in side]) > 0 for side in (before, after)]
    return result._replace(p=paired(*(side.tolist() for side in right)).p_value)


def share(one: Measured, over: str, under: str | None = None) -> Ratio:
    """A number of the answers over another one, or a mean an answer."""
    top = one.numbers[over]
    return Ratio(top, np.ones_like(top) if under is None else one.numbers[under])


def recall(one: Measured) -> Ratio:
    """Objects of the scenes that are named, over all of them."""
    n = one.numbers
    return Ratio(n["named"] - n["invented"], n["named"] - n["invented"] + n["missed"])


def objects_between(one: Measured, first: float, end: float) -> Ratio:
    """CHAIR_i of the objects that end at token `first` or behind it, and before token `end`."""
    here = [[right for token, right in said if first <= token < end] for said in one.objects]
    counts = np.array([(len(said) - sum(said), len(said)) for said in here], float)
    return Ratio(counts[:, 0], counts[:, 1])


def answers_between(one: Measured, of: Ratio, first: float, end: float) -> Ratio:
    """A ratio over the answers of at least `first` and less than `end` tokens."""
    here = (one.numbers["tokens"] >= first) & (one.numbers["tokens"] < end)
    return Ratio(of.over * here, of.under * here)


def visual_mass(sums: Mapping[str, np.ndarray], columns: slice | int | None = None) -> Ratio:
    """Attention on visual tokens a response token, the share of all attention; `sums` a part of `AttentionSums`."""
    visual = sums["original"] + sums["inserted"]
    return _columns(Ratio(visual, sums["tokens"]), columns)


def visual_ratio(sums: Mapping[str, np.ndarray], columns: slice | int | None = None) -> Ratio:
    """The same over what evenly spread attention would pay."""
    visual = sums["original"] + sums["inserted"]
    return _columns(Ratio(visual, sums["even"]), columns)


def stacked(parts: Sequence[Ratio]) -> Ratio:
    """One-column ratios of one seed side by side."""
    return Ratio(np.stack([p.over for p in parts], axis=1), np.stack([p.under for p in parts], axis=1))


def per_seed(parts: Sequence[Ratio]) -> list[float]:
    """The value in every seed by itself; nan where nothing was counted."""
    return [float(p.over.sum() / p.under.sum()) if p.under.sum() else math.nan for p in parts]


def curve_accuracy(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every seed was evaluated at, and (share, low, high) of all seeds' answers there: [K], [K, 3]."""
    steps = sorted(set.intersection(*(set(curve.eval_steps.tolist()) for curve in curves)))
    result = []
    for step in steps:
        at = [int(np.flatnonzero(curve.eval_steps == step)[-1]) for curve in curves]
        right = sum(int(curve.eval_right[i]) for curve, i in zip(curves, at, strict=True))
        result.append(wilson(right, sum(int(curve.eval_size[i]) for curve, i in zip(curves, at, strict=True))))
    return np.array(steps, int), np.array(result, float).reshape(-1, 3)


def middle_token(study: Study, name: str) -> float:
    """The token that halves the objects which a system names: as many end before it as behind it."""
    return float(np.median([token for one in study.of(name) for said in one.objects for token, _ in said]))


def _columns(of: Ratio, columns: slice | int | None) -> Ratio:
    if columns is None:
        return of
    if isinstance(columns, int):
        return Ratio(of.over[:, columns], of.under[:, columns])
    return Ratio(of.over[:, columns].sum(1), of.under[:, columns].sum(1))


def _pooled(parts: Sequence[Ratio]) -> tuple[np.ndarray, np.ndarray]:
    """Values [K] and their resamples [DRAWS, K]."""
    over = under = 0.0
    drawn_over = drawn_under = 0.0
    for index, part in enumerate(parts):
        top, bottom = (np.reshape(x, (len(x), -1)).astype(np.float64) for x in part)
        weights = scene_weights(len(top), index)
        over, under = over + top.sum(0), under + bottom.sum(0)
        drawn_over, drawn_under = drawn_over + weights @ top, drawn_under + weights @ bottom
    assert isinstance(over, np.ndarray) and isinstance(drawn_over, np.ndarray)  # there is a part
    with np.errstate(divide="ignore", invalid="ignore"):
        return over / under, drawn_over / drawn_under


@functools.lru_cache(maxsize=32)  # a pure function of its arguments, and the same one for every number of a seed
def scene_weights(questions: int, index: int) -> np.ndarray:
    """How often each question is drawn: float [DRAWS, Q]."""
    return np.random.default_rng([questions, index]).multinomial(questions, np.ones(questions) / questions, DRAWS) * 1.0


def _estimate(value: float, drawn: np.ndarray, null: float) -> Estimate:
    known = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or len(known) < 0.95 * len(drawn):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, (0.025, 0.975))
    tail = min((known <= null).sum(), (known >= null).sum()) + 1
    p = math.nan if math.isnan(null) else min(1.0, 2 * tail / (len(known) + 1))
    return Estimate(value, float(low), float(high), p)
