"""The paper's figures drawn from a study, with intervals; needs the extra `report` (matplotlib).

Colours are those of Okabe and Ito, which the common kinds of colour blindness tell apart, and every line has a marker
and a dash of its own besides. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwenla_jax.study import statistics as st
from qwenla_jax.study.collect import BASE, COPY, ROUTE, ROUTE_25, ROUTE_75, TEXT, Curve, Measured, Study, StudyError
from qwenla_jax.utils.atomic_files import write_text

if TYPE_CHECKING:  # the package does without it
    from matplotlib.figure import Figure

# name: colour, marker, dash, what the legend says
INSERTIONS = {
    BASE: ("#000000", "o", "-", "plain (base)"),
    TEXT: ("#D55E00", "s", "--", "text-only reflection"),
    COPY: ("#0072B2", "^", "-", "COPY"),
    ROUTE: ("#009E73", "D", "-.", "ROUTE 50%"),
}
PAPER = "#777777"
SWEEP = ((0, TEXT), (25, ROUTE_25), (50, ROUTE), (75, ROUTE_75), (100, COPY))
PAPER_SWEEP = ((0, 58.8, 17.52), (25, 55.6, 17.90), (50, 59.1, 18.29), (75, 59.5, 20.31), (100, 60.3, 22.33))
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.8,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "svg.hashsalt": "qwenla_jax",  # the same figure is the same file
    "figure.dpi": 100.0,
}
WIDE = 7.2  # inches, the width of a printed page


class NoMatplotlib(ModuleNotFoundError):
    """Figures were asked for without the package that draws them."""


def require_matplotlib() -> Any:
    """The package. Raises NoMatplotlib, naming the extra, where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise NoMatplotlib("figures need matplotlib: pip install 'qwenla_jax[report]'") from error
    return matplotlib


def to_bytes(figure: Figure, form: str = "svg") -> bytes:
    """The figure as a file, "svg" or "png" (at 200 dots an inch)."""
    matplotlib, buffer = require_matplotlib(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


def beside(report: Path, draw: Callable[[], Figure], caption: str) -> str:
    """Writes accuracy.svg beside a report; its line in Markdown, or how to get it where matplotlib is not installed."""
    file = report.with_name("accuracy.svg")
    try:
        write_text(file, to_bytes(draw()).decode())
    except NoMatplotlib as error:
        return f"No figure: {error}.\n"
    return f"![{caption}]({file.name})\n"


def figure_1(study: Study) -> Figure:
    """CHAIR_i and recall against generation length, plain and with text-only reflection (paper, figure 1).

    Paper silent on what the length of an invented object is; both readings are drawn: the place in the answer of the
    token that ends the object's name, and the length of the whole answer.
    """
    study.require(BASE, TEXT)
    figure, axes = _panels(3)
    for name in (BASE, TEXT):
        ones = study.of(name)
        places = [token for one in ones for said in one.objects for token, _ in said]
        by_place = _bins(places)
        parts = [st.stacked([st.objects_between(one, a, b) for a, b in _pairs(by_place)]) for one in ones]
        _curve(axes[0], name, by_place, parts, 100, np.histogram(places, by_place)[0])
        lengths = np.concatenate([one.numbers["tokens"] for one in ones])
        by_length = _bins(lengths)
        enough = np.histogram(lengths, by_length)[0]
        measures: tuple[Callable[[Measured], st.Ratio], ...] = (
            lambda one: st.share(one, "invented", "named"),
            st.recall,
        )
        for axis, of in zip(axes[1:], measures, strict=True):
            parts = [st.stacked([st.answers_between(one, of(one), a, b) for a, b in _pairs(by_length)]) for one in ones]
            _curve(axis, name, by_length, parts, 100, enough)
    _label(axes[0], "(a) by the object's place", "tokens up to the object", "CHAIR$_i$ (%)")
    _label(axes[1], "(b) by the answer's length", "tokens of the answer", "CHAIR$_i$ (%)")
    _label(axes[2], "(c) by the answer's length", "tokens of the answer", "recall (%)")
    top = max(axes[0].get_ylim()[1], axes[1].get_ylim()[1])
    for axis in axes[:2]:
        axis.set_ylim(0, top)
    _legend(figure, axes[0])
    return figure


def figure_2(study: Study) -> Figure:
    """Attention on visual tokens against generation length, plain and text-only reflection (paper, figure 2)."""
    return _attention(study, (BASE, TEXT))


def figure_9(study: Study) -> Figure:
    """The same for text-only reflection, COPY and ROUTE (paper, figure 9)."""
    return _attention(study, (TEXT, COPY, ROUTE))


def figure_6(study: Study) -> Figure:
    """Total length and count of reflections over BRPO steps (paper, figure 6)."""
    curves = _curves(study)
    figure, axes = _panels(2)
    for axis, name in zip(axes, ("tokens", "count"), strict=True):
        _steps(axis, curves, name, 1, INSERTIONS[COPY][0])
        axis.set_ylim(bottom=0)
    _label(axes[0], "(a) total length of reflections", "BRPO step", "tokens a response")
    _label(axes[1], "(b) count of reflections", "BRPO step", "reflections a response")
    _legend(figure, axes[0])
    return figure


def figure_7(study: Study) -> Figure:
    """Accuracy over BRPO steps: greedy answers to held-out questions, and what is sampled (paper, figure 7).

    Raises:
      StudyError: no accuracy was measured on the way.
    """
    curves = _curves(study)
    steps, result = st.curve_accuracy(curves)
    if len(steps) < 2:
        raise StudyError(
            f"{study.seeds[0].path / 'brpo' / 'metrics.jsonl'}: eval/accuracy stands at {len(steps)} steps common to "
            "all seeds; a curve needs 2 (the pipeline's setting curve_every)"
        )
    figure, (axis,) = _panels(1)
    _steps(axis, curves, "accuracy", 100, PAPER, "sampled in training, mean of seeds")
    value, low, high = 100 * result.T
    ends, label = np.maximum(0, [value - low, high - value]), "greedy on held-out questions"
    axis.errorbar(steps, value, ends, color=INSERTIONS[COPY][0], marker="o", capsize=2.5, label=label, zorder=3)
    _label(axis, "", "BRPO step", "accuracy (%)")
    _legend(figure, axis)
    return figure


def figure_sweep(study: Study) -> Figure:
    """Accuracy and time against m, the share of visual tokens that is put in, over text-only reflection (table 5)."""
    figure, axes = _panels(2)
    there = [(m, name) for m, name in SWEEP if name in study.systems]
    study.require(TEXT, COPY)
    base = study.of(TEXT)
    gains = [st.accuracy_difference(study.of(name), base) for _, name in there]
    times = [
        st.ratio([st.Ratio(a.batch_s, b.batch_s[: len(a.batch_s)]) for a, b in zip(study.of(name), base, strict=True)])
        for _, name in there
    ]
    ms = [m for m, _ in there]
    color = INSERTIONS[COPY][0]
    for axis, result, null in ((axes[0], gains, 0), (axes[1], times, 1)):
        value, low, high = 100 * (np.array([e[:3] for e in result]).T - null)
        errors = np.nan_to_num(np.maximum(0, [value - low, high - value]))
        axis.errorbar(ms, value, errors, color=color, marker="o", capsize=2.5, label="here", zorder=3)
        axis.axhline(0, color="#000000", linewidth=0.8)
        axis.set_xticks([m for m, *_ in PAPER_SWEEP])
    first = PAPER_SWEEP[0]
    for axis, column, of in ((axes[0], 1, lambda a, b: a - b), (axes[1], 2, lambda a, b: 100 * (a / b - 1))):
        drawn = [of(row[column], first[column]) for row in PAPER_SWEEP]
        axis.plot([m for m, *_ in PAPER_SWEEP], drawn, color=PAPER, marker="x", linestyle=":", label="paper (7B, MMMU)")
    name = "m (% of the visual tokens)"
    _label(axes[0], "(a) accuracy over m = 0", name, "difference (points)")
    _label(axes[1], "(b) time an answer over m = 0", name, "on top (%)")
    _legend(figure, axes[0])
    return figure


def _panels(count: int) -> tuple[Figure, Sequence[Any]]:
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(WIDE, 2.75), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
    return figure, list(axes)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _legend(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8, handlelength=3.2
    )


def _bins(values: Sequence[float] | np.ndarray, most: int = 8) -> np.ndarray:
    """Bounds of up to `most` bins between the smallest and the largest value, of whole tokens."""
    low, high = math.floor(min(values, default=0)), math.floor(max(values, default=0)) + 1
    width = max(1, math.ceil((high - low) / most))
    return np.arange(low, high + width, width)


def _pairs(edges: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _curve(
    axis: Any, name: str, edges: np.ndarray, parts: Sequence[st.Ratio], scale: float, counted: np.ndarray
) -> None:
    """A line over the bins' middles with its interval as a band; bins with too little behind them are left out."""
    color, marker, dash, label = INSERTIONS[name]
    value, low, high = (scale * x for x in st.ratios(parts))
    # Whole tokens: the bin from a to b holds a .. b - 1.
    middle = (edges[:-1] + edges[1:] - 1) / 2
    shown = (np.asarray(counted) >= st.LEAST) & np.isfinite(value)
    axis.fill_between(middle[shown], low[shown], high[shown], color=color, alpha=0.18, linewidth=0)
    axis.plot(middle[shown], value[shown], color=color, marker=marker, linestyle=dash, label=label)


def _attention(study: Study, names: Sequence[str]) -> Figure:
    study.require(*names)
    figure, axes = _panels(2)
    for name in names:
        attention_sums = [one.attention for one in study.of(name)]
        edges = attention_sums[0].edges
        if any(not np.array_equal(attention.edges, edges) for attention in attention_sums):
            raise StudyError(f"{name}: the seeds' attention was measured in different bins of positions")
        tokens = np.sum([attention.positions["tokens"].sum(0) for attention in attention_sums], axis=0)
        _curve(axes[0], name, edges, [st.visual_mass(attention.positions) for attention in attention_sums], 100, tokens)
        _curve(axes[1], name, edges, [st.visual_ratio(attention.positions) for attention in attention_sums], 1, tokens)
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(1, color="#000000", linewidth=0.8, linestyle=":")
    x = "token of the answer"
    _label(axes[0], "(a) share of attention on visual tokens", x, "attention (%)")
    _label(axes[1], "(b) the same over an even share", x, "ratio (1 = even)")
    _legend(figure, axes[0])
    return figure


def _curves(study: Study) -> list[Curve]:
    curves = []
    for seed in study.seeds:
        if seed.curve is None:
            raise StudyError(f"{seed.path / 'brpo' / 'metrics.jsonl'}: no such file")
        curves.append(seed.curve)
    return curves


def step_means(curve: Curve, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of a curve over bins of `width` steps: the bins' mean step, and the mean; the last may be shorter."""
    values = getattr(curve, name)
    starts = range(0, len(values), width)
    middle = [float(curve.steps[i : i + width].mean()) for i in starts]
    parts = (values[i : i + width] for i in starts)
    means = [float(np.nanmean(part)) if np.isfinite(part).any() else math.nan for part in parts]
    return np.array(middle), np.array(means)


def _steps(
    axis: Any, curves: Sequence[Curve], name: str, scale: float, color: str, label: str = "mean of seeds"
) -> None:
    """Every seed thin, their mean thick; means over bins of steps."""
    shortest = min(len(curve.steps) for curve in curves)
    width = max(1, math.ceil(shortest / 30))
    drawn = [step_means(curve, name, width) for curve in curves]
    count = min(len(x) for x, _ in drawn)
    if len(curves) > 1:
        for number, (x, y) in enumerate(drawn):
            axis.plot(x, scale * y, color=color, alpha=0.35, linewidth=0.8, label="" if number else "one seed")
    mean = np.mean([y[:count] for _, y in drawn], axis=0)
    label = label if len(curves) > 1 else label.replace("mean of seeds", "one seed")
    axis.plot(drawn[0][0][:count], scale * mean, color=color, label=label)
