"""The report of the length study, made of its results' files alone: Markdown, every number with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenla_jax.data.synthetic.length_options import WORKINGS
from qwenla_jax.data.synthetic.length_questions import LENGTH_KINDS
from qwenla_jax.inference.attention_mass import PARTS
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.figures import beside
from qwenla_jax.study.length_analysis import Contrast, Measure, Study, Weighed, right, verdict
from qwenla_jax.study.length_arms import (
    ARMS,
    BLANK,
    CONDITIONS,
    COPY,
    LONG,
    OTHER,
    PAPER,
    PAUSE,
    PRIMARY_TOKENS,
    ROUTE_25,
    ROUTE_50,
    SHORT,
    SQUEEZED,
    TEXT,
    TRAINED_TOKENS,
    VISION,
)
from qwenla_jax.study.length_figure import length_figure
from qwenla_jax.study.length_results import CONTINUED, FORCED, FREE, Result, read_results
from qwenla_jax.study.statistics import Ratio
from qwenla_jax.utils.atomic_files import write_text

CAPTION = "Right answers and colour words against the tokens of reasoning, by arm"


def write_length_report(results: Path, path: Path) -> str:
    """Writes the report, and beside it its figure where matplotlib is installed.

    Args:
      results: folder of the results.
      path: of the report.

    Returns:
      its first lines: the verdict.

    Raises:
      StudyError: results are missing, or one of the analysis's checks fails.
    """
    all_results = read_results(results)
    study = Study.of(all_results)
    head = list(_head(study, all_results))
    parts = [
        *head,
        beside(path, lambda: length_figure(study), CAPTION),
        *_hypotheses(study),
        *_tables(study),
        *_answers(all_results),
    ]
    write_text(path, "\n".join(parts) + "\n")
    return "\n".join([*head, f"{path}: {len(all_results)} results"])


def _head(study: Study, results: Sequence[Result]) -> Iterator[str]:
    bases = sorted({result.base for result in results})
    seeds = {base: len({result.seed for result in results if result.base == base}) for base in bases}
    try:
        one = verdict(study)
        what = f"at {PRIMARY_TOKENS} tokens of reasoning, trained on short answers"
        judged = f"Whether COPY helps {what}: **{one.verdict}**. {one.reason[0].upper()}{one.reason[1:]}."
    except StudyError as error:
        judged = f"Not judged: {error}."
    if max(seeds.values()) < 3:
        judged += " Provisional: fewer than three seeds."
    hours = sum(sum(result.seconds.values()) for result in results if ARMS[result.arm].trained) / 3600
    hours += sum(result.seconds["measuring"] for result in results if not ARMS[result.arm].trained) / 3600
    yield "# Does looking again pay where an answer is long?\n"
    yield judged + "\n"
    models = ", ".join(f"{name}: {count} seed(s)" for name, count in seeds.items())
    yield f"Base models {models}. Stage 4 and measuring took {hours:.2f} h, base models aside."
    yield "Points of 100 percent, with 95% intervals of the two-level bootstrap (seeds, scenes); behind it the value in"
    yield "every seed, the standard deviation between seeds, and that of one seed which its scenes alone explain.\n"


def text_of(one: Contrast, scale: float = 100.0, places: int = 1) -> str:
    """A difference with its interval, its seeds and their spread."""
    number = lambda value: f"{scale * value:+.{places}f}"  # noqa: E731
    seeds = ", ".join(number(value) for value in one.every)
    spread = "-" if math.isnan(one.spread) else f"{scale * one.spread:.{places}f}"
    scenes = f"{scale * one.scenes_spread:.{places}f}"
    return f"{number(one.value)} [{number(one.low)}, {number(one.high)}] (seeds {seeds}; sd {spread}, scenes {scenes})"


def _colours(result: Result) -> Ratio:
    """Colour words that are the likeliest token, at N of the primary hypothesis."""
    return result.ratio("chain", PRIMARY_TOKENS, FORCED, "right_colours", "colours")


def _hypotheses(study: Study) -> Iterator[str]:
    far, near, free = right(PRIMARY_TOKENS), right(TRAINED_TOKENS), right(PRIMARY_TOKENS, way=FREE)
    filler = right(PRIMARY_TOKENS, "filler")
    short, plus, minus = SHORT.name, 1.0, -1.0

    def less(after: str, before: str, of: Measure, condition: str = short) -> list[Weighed]:
        return [(plus, condition, after, of), (minus, condition, before, of)]

    def half(name: str) -> list[Weighed]:
        """Below 0 where a control gains less than half of what COPY gains."""
        return [(plus, short, name, far), (-0.5, short, COPY, far), (-0.5, short, TEXT, far)]

    def negative(terms: list[Weighed]) -> list[Weighed]:
        return [(-weight, condition, arm, of) for weight, condition, arm, of in terms]

    rows: list[tuple[str, str, list[Weighed]]] = [
        *(("H1", f"COPY - {name}", less(COPY, name, far)) for name in (TEXT, BLANK, OTHER)),
        ("H2", "COPY - text-only, less that at N = 16", less(COPY, TEXT, far) + negative(less(COPY, TEXT, near))),
        ("", "COPY - text-only, N = 16", less(COPY, TEXT, near)),
        *(("H3", f"COPY - {name}, long training", less(COPY, name, far, LONG.name)) for name in (TEXT, BLANK, OTHER)),
        *(("H4", f"{name} - text-only", less(name, TEXT, far)) for name in (BLANK, PAUSE)),
        *(("H4", f"{name} - text-only, less half of COPY's", half(name)) for name in (BLANK, PAUSE)),
        ("H5", "squeezed - text-only, colour words", less(SQUEEZED, TEXT, _colours)),
        *(("H6", f"{name} - COPY, free answers", less(name, COPY, free)) for name in (ROUTE_50, ROUTE_25)),
        (
            "H7",
            "COPY - text-only, less that in the paper's order",
            less(COPY, TEXT, far) + negative(less(COPY, TEXT, far, PAPER.name)),
        ),
        ("", "COPY - text-only in the paper's order", less(COPY, TEXT, far, PAPER.name)),
        ("H8", "COPY - vision-only", less(COPY, VISION, far)),
        ("", "COPY - text-only, filler", less(COPY, TEXT, filler)),
        ("", "COPY - text-only, free answers", less(COPY, TEXT, free)),
        ("", "COPY - text-only, colour words", less(COPY, TEXT, _colours)),
        ("", "COPY - another image, colour words", less(COPY, OTHER, _colours)),
    ]
    yield f"## Hypotheses\n\nAccuracy of continued answers at N = {PRIMARY_TOKENS} where nothing else is said.\n"
    yield "| | difference | points |\n|---|---|---|"
    for number, words, terms in rows:
        try:
            cell = text_of(study.weighed(terms))
        except StudyError:
            cell = "not measured"
        yield f"| {number} | {words} | {cell} |"
    yield ""


def _tables(study: Study) -> Iterator[str]:
    """One table a condition, working and way, arms by N."""
    measures: list[tuple[str, str, str, str | None, float]] = [
        ("accuracy", CONTINUED, "right", None, 100),
        ("accuracy", FREE, "right", None, 100),
        ("working right", FREE, "worked", None, 100),
        ("CHAIR_i after the look", CONTINUED, "invented", "named", 100),
        ("wrong marks", CONTINUED, "wrong_details", "details", 100),
        ("reflections an answer", FREE, "reflections", None, 1),
        ("colour words right", FORCED, "right_colours", "colours", 100),
        ("marks right", FORCED, "right_marks", "marks", 100),
        ("log-probability of the answer, nats", FORCED, "logp_answer", None, 1),
        *((f"attention on visual tokens {part}", FORCED, f"mass/{part}", f"tokens/{part}", 100) for part in PARTS[1:]),
        *((f"the same over an even share, {part}", FORCED, f"mass/{part}", f"even/{part}", 1) for part in PARTS[1:]),
        ("tokens generated", CONTINUED, "tokens", None, 1),
    ]
    lengths = sorted({tokens for result in study.results.values() for _, tokens in result.cells})
    for condition in CONDITIONS:
        arms = [arm for arm in ARMS if any(key[2:] == (condition, arm) for key in study.results)]
        if not arms:
            continue
        for working in WORKINGS:
            yield f"## Training {condition}, {working}\n"
            yield "| measure | arm | " + " | ".join(f"N = {tokens}" for tokens in lengths) + " |"
            yield "|---" * (len(lengths) + 2) + "|"
            for name, way, over, under, scale in measures:
                for arm in arms:
                    cells = [_cell(study, condition, arm, (working, n, way, over, under), scale) for n in lengths]
                    if set(cells) != {""}:
                        yield f"| {name} ({way}) | {arm} | " + " | ".join(cells) + " |"
            yield ""
            if working == "chain":
                yield from _kinds(study, condition, arms, lengths)


def _cell(study: Study, condition: str, arm: str, of: tuple[str, int, str, str, str | None], scale: float) -> str:
    try:
        one = study.share(condition, arm, lambda result: result.ratio(*of))
    except StudyError:
        return ""
    if math.isnan(one.value):
        return ""
    places = 1 if scale == 100 else 2
    low, high = (f"{scale * end:.{places}f}" for end in (one.low, one.high))
    return f"{scale * one.value:.{places}f} [{low}, {high}]"


def _kinds(study: Study, condition: str, arms: Sequence[str], lengths: Sequence[int]) -> Iterator[str]:
    """Accuracy of continued answers by kind of question."""
    yield "| kind | arm | " + " | ".join(f"N = {tokens}" for tokens in lengths) + " |"
    yield "|---" * (len(lengths) + 2) + "|"
    for number, kind in enumerate(LENGTH_KINDS):
        for arm in arms:
            cells = []
            for tokens in lengths:

                def of(result: Result, tokens: int = tokens, number: int = number) -> Ratio:
                    there = result.ratio("chain", tokens, CONTINUED, "kind").over == number
                    return Ratio(result.ratio("chain", tokens, CONTINUED, "right").over * there, there * 1.0)

                try:
                    one = study.share(condition, arm, of)
                    cells.append(f"{100 * one.value:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]")
                except StudyError:
                    cells.append("")
            if set(cells) != {""}:
                yield f"| {kind} | {arm} | " + " | ".join(cells) + " |"
    yield ""


def _answers(results: Sequence[Result]) -> Iterator[str]:
    """The first answers of each arm, to read."""
    first = [result for result in results if (result.base, result.seed) == (results[0].base, results[0].seed)]
    yield f"## Answers\n\nThe first ones, base model {results[0].base}, seed {results[0].seed}.\n"
    for result in first:
        for cell, ways in result.answers.items():
            for way, texts in ways.items():
                yield f"* {result.condition}, {result.arm}, {cell}, {way}: `{texts[0]}`"
