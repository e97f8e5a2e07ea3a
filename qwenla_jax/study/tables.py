"""The paper's tables in miniature, from a study's numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from qwenla_jax.study import statistics as st
from qwenla_jax.study.claims import bounds, p_text, written
from qwenla_jax.study.collect import BASE, COPY, RAW_COPY, RAW_ROUTE, ROUTE, TEXT, VISION, Measured, Study
from qwenla_jax.study.figures import PAPER_SWEEP, SWEEP
from qwenla_jax.text.answers.match import matches
from qwenla_jax.text.response_format import parse
from qwenla_jax.utils.intervals import wilson

# As the paper prints them: MMMU and CHAIR_i; MMMU, tokens and seconds.
PAPER_ABLATION = {
    RAW_COPY: (57.2, 6.4),
    RAW_ROUTE: (57.0, 6.2),
    TEXT: (58.8, 8.7),
    VISION: (56.1, 8.4),
    COPY: (60.3, 3.7),
    ROUTE: (59.1, 5.6),
}
PAPER_OVERHEAD = {
    BASE: ("58.6", "268.5", "8.68"),
    TEXT: ("58.8", "-", "17.52"),
    COPY: ("60.3", "1811.4", "22.33"),
    ROUTE: ("59.1", "1425.8", "18.29"),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, such as "Table 4"; the caption has the units.

    Attributes:
      name, caption: above it.
      heads, rows: its cells.
      names: how many columns, from the left, name the row.
      prose: whether cells are sentences, whose lines are broken.
    """

    name: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    prose: bool = False


def accuracy_table(study: Study) -> Table:
    """Accuracy of every system, over all seeds and by seed."""
    rows = []
    for name in study.systems:
        ones = study.of(name)
        right = [one.numbers["right"] for one in ones]
        each = "; ".join(_percent(wilson(int(r.sum()), len(r))) for r in right)
        form = st.ratio([st.share(one, "well_formed") for one in ones]).value
        rows.append((name, _accuracy(ones), each, _percent((form,))))
    return Table(
        "Table A",
        "Accuracy of greedy answers to fresh scenes, in percent. Over all seeds with the 95% interval of a bootstrap "
        "over questions; by seed with Wilson's; and the share of answers that keep the format.",
        ("system", "accuracy", "by seed", "format"),
        tuple(rows),
    )


def kinds_table(study: Study) -> Table:
    """Accuracy of every system by type of question."""
    kinds = sorted({text["kind"] for text in study.seeds[0].systems[study.systems[0]].texts})
    rows = []
    for name in study.systems:
        ones = study.of(name)
        rows.append((name, *(_percent((st.ratio([_of_kind(one, kind) for one in ones]).value,)) for kind in kinds)))
    asked = [int(sum(_of_kind(seed, kind).under.sum() for seed in study.of(study.systems[0]))) for kind in kinds]
    rows.append(("questions", *map(str, asked)))
    return Table(
        "Table B",
        "Accuracy by type of question, in percent over all seeds, and how many of each type there were.",
        ("system", *(kind.replace("_", " ") for kind in kinds)),
        tuple(rows),
    )


def hallucination_table(study: Study) -> Table:
    """Hallucinated objects in captions (paper, table 2's CHAIR)."""
    rows = []
    for name in study.systems:
        ones = study.of(name)
        sentence = [st.Ratio((one.numbers["invented"] > 0) * 1.0, np.ones(len(one.texts))) for one in ones]
        details = [st.share(one, "wrong_details", "details") for one in ones]
        result = [st.ratio(parts) for parts in (_chair(ones), sentence, [st.recall(one) for one in ones], details)]
        means = (f"{_mean(ones, what):.2f}" for what in ("named", "details"))
        rows.append((name, *(_percent(e) for e in result), *means))
    return Table(
        "Table C",
        "Objects that captions invent, in percent with 95% intervals (bootstrap over questions, all seeds): CHAIR_i of "
        "the named objects, CHAIR_s of the answers, recall of the scenes' objects; wrong ones among the marks that "
        "answers tell, which no caption does; and objects named and marks told an answer.",
        ("system", "CHAIR_i", "CHAIR_s", "recall", "wrong marks", "named", "marks"),
        tuple(rows),
    )


def ablation_table(study: Study) -> Table:
    """Without reinforcement learning, without images in the reflection, without words in it (paper, table 4)."""
    study.require(TEXT, COPY)
    rows = []
    for name, (mmmu, chair) in PAPER_ABLATION.items():
        if name in study.systems:
            ones = study.of(name)
            rows.append((name, _accuracy(ones), _percent(st.ratio(_chair(ones))), f"{mmmu:.1f}", f"{chair:.1f}"))
    return Table(
        "Table 4",
        "Ablation, in percent with 95% intervals (bootstrap over questions, all seeds), beside the paper's at 7B.",
        ("system", "accuracy", "CHAIR_i", "paper: MMMU", "paper: CHAIR_i"),
        tuple(rows),
    )


def sweep_table(study: Study) -> Table:
    """The share m of the visual tokens that is put in (paper, table 5)."""
    study.require(TEXT)
    rows = []
    for (m, name), (_, mmmu, seconds) in zip(SWEEP, PAPER_SWEEP, strict=True):
        if name not in study.systems:
            continue
        ones = study.of(name)
        gain = st.accuracy_difference(ones, study.of(TEXT))
        change = "-" if name == TEXT else f"{written(gain.value, 'points')} {bounds(gain, 'points')}, {p_text(gain.p)}"
        rows.append((f"{m}%", name, _accuracy(ones), change, _milliseconds(ones), f"{mmmu:.1f}", f"{seconds:.2f}"))
    return Table(
        "Table 5",
        "Share m of the visual tokens that stand again before a reflection: accuracy in percent, its difference to "
        "text-only reflection (paired bootstrap, McNemar's p) and milliseconds an answer, beside the paper's at 7B.",
        ("m", "system", "accuracy", "over m = 0", "ms", "paper: MMMU", "paper: s"),
        tuple(rows),
    )


def overhead_table(study: Study) -> Table:
    """What looking again costs (paper, table 6)."""
    study.require(TEXT)
    base, rows = study.of(TEXT), []
    for name, (mmmu, tokens, seconds) in PAPER_OVERHEAD.items():
        if name not in study.systems:
            continue
        ones = study.of(name)
        parts = [st.Ratio(a.batch_s, b.batch_s) for a, b in zip(ones, base, strict=True) if len(a.batch_s)]
        whole = parts and all(len(a.over) == len(a.under) for a in parts)
        over = st.ratio(parts, null=1.0) if whole and name != TEXT else None
        top = "-"
        if over is not None:
            top = f"{100 * (over.value - 1):+.0f}% [{100 * (over.low - 1):+.0f}, {100 * (over.high - 1):+.0f}]"
        counts = [f"{_mean(ones, key):.1f}" for key in ("tokens", "reflection_tokens", "inserted_tokens")]
        rows.append((name, _accuracy(ones), *counts, _milliseconds(ones), top, mmmu, tokens, seconds))
    rows_at_once, heads = base[0].batch_rows, ("paper: MMMU", "paper: tokens", "paper: s")
    return Table(
        "Table 6",
        "Cost of an answer: tokens generated, of these in reflections, slots put in (visual tokens and delimiters), "
        f"and wall time an answer in batches of {rows_at_once}, compilation left out, also over text-only reflection "
        "(95% interval over batches), beside the paper's at 7B.",
        ("system", "accuracy", "tokens", "in reflections", "put in", "ms", "over text-only", *heads),
        tuple(rows),
    )


def reflection_table(study: Study) -> Table:
    """What reflections did to the verdict of the reasoning before them (paper, figure 10 shows single cases)."""
    rows = []
    for name in study.systems:
        ones = study.of(name)
        if not any(one.numbers["reflections"].any() for one in ones):
            continue
        message = [turn for one in ones for turn in turns(one) if turn is not None]
        if message:
            count = lambda before, after, message=message: sum(t == (before, after) for t in message)  # noqa: E731
            cells = [count(True, True), count(False, True), count(True, False), count(False, False)]
            shown = [f"{n} ({100 * n / len(message):.1f}%)" for n in cells]
            rows.append((name, str(len(message)), *shown))
    return Table(
        "Table D",
        "Answers that reflect, by whether the verdict at the end of the reasoning and the conclusion are right: what "
        "the reflection kept, corrected, spoiled and left wrong. All seeds.",
        ("system", "answers", "right, kept", "wrong, corrected", "right, spoiled", "wrong, left"),
        tuple(rows),
    )


def turns(one: Measured) -> list[tuple[bool, bool] | None]:
    """For each answer whether the reasoning's verdict and the conclusion are right; None without a reflection."""
    result: list[tuple[bool, bool] | None] = []
    for text, right in zip(one.texts, one.numbers["right"], strict=True):
        sections = parse(text["response"]).sections
        names = [section.name for section in sections]
        verdict = next((s.text.rpartition(":")[2].strip() for s in sections if s.name == "REASONING"), None)
        if verdict is None or "REFLECTION" not in names:
            result.append(None)
        else:
            result.append((matches(verdict, text["answer"]), bool(right)))
    return result


TABLES: tuple[Callable[[Study], Table], ...] = (
    accuracy_table,
    kinds_table,
    hallucination_table,
    ablation_table,
    sweep_table,
    overhead_table,
    reflection_table,
)


def _of_kind(one: Measured, kind: str) -> st.Ratio:
    here = np.array([text["kind"] == kind for text in one.texts], float)
    return st.Ratio(one.numbers["right"] * here, here)


def _chair(ones: Sequence[Measured]) -> list[st.Ratio]:
    return [st.share(one, "invented", "named") for one in ones]


def _accuracy(ones: Sequence[Measured]) -> str:
    return _percent(st.ratio([st.share(one, "right") for one in ones]))


def _mean(ones: Sequence[Measured], name: str) -> float:
    return st.ratio([st.share(one, name) for one in ones]).value


def _milliseconds(ones: Sequence[Measured]) -> str:
    """Mean wall time an answer over all seeds' full batches."""
    batches = [1000 * one.batch_s / one.batch_rows for one in ones if len(one.batch_s)]
    return f"{np.mean(np.concatenate(batches)):.2f}" if batches else "-"


def _percent(result: Sequence[float]) -> str:
    """A share, with its interval where there is one."""
    value, *ends = result[:3]
    if not math.isfinite(value):
        return "-"
    if not ends or not math.isfinite(ends[0]):
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
