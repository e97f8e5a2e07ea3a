"""The report of the length study, made of its results' files alone: every number with its interval.

Markdown, a page and a PDF have the same content, and the first figure is accuracy against length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qwenla_jax.data.synthetic.length_options import WORKINGS
from qwenla_jax.data.synthetic.length_questions import LENGTH_KINDS
from qwenla_jax.inference.attention_mass import PARTS
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_analysis import Contrast, Measure, Study, right, verdict
from qwenla_jax.study.length_arms import ARMS, CONDITIONS, PRIMARY_TOKENS, SHORT, SIZES, TEXT, TRAINED_TOKENS
from qwenla_jax.study.length_claims import AGREES, OPEN, OPPOSITE, claim_tables, reason
from qwenla_jax.study.length_figure import COLOURS, INVENTED, TITLES, length_figure, lengths_of
from qwenla_jax.study.length_results import CONTINUED, FORCED, FREE, Result, read_results
from qwenla_jax.study.report_formats import Report, Section, illustration, write_formats
from qwenla_jax.study.statistics import Ratio
from qwenla_jax.study.tables import Table

TITLE = "Does looking again pay where an answer is long?"
INTERVALS = (
    "Numbers are percent and differences points of 100 percent, with 95% intervals of the two-level bootstrap (seeds, "
    "scenes) in brackets. By seed: the value in every seed of each base model. sd: standard deviation between seeds, "
    "and in parentheses that of one seed which its scenes alone explain."
)
READING = (
    f"Accuracy of continued answers at N = {PRIMARY_TOKENS} where nothing else is said. Result: {AGREES}, or "
    f"{OPPOSITE}, where the interval and every seed lie on one side of 0; otherwise it {OPEN}. One row is one "
    "difference and is not corrected for the number of rows; the verdict alone joins three."
)
ALT = "a panel for each training, {} over N; a line with error bars for each arm; the tables have the numbers"


def write_length_report(results: Path, path: Path) -> str:
    """Writes the report as Markdown, and beside it as a page, as PDF and its figures where their libraries are there.

    Args:
      results: folder of the results.
      path: of the Markdown; the others are beside it.

    Returns:
      its first lines: the verdict, what is missing, and the paths of the files.

    Raises:
      StudyError: there are no results, or one of the analysis's checks fails.
    """
    all_results = read_results(results)
    study = Study.of(all_results)
    head = [_judged(study), *_missing(study)]
    accuracy = illustration(
        "accuracy",
        "Figure 1",
        "Right answers (continued) against the tokens of reasoning N, by arm, with 95% intervals.",
        ALT.format("accuracy"),
        lambda: length_figure(study),
    )
    colours = illustration(
        "colours",
        "Figure 2",
        "Colour words after the look that are the likeliest token (teacher-forced) against N, by arm, with 95% "
        "intervals.",
        ALT.format("colour words"),
        lambda: length_figure(study, COLOURS, "colour words (%)"),
    )
    invented = illustration(
        "chair",
        "Figure 3",
        "CHAIR_i: objects of captions after the look (continued) that are not in the image, against N, by arm, with "
        "95% intervals.",
        ALT.format("CHAIR_i"),
        lambda: length_figure(study, INVENTED, "CHAIR_i (%)"),
    )
    report = Report(
        TITLE,
        (
            Section("", [*head, accuracy, _made_of(study, all_results), INTERVALS]),
            Section("Verdict at every length", [_verdicts(study)]),
            Section("Claims", [READING, *claim_tables(study)]),
            Section("Measures", [colours, invented, *_tables(study)]),
            Section("Answers", [_answers(all_results)]),
        ),
    )
    lines = write_formats(report, path)
    return "\n".join([f"{TITLE}\n", *head, *lines, f"{len(all_results)} results"])


def _seeds(study: Study) -> dict[str, set[int]]:
    """The seeds of each base model."""
    seeds: dict[str, set[int]] = {}
    for base, seed, *_ in sorted(study.results):
        seeds.setdefault(base, set()).add(seed)
    return seeds


def _judged(study: Study) -> str:
    try:
        one = verdict(study)
        what = f"at {PRIMARY_TOKENS} tokens of reasoning, {TITLES[SHORT.name]}"
        judged = f"Whether COPY helps {what}: **{one.verdict}**. {one.reason[0].upper()}{one.reason[1:]}."
    except StudyError as error:
        judged = f"**Not judged**: {reason(error, study)}."
    if max(map(len, _seeds(study).values())) < 3:
        judged += " Provisional: fewer than three seeds."
    return judged


def _missing(study: Study) -> Iterator[str]:
    """What the smallest size that has all the results has besides."""
    grids = {
        name: {
            (base.name, seed, condition.name, arm)
            for base in size.bases
            for seed in range(size.seeds)
            for condition in size.conditions
            for arm in size.arms
        }
        for name, size in SIZES.items()
    }
    name = next((name for name, grid in grids.items() if grid >= study.results.keys()), "full")
    size, absent = SIZES[name], grids[name] - study.results.keys()
    seeds_of: dict[tuple[str, str, tuple[str, ...]], list[int]] = {}
    for base, seed, condition in sorted({key[:3] for key in absent}):
        arms = tuple(arm for arm in ARMS if (base, seed, condition, arm) in absent)
        seeds_of.setdefault((base, condition, arms), []).append(seed)
    whole = {key: len(seeds) == size.seeds and key[2] == size.arms for key, seeds in seeds_of.items()}
    parts = []
    for base in size.bases:
        own = [key for key in seeds_of if key[0] == base.name]
        if len(own) == len(size.conditions) and all(map(whole.get, own)):
            parts.append(f"base {base.name}: everything")
            continue
        for key in own:
            _, condition, arms = key
            seeds = "" if whole[key] else f", seed {', '.join(map(str, seeds_of[key]))}"
            parts.append(
                f"base {base.name}, {condition}{seeds}: {'every arm' if arms == size.arms else ' + '.join(arms)}"
            )
    if parts:
        yield (
            f"**Missing** of the size {name}: {'; '.join(parts)}. What needs them is not judged; an arm's own values "
            "are over the seeds that it has."
        )


def _made_of(study: Study, results: Sequence[Result]) -> str:
    hours = sum(sum(result.seconds.values()) for result in results if ARMS[result.arm].trained) / 3600
    hours += sum(result.seconds["measuring"] for result in results if not ARMS[result.arm].trained) / 3600
    models = ", ".join(f"{name}: {len(seeds)} seed(s)" for name, seeds in _seeds(study).items())
    return f"Base models {models}. Stage 4 and measuring took {hours:.2f} h, base models aside."


def _verdicts(study: Study) -> Table:
    """The protocol's verdict for every training and length."""
    rows = []
    for condition in CONDITIONS:
        for tokens in lengths_of(study) if any(key[2] == condition for key in study.results) else ():
            primary = (condition, tokens) == (SHORT.name, PRIMARY_TOKENS)
            try:
                one = verdict(study, condition, tokens)
                words, why = one.verdict, one.reason
            except StudyError as error:
                words, why = "not judged", reason(error, study)
            rows.append((condition, f"{tokens}{' (primary)' if primary else ''}", words, why))
    caption = "Whether COPY helps: it has to beat text-only, blank and another image. The row of H1 alone is primary."
    return Table("Verdicts", caption, ("training", "N", "COPY", "why"), tuple(rows), prose=True)


def _tables(study: Study) -> Iterator[Table]:
    """One table a condition and working, arms by N, and one of kinds of questions."""
    measures: list[tuple[str, str, str, str | None, float]] = [
        ("accuracy", CONTINUED, "right", None, 100),
        ("accuracy", FREE, "right", None, 100),
        ("working right", FREE, "worked", None, 100),
        ("CHAIR_i after the look", CONTINUED, "invented", "named", 100),
        ("objects left out of those there", CONTINUED, "missed", "objects", 100),
        ("wrong marks", CONTINUED, "wrong_details", "details", 100),
        ("reflections an answer", FREE, "reflections", None, 1),
        ("colour words right", FORCED, "right_colours", "colours", 100),
        ("marks right", FORCED, "right_marks", "marks", 100),
        ("log-probability of the answer, nats", FORCED, "logp_answer", None, 1),
        *((f"attention on visual tokens {part}", FORCED, f"mass/{part}", f"tokens/{part}", 100) for part in PARTS[1:]),
        *((f"the same over an even share, {part}", FORCED, f"mass/{part}", f"even/{part}", 1) for part in PARTS[1:]),
        ("tokens generated", CONTINUED, "tokens", None, 1),
    ]
    lengths = lengths_of(study)
    heads = tuple(f"N = {tokens}" for tokens in lengths)
    for condition in CONDITIONS:
        arms = [arm for arm in ARMS if any(key[2:] == (condition, arm) for key in study.results)]

        def rows(name: str, scale: float, of: Callable[[int], Measure]) -> Iterator[tuple[str, ...]]:
            for arm in arms:  # noqa: B023
                cells = [_cell(study, condition, arm, of(tokens), scale) for tokens in lengths]  # noqa: B023
                if any(cells):
                    yield name, arm, *cells

        for working in WORKINGS if arms else ():
            body = [
                row
                for name, way, over, under, scale in measures
                for row in rows(f"{name} ({way})", scale, _ratio(working, way, over, under))
            ]
            caption = "Percent where no unit is given; in brackets 95% intervals."
            yield Table(f"Training {condition}, {working}", caption, ("measure", "arm", *heads), tuple(body), names=2)
        if arms:
            body = [row for number, kind in enumerate(LENGTH_KINDS) for row in rows(kind, 100, _of_kind(number))]
            caption = "Accuracy of continued answers by kind of question, in percent."
            yield Table(f"Training {condition}, kinds", caption, ("kind", "arm", *heads), tuple(body), names=2)
            body = [row for words, gained in _EXCHANGES for row in rows(words, 100, _exchanged(study, gained))]
            caption = (
                "Share of continued answers that are right where text-only's is wrong to the same question, and the "
                "other way round, in percent."
            )
            heading = f"Training {condition}, against text-only"
            yield Table(heading, caption, ("answers", "arm", *heads), tuple(body), names=2)


def _ratio(working: str, way: str, over: str, under: str | None) -> Callable[[int], Measure]:
    return lambda tokens: lambda result: result.ratio(working, tokens, way, over, under)


def _of_kind(number: int) -> Callable[[int], Measure]:
    """Accuracy of continued answers to questions of one kind."""

    def of(result: Result, tokens: int) -> Ratio:
        there = result.ratio("chain", tokens, CONTINUED, "kind").over == number
        return Ratio(result.ratio("chain", tokens, CONTINUED, "right").over * there, there * 1.0)

    return lambda tokens: lambda result: of(result, tokens)


_EXCHANGES = (("right where text-only is wrong", True), ("wrong where it is right", False))


def _exchanged(study: Study, gained: bool) -> Callable[[int], Measure]:
    """Continued answers that only the arm has right, or only text-only to the same questions."""

    def of(result: Result, tokens: int) -> Ratio:
        text = study.results.get((result.base, result.seed, result.condition, TEXT))
        if text is None or result.arm == TEXT or ARMS[result.arm].squeezed:  # such an arm generates nothing
            raise StudyError(f"{result.path}: has no answers of {TEXT} beside it")
        ours, theirs = (right(tokens)(one).over > 0 for one in (result, text))
        only = ours & ~theirs if gained else theirs & ~ours
        return Ratio(only * 1.0, np.ones(len(only)))

    return lambda tokens: lambda result: of(result, tokens)


def _cell(study: Study, condition: str, arm: str, of: Measure, scale: float) -> str:
    try:
        one: Contrast = study.share(condition, arm, of)
    except StudyError:
        return ""
    if math.isnan(one.value):
        return ""
    places = 1 if scale == 100 else 2
    low, high = (f"{scale * end:.{places}f}" for end in (one.low, one.high))
    return f"{scale * one.value:.{places}f} [{low}, {high}]"


def _answers(results: Sequence[Result]) -> Table:
    """The first answer of each arm at two lengths, to read."""
    base, seed, condition = results[0].base, results[0].seed, results[0].condition
    first = [result for result in results if (result.base, result.seed, result.condition) == (base, seed, condition)]
    first.sort(key=lambda result: list(ARMS).index(result.arm))
    rows = []
    for result in first:
        for tokens in (TRAINED_TOKENS, PRIMARY_TOKENS):
            for way, texts in result.answers.get(f"chain/{tokens}", {}).items():
                rows += [(f"{result.arm}, N = {tokens}, {way}", text) for text in texts[:1]]
    caption = f"The first of each arm: base model {base}, seed {seed}, training {condition}, chain."
    return Table("Answers", caption, ("arm", "question -> right answer | answer"), tuple(rows), prose=True)
