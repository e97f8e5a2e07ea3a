"""What a scorer hands back: figures with their intervals, counts, remarks; as JSON and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Self

from qwenla_jax.utils.intervals import Interval, wilson


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of a benchmark, on the benchmark's own scale (percent, or points).

    Attributes:
      value: the number; nan where nothing was counted.
      low, high: ends of the 95% interval; None where the number is no proportion.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of_share(cls, share: Interval) -> Self:
        """A proportion, in percent."""
        return cls(100 * share.share, 100 * share.low, 100 * share.high)

    @classmethod
    def of_counts(cls, right: int, total: int) -> Self:
        """`right` of `total` in percent with Wilson's interval."""
        return cls.of_share(wilson(right, total))

    def to_json(self) -> dict[str, float | None]:
        """Numbers, nan as null."""
        value = None if math.isnan(self.value) else self.value
        return {"value": value} if self.low is None else {"value": value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.low is None else f"  [{self.low:.2f}, {self.high:.2f}]")


def ratio_figure(parts: Sequence[tuple[float, float]]) -> Figure:
    """A ratio of two sums over independent items in percent, with the ratio estimator's normal 95% interval.

    Args:
      parts: numerator and denominator of each item. The items are what is drawn, so that several mentions of one
        caption do not count as several draws.
    """
    above, below = sum(part[0] for part in parts), sum(part[1] for part in parts)
    if not below:
        return Figure(math.nan, 0.0, 100.0)
    ratio, many = above / below, len(parts)
    if many < 2:
        return Figure(100 * ratio, 0.0, 100.0)
    spread = sum((up - ratio * down) ** 2 for up, down in parts) * many / (many - 1)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(spread) / below
    return Figure(100 * ratio, 100 * max(0.0, ratio - half), 100 * min(1.0, ratio + half))


@dataclasses.dataclass(frozen=True)
class Result:
    """The score of one prediction file.

    Attributes:
      task: name of the benchmark's task.
      figures: the benchmark's numbers by name, the one that is quoted first.
      counts: what was counted, by name.
      notes: what a reader has to know: which text was scored, which rule or table was used.
      rows: what became of each answer, for whoever wants to look.
    """

    task: str
    figures: dict[str, Figure]
    counts: dict[str, int]
    notes: dict[str, str]
    rows: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, for `json.dumps`."""
        figures = {name: figure.to_json() for name, figure in self.figures.items()}
        return {"task": self.task, "figures": figures, "counts": self.counts, "notes": self.notes}

    def table(self) -> str:
        """Everything but the rows, to be read; half a surrogate pair, which no file can hold, as its escape."""
        rows = [*self.figures.items(), *self.counts.items(), *self.notes.items()]
        wide = max((len(name) for name, _ in rows), default=0) + 2
        lines = [self.task, *(f"  {name:<{wide}}{value!s}" for name, value in rows)]
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")
