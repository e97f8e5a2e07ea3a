"""One self-contained HTML page about a study: verdicts, figures, tables, examples; needs the extra `report`."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenla_jax.study import figures as fg
from qwenla_jax.study.attention_figure import figure_5
from qwenla_jax.study.cases import cases
from qwenla_jax.study.claims import FAILS, HOLDS, NOT_JUDGED, RULE, UNKNOWN, Verdict, bounds, p_text, verdicts, written
from qwenla_jax.study.collect import BASE, Study, StudyError
from qwenla_jax.study.statistics import LEAST
from qwenla_jax.study.tables import TABLES, Table
from qwenla_jax.text.tag_pieces import split_reflections
from qwenla_jax.utils.html import data_uri, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {  # verdict -> its class in the page, its sign, and the words after a count of them
    HOLDS: ("holds", "✓", "hold"),
    FAILS: ("fails", "✗", "do not hold"),
    UNKNOWN: ("unknown", "?", UNKNOWN),
    NOT_JUDGED: ("not-judged", "–", f"were {NOT_JUDGED}"),
}
BANDS = f"Bands are 95% intervals (bootstrap over questions, all seeds); fewer than {LEAST} behind a point: not drawn."


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure of the page: its caption with units, a text for who cannot see it, and "png" where it has an image."""

    name: str
    draw: Callable[[Study], Figure]
    caption: str
    alt: str
    form: str = "svg"


DRAWINGS = (
    Drawing(
        "Figure 1",
        fg.figure_1,
        "Invented objects and recall in captions against generation length, plain and with text-only reflection. "
        "(a) CHAIR_i of the objects that end so many tokens into the answer; (b) CHAIR_i and (c) recall of answers by "
        f"their length. Captions name small objects first, and longer answers are about fuller scenes. {BANDS}",
        "three line charts: CHAIR_i by the object's place, CHAIR_i and recall by the answer's length",
    ),
    Drawing(
        "Figure 2",
        fg.figure_2,
        "Attention on visual tokens against generation length, mean over layers, heads and answers, plain and with "
        "text-only reflection: (a) as a share of all attention, (b) over the share that evenly spread attention would "
        f"pay. {BANDS}",
        "two line charts: attention on visual tokens falls or stays with the token of the answer, base and text-only",
    ),
    Drawing(
        "Figure 5",
        figure_5,
        "Attention over the image when key words are written, mean over layers and heads, for one question: the "
        "original model, text-only reflection, COPY and ROUTE. A square is a visual token; attention on its copies is "
        "added to it. Each column has its own scale. Below each map: its word and its sum. Chosen: the first question "
        "that all four name key words for and COPY answers right.",
        "a grid of heat maps over one scene: rows are systems, columns are key words",
        "png",
    ),
    Drawing(
        "Figure 6",
        fg.figure_6,
        "Reflections in sampled responses over BRPO steps: (a) their total length, (b) their count. Means over "
        "up to 30 bins of steps; thin lines: single seeds.",
        "two line charts over BRPO steps: tokens in reflections and number of reflections a response",
    ),
    Drawing(
        "Figure 7",
        fg.figure_7,
        "Accuracy over BRPO steps: greedy answers to the same held-out questions, others and fewer than table A's, "
        "with Wilson's 95% interval over all seeds' answers, and of the responses sampled in training.",
        "a line chart of accuracy over BRPO steps, held-out and while training",
    ),
    Drawing(
        "Figure 9",
        fg.figure_9,
        "Attention on visual tokens, original and put in, against generation length for text-only reflection, COPY and "
        f"ROUTE: (a) as a share of all attention, (b) over the even share. {BANDS}",
        "two line charts: attention on visual tokens by token of the answer for text-only, COPY and ROUTE",
    ),
    Drawing(
        "Figure m",
        fg.figure_sweep,
        "The m sweep of table 5: (a) accuracy and (b) wall time an answer, over text-only reflection (m = 0), with 95% "
        "intervals (over questions; over batches); the paper's at 7B on MMMU beside it.",
        "two line charts over m: difference in accuracy and added time, here and in the paper",
    ),
)


def write_report(study: Study, path: Path) -> None:
    """Writes the page, whole or not at all. What a study lacks is named in its place.

    Raises:
      NoMatplotlib: the extra `report` is not installed.
    """
    fg.require_matplotlib()
    judged = verdicts(study)
    counts = collections.Counter(verdict.verdict for verdict in judged)
    write_page(
        path,
        "report.html",
        study=study,
        profiled=len(study.seeds[0].systems[study.systems[0]].attention.parts["tokens"]),
        has_base=BASE in study.systems,
        verdicts=[_verdict_row(verdict, study) for verdict in judged],
        counts=[f"{counts[kind]} {words}" for kind, (_, _, words) in MARKS.items() if counts[kind]],
        rule=RULE,
        figures=[_part(study, drawing.name, lambda d=drawing: _figure(d, study)) for drawing in DRAWINGS],
        tables=[_part(study, _title(make), lambda make=make: make(study)) for make in TABLES],
        examples=_part(study, "Examples", lambda: cases(study)),
        split=split_reflections,
    )


def _verdict_row(verdict: Verdict, study: Study) -> dict[str, Any]:
    kind, sign, _ = MARKS[verdict.verdict]
    numbers: list[list[str]] = [[], [], []]  # lines of the cells: difference, p, seeds
    if verdict.verdict != NOT_JUDGED:
        result = verdict.result
        numbers = [
            [written(result.value, verdict.unit), bounds(result, verdict.unit)],
            [p_text(result.p).removeprefix("p ").removeprefix("= ")],
            [f"{verdict.agreeing} of {len(verdict.seeds)}"],
        ]
    reason = _local(verdict.reason, study)
    return {"verdict": verdict, "kind": kind, "sign": sign, "numbers": numbers, "reason": reason}


def _figure(drawing: Drawing, study: Study) -> dict[str, Any]:
    media_type = "image/svg+xml" if drawing.form == "svg" else "image/png"
    return {"drawing": drawing, "uri": data_uri(fg.to_bytes(drawing.draw(study), drawing.form), media_type)}


def _part(study: Study, name: str, make: Callable[[], Any]) -> dict[str, Any]:
    """A part of the page, or what it lacks."""
    try:
        return {"name": name, "content": make(), "missing": ""}
    except StudyError as error:
        return {"name": name, "content": None, "missing": _local(str(error), study)}


def _local(text: str, study: Study) -> str:
    """Paths as one who has the study's folder sees them: from there, not from this machine's root."""
    return text.replace(f"{study.seeds[0].path.parent}{os.sep}", "")


def _title(make: Callable[[Study], Table]) -> str:
    return make.__name__.replace("_", " ").capitalize()
