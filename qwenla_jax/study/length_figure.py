"""The first figure of the length study: accuracy against the reasoning's length, by arm; needs the extra `report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.figures import STYLE, WIDE, require_matplotlib
from qwenla_jax.study.length_analysis import Contrast, Study
from qwenla_jax.study.length_arms import (
    ARMS,
    BLANK,
    CONDITIONS,
    COPY,
    OTHER,
    PAUSE,
    ROUTE_25,
    ROUTE_50,
    ROUTE_75,
    SQUEEZED,
    TEXT,
    VISION,
)
from qwenla_jax.study.length_results import CONTINUED, FORCED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, with a marker and a dash of its own for each arm.
LINES = {
    TEXT: ("#D55E00", "s", "--"),
    PAUSE: ("#999999", "v", ":"),
    BLANK: ("#000000", "x", ":"),
    COPY: ("#0072B2", "^", "-"),
    ROUTE_25: ("#009E73", "1", "-."),
    ROUTE_50: ("#009E73", "D", "-."),
    ROUTE_75: ("#009E73", "2", "-."),
    VISION: ("#CC79A7", "P", "-"),
    OTHER: ("#56B4E9", "o", "--"),
    SQUEEZED: ("#E69F00", "*", "--"),
}
PANELS = (  # over, under, way, title
    ("right", None, CONTINUED, "right answers (%)"),
    ("right_colours", "colours", FORCED, "colour words (%)"),
)


def length_figure(study: Study) -> Figure:
    """Accuracy of continued answers, and teacher-forced colour words, against N; a row a condition.

    Raises:
      NoMatplotlib: the extra `report` is not installed.
      StudyError: nothing was measured.
    """
    matplotlib = require_matplotlib()
    conditions = [name for name in CONDITIONS if any(key[2] == name for key in study.results)]
    if not conditions:
        raise StudyError("there are no results to draw")
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(WIDE, 0.4 + 2.3 * len(conditions)), layout="constrained")
        axes = figure.subplots(len(conditions), len(PANELS), squeeze=False, sharex=True)
        for row, condition in zip(axes, conditions, strict=True):
            for axis, (over, under, way, label) in zip(row, PANELS, strict=True):
                draw_arms(axis, study, condition, (over, under, way))
                lengths = sorted({tokens for result in study.results.values() for _, tokens in result.cells})
                axis.set_xscale("log", base=2)
                axis.set_xticks(lengths, [str(tokens) for tokens in lengths])
                axis.minorticks_off()
                low, high = CONDITIONS[condition].low, CONDITIONS[condition].high
                axis.axvspan(low, high, color="#eeeeee", zorder=0)
                axis.set_title(f"stage 4 {condition} (grey: trained lengths)")
                axis.set_ylabel(label)
        for axis in axes[-1]:
            axis.set_xlabel("tokens of reasoning before the reflection")
        figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_arms(
    axis: Any,
    study: Study,
    condition: str,
    of: tuple[str, str | None, str],
    working: str = "chain",
    scale: float = 100,
) -> None:
    """Draws a measure of every arm with its intervals against N.

    Args:
      axis: matplotlib's.
      study, condition, working: what is drawn.
      of: a measure, what it is divided by, and the way of measuring; see `Result.ratio`.
      scale: of the values.
    """
    for number, arm in enumerate(ARMS):
        points = _points(study, condition, arm, of, working)
        if not points:
            continue
        color, marker, dash = LINES[arm]
        # Moved aside by a little, so that intervals do not cover each other.
        x = [tokens * (1 + 0.012 * (number - len(ARMS) / 2)) for tokens in points]
        y = [scale * one.value for one in points.values()]
        ends = [[scale * (one.value - one.low) for one in points.values()]]
        ends.append([scale * (one.high - one.value) for one in points.values()])
        axis.errorbar(x, y, ends, color=color, marker=marker, ls=dash, label=arm, capsize=2, elinewidth=0.8)


def _points(
    study: Study, condition: str, arm: str, of: tuple[str, str | None, str], working: str
) -> dict[int, Contrast]:
    """By N; the lengths at which the arm was measured so."""
    over, under, way = of
    points = {}
    for tokens in sorted({tokens for result in study.results.values() for _, tokens in result.cells}):
        try:
            measure = lambda result, n=tokens: result.ratio(working, n, way, over, under)  # noqa: E731
            points[tokens] = study.share(condition, arm, measure)
        except StudyError:
            continue
    return points
