"""The report of the length study of released models, made of its results' files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenla_jax.data.synthetic.length_options import WORKINGS
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.figures import STYLE, WIDE, beside, require_matplotlib
from qwenla_jax.study.length_analysis import Contrast, Measure, Study, right, verdict
from qwenla_jax.study.length_arms import ARMS, BLANK, COPY, OTHER, ROUTE_50, TEXT
from qwenla_jax.study.length_figure import draw_arms
from qwenla_jax.study.length_results import CONTINUED, FORCED
from qwenla_jax.study.released_results import RELEASED, ReleasedResult, read_all_released, studies
from qwenla_jax.utils.atomic_files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = "Right answers against the tokens of reasoning, by arm"
DIFFERENCES = ((COPY, TEXT), (COPY, BLANK), (COPY, OTHER), (BLANK, TEXT), (ROUTE_50, COPY))


def write_released_report(results: Path, path: Path) -> str:
    """Writes the report, and beside it its figure where matplotlib is installed.

    Args:
      results: folder of the results.
      path: of the report.

    Returns:
      its first lines: the verdicts.

    Raises:
      StudyError: there are no results, or one of the analysis's checks fails.
    """
    all_results = read_all_released(results)
    by_model = studies(all_results)
    head = ["# Does re-attention help a released model where its reasoning is long?\n"]
    for model, study in by_model.items():
        of_model = [result for result in all_results if result.model == model]
        hours = sum(result.seconds for result in of_model) / 3600
        size = len(of_model[0].right)
        head.append(
            f"{_judged(model, study, of_model)} {size} questions; measuring took {hours:.2f} h, reasoning aside.\n"
        )
    head.append("In brackets 95% intervals: questions are drawn with replacement, the same draw for all arms.\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [*head, beside(path, lambda: released_figure(by_model), CAPTION)]
    for model, study in by_model.items():
        parts += _tables(model, study)
    parts += [
        "## Answers\n",
        *(f"* {r.model}, {r.working}, N = {r.tokens}, {r.arm}: `{r.answers[0]}`" for r in all_results),
    ]
    write_text(path, "\n".join(parts) + "\n")
    return "\n".join([*head, f"{path}: {len(all_results)} results"])


def _judged(model: str, study: Study, results: Sequence[ReleasedResult]) -> str:
    tokens = max(result.tokens for result in results)
    try:
        one = verdict(study, RELEASED, tokens, learned=(tokens, 0.0))
    except StudyError as error:
        return f"{model}: not judged: {error}."
    return (
        f"{model}: whether COPY helps after {tokens} tokens of reasoning: **{one.verdict}**. {one.reason.capitalize()}."
    )


def _lengths(study: Study) -> list[int]:
    return sorted({tokens for result in study.results.values() for _, tokens in result.cells})


def _logp(working: str, tokens: int) -> Measure:
    return lambda result: result.ratio(working, tokens, FORCED, "logp_answer", "questions")


def _tables(model: str, study: Study) -> Iterator[str]:
    """One table a working: accuracy, log-probability of the right answer, and their differences, by N."""
    lengths = _lengths(study)
    for working in WORKINGS:
        yield f"## {model}, {'its own reasoning' if working == 'chain' else working}\n"
        yield "| | arm | " + " | ".join(f"N = {tokens}" for tokens in lengths) + " |"
        yield "|---" * (len(lengths) + 2) + "|"
        for name, scale, places in (("right answers, %", 100.0, 1), ("log-probability of the answer, nats", 1.0, 3)):

            def of(tokens: int, percent: bool = scale == 100) -> Measure:
                return right(tokens, working) if percent else _logp(working, tokens)  # noqa: B023

            for arm in ARMS:
                shares = [_try(study, (arm,), of(n)) for n in lengths]
                if any(shares):
                    yield _row(name, arm, shares, scale, places, "")
            for after, before in DIFFERENCES:
                both = [_try(study, (after, before), of(n)) for n in lengths]
                if any(both):
                    yield _row(name, f"{after} - {before}", both, scale, places, "+")
        yield ""


def _try(study: Study, arms: tuple[str, ...], of: Measure) -> Contrast | None:
    """A share, or a difference of two arms; None where it was not measured."""
    try:
        return study.weighed([(sign, RELEASED, arm, of) for sign, arm in zip((1.0, -1.0), arms, strict=False)])
    except StudyError:
        return None


def _row(name: str, what: str, cells: Sequence[Contrast | None], scale: float, places: int, sign: str) -> str:
    number = lambda value: f"{scale * value:{sign}.{places}f}"  # noqa: E731
    texts = ["" if c is None or math.isnan(c.value) else f"{number(c.value)} [{number(c.low)}, {number(c.high)}]"
             for c in cells]  # fmt: skip
    return f"| {name} | {what} | " + " | ".join(texts) + " |"


def released_figure(by_model: dict[str, Study]) -> Figure:
    """Accuracy against N, a row a model, a column for its own reasoning and one for filler.

    Raises:
      NoMatplotlib: the extra `report` is not installed.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(WIDE, 0.4 + 2.3 * len(by_model)), layout="constrained")
        axes = figure.subplots(len(by_model), len(WORKINGS), squeeze=False, sharex=True, sharey="row")
        for row, (model, study) in zip(axes, by_model.items(), strict=True):
            lengths = _lengths(study)
            for axis, working in zip(row, WORKINGS, strict=True):
                draw_arms(axis, study, RELEASED, ("right", None, CONTINUED), working)
                axis.set_xscale("symlog", base=2, linthresh=max(1, min((n for n in lengths if n), default=1)))
                axis.set_xticks(lengths, [str(tokens) for tokens in lengths])
                axis.minorticks_off()
                axis.set_title(f"{model}, {'its own reasoning' if working == 'chain' else working}")
            row[0].set_ylabel("right answers (%)")
        for axis in axes[-1]:
            axis.set_xlabel("tokens of reasoning before the insertion")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
