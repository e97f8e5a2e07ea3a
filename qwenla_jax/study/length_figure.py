"""The figures of the length study: accuracy against the reasoning's length, by arm; needs the extra `report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.figures import STYLE, require_matplotlib
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
TITLES = {
    "short": "trained on short answers",
    "long": "trained on all lengths",
    "paper-order": "trained on short answers, in the paper's order",
}
NARROW = 5.4  # inches: a page on a telephone is hardly wider than the figure's text allows
Quotient = tuple[str, str | None, str]  # a measure, what it is divided by, the way of measuring; see `Result.ratio`
ACCURACY: Quotient = ("right", None, CONTINUED)
COLOURS: Quotient = ("right_colours", "colours", FORCED)
INVENTED: Quotient = ("invented", "named", CONTINUED)


def length_figure(study: Study, of: Quotient = ACCURACY, label: str = "right answers (%)") -> Figure:
    """A measure of every arm against N with 95% intervals; a panel a condition.

    Args:
      study: checked results.
      of: the measure.
      label: of the vertical axis, which is in percent.

    Raises:
      NoMatplotlib: the extra `report` is not installed.
      StudyError: nothing was measured.
    """
    matplotlib = require_matplotlib()
    conditions = [name for name in CONDITIONS if any(key[2] == name for key in study.results)]
    if not conditions:
        raise StudyError("there are no results to draw")
    lengths = lengths_of(study)
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(NARROW, 0.9 + 2.3 * len(conditions)), layout="constrained")
        axes = figure.subplots(len(conditions), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        legend = {}
        for axis, condition in zip(axes, conditions, strict=True):
            draw_arms(axis, study, condition, of)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [str(tokens) for tokens in lengths])
            axis.minorticks_off()
            axis.axvspan(CONDITIONS[condition].low, CONDITIONS[condition].high, color="#eeeeee", zorder=0)
            axis.set_title(f"{TITLES[condition]} (grey: trained lengths)")
            axis.set_ylabel(label)
            handles, names = axis.get_legend_handles_labels()
            legend |= dict(zip(names, handles, strict=True))
        axes[-1].set_xlabel("N, tokens of reasoning before the reflection")
        names = [name for name in ARMS if name in legend]
        columns = len(names) if len(names) < 5 else 3
        figure.legend([legend[name] for name in names], names, loc="outside lower center", ncols=columns)
    return figure


def lengths_of(study: Study) -> list[int]:
    """Every N at which anything was measured, in order."""
    return sorted({tokens for result in study.results.values() for _, tokens in result.cells})


def draw_arms(
    axis: Any,
    study: Study,
    condition: str,
    of: Quotient,
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
    measured = {arm: points for arm in ARMS if (points := _points(study, condition, arm, of, working))}
    for number, (arm, points) in enumerate(measured.items()):
        color, marker, dash = LINES[arm]
        # Moved aside by a little, so that intervals do not cover each other.
        x = [tokens * (1 + 0.025 * (number - (len(measured) - 1) / 2)) for tokens in points]
        y = [scale * one.value for one in points.values()]
        ends = [[scale * (one.value - one.low) for one in points.values()]]
        ends.append([scale * (one.high - one.value) for one in points.values()])
        axis.errorbar(x, y, ends, color=color, marker=marker, ls=dash, label=arm, capsize=2, elinewidth=0.8)


def _points(study: Study, condition: str, arm: str, of: Quotient, working: str) -> dict[int, Contrast]:
    """By N; the lengths at which the arm was measured so."""
    over, under, way = of
    points = {}
    for tokens in lengths_of(study):
        try:
            measure = lambda result, n=tokens: result.ratio(working, n, way, over, under)  # noqa: E731
            points[tokens] = study.share(condition, arm, measure)
        except StudyError:
            continue
    return points
