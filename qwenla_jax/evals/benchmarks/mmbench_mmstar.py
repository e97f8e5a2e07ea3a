"""MMBench and MMStar: questions with lettered options.

Paper, evaluation: MMBench-V1.1 (English) and MMStar; accuracy. An answer is read as VLMEvalKit does (August 2025 and
later) where it asks no language model: exactly one option's letter as a word of its own among the last four, else the
letter behind "answer is", else exactly one option's text. What names none, or two, is wrong and is counted. MMStar's
own scorer looks at the first letter alone; that figure is told too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from qwenla_jax.evals.lettered import check_letter, inline_options, options_of
from qwenla_jax.evals.result import Figure, Result
from qwenla_jax.evals.table_files import NOTHING, Row
from qwenla_jax.evals.task import Answer, Item, Settings

ROTATION = 1_000_000  # MMBench's rotations of question i have the numbers i + ROTATION, i + 2 ROTATION, ...
_DIGITS = 18  # of an index
_FIRST = "ABCDEFGH"
_MARKS = re.compile(r"[.()\[\],:;!*#{}]")
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_FAILED = "Failed to obtain answer via API"  # what VLMEvalKit writes where a model did not answer
_DECLINED = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option (letter -> text) that an answer names, None where it names none or several."""
    if any(phrase in text for phrase in _DECLINED):
        return None
    if _FAILED not in text:
        words = _MARKS.sub(" ", text).split()
        named = [letter for letter in options if letter in words]
        if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
            return named[0]
        if not named and "Z" in words:  # there: none of the options
            return None
        said = _ANSWER_IS.search(text)
        if said and said[1].upper() in options:
            return said[1].upper()
    lower = text.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, option in options.items() if option.strip() and option.lower() in lower]
    return held[0] if len(held) == 1 else None


def first_letter(text: str) -> str | None:
    """The option whose letter an answer begins with, as MMStar's own scorer reads it; None for other beginnings.

    "(B) ...", "option b" and "The answer is B" count as beginnings too.
    """
    start = text.lower().strip().replace("\n", " ")
    for lead in ("", "(", "option ", "the answer is "):
        letter = start.removeprefix(lead)[:1].upper() if start.startswith(lead) else ""
        if letter and letter in _FIRST:
            return letter
    return None


def choice_ids(row: Row) -> tuple[str, ...]:
    """The row's index."""
    return (row.need("index", "id", "question_id"),)


def _item(row: Row, name: str, answer: str, options: Mapping[str, str], listed: bool) -> Item:
    hint, question = row.text("hint"), row.need("question")
    lines = [f"{letter}. {text}" for letter, text in options.items()] if listed else []
    text = "\n".join([*([hint] if hint and hint not in NOTHING else []), question, *lines])
    details = {"question": question, "split": row.text("split") or ""}
    return Item(name, text, answer, options, row.text("category") or "all", details, row.images)


def mmbench_item(row: Row, name: str) -> Item:
    """A question of MMBench; its answer is "" where it is withheld, as the test's are.

    Raises:
      ValueError: the row lacks something, its answer is no letter, or its index is no whole number.
    """
    if not name.isdecimal() or len(name) > _DIGITS:
        raise ValueError(f"{row.where}: the index {name[:40]!r} is no whole number of a question")
    answer = (row.text("answer") or "").strip()
    options = options_of(row, answer)
    if answer:
        check_letter(row, answer, options)
    return _item(row, name, answer, options, bool(options))


def mmstar_item(row: Row, name: str) -> Item:
    """A question of MMStar, whose options stand in columns (VLMEvalKit) or inside the question (Hugging Face).

    Raises:
      ValueError: the row lacks something, or its answer is no letter.
    """
    answer = row.need("answer").strip()
    options = options_of(row, answer)
    read = options or inline_options(row.need("question"), answer)
    check_letter(row, answer, read)
    return _item(row, name, answer, read, bool(options))


def _judged(answers: Sequence[Answer]) -> list[dict[str, object]]:
    rows = []
    for one in answers:
        said = read_letter(one.text, one.item.options) if one.given else None
        rows.append({"id": one.item.id, "read": said, "answer": one.item.answer, "right": said == one.item.answer})
    return rows


def score_mmbench(answers: Sequence[Answer], settings: Settings) -> Result:
    """Circular accuracy, right only where every rotation of a question is, and vanilla, over unrotated questions alone.

    Raises:
      ValueError: answers are withheld (write a submission instead), or a rotation has no unrotated question.
    """
    if withheld := sum(not one.item.answer for one in answers):
        raise ValueError(
            f"mmbench: the right answers are withheld ({withheld} of {len(answers)}); --submission=FILE.tsv "
            "or .xlsx writes the sheet for its server"
        )
    rows = _judged(answers)
    groups: dict[int, dict[int, bool]] = defaultdict(dict)
    for row in rows:
        turn, number = divmod(int(str(row["id"])), ROTATION)
        groups[number][turn] = bool(row["right"])
    if alone := [number for number, turns in groups.items() if 0 not in turns]:
        raise ValueError(
            f"mmbench: {len(alone)} questions have rotations alone, such as {alone[0]}; give the others too"
        )
    kinds = {int(one.item.id): one.item.kind for one in answers}
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for number, turns in groups.items():
        by_kind[kinds[number]].append(all(turns.values()))
    circular = [all(turns.values()) for turns in groups.values()]
    vanilla = [turns[0] for turns in groups.values()]
    rotated = sum(len(turns) > 1 for turns in groups.values())
    figures = {"vanilla": Figure.of_counts(sum(vanilla), len(vanilla))}
    if rotated:
        figures = {"circular": Figure.of_counts(sum(circular), len(circular))} | figures
        figures |= {f"circular/{kind}": Figure.of_counts(sum(right), len(right)) for kind, right in by_kind.items()}
    counts = {"rows": len(rows), "questions": len(groups), "questions_with_rotations": rotated}
    counts["naming_no_single_option"] = sum(row["read"] is None for row in rows)
    notes = {} if rotated else {"circular": "the file holds no rotation (index of 1000000 and more)"}
    return Result("mmbench", figures, counts, notes | {"naming_no_single_option": "wrong"}, tuple(rows))


def submission(answers: Sequence[Answer]) -> list[dict[str, str]]:
    """The rows of MMBench's sheet: index, question, options, category, split, and the letter as prediction.

    What names no single option goes as it stands.
    """
    rows = []
    for one in answers:
        options = {letter: one.item.options.get(letter, "") for letter in "ABCD"}
        said = read_letter(one.text, one.item.options) if one.given else ""
        about = {"index": one.item.id, "question": one.item.details["question"], **options}
        about |= {"category": one.item.kind, "split": one.item.details["split"]}
        rows.append(about | {"prediction": one.text if said is None else said})
    return rows


def score_mmstar(answers: Sequence[Answer], settings: Settings) -> Result:
    """Micro accuracy, that of the categories, and micro accuracy by MMStar's own reading of answers.

    lmms-eval's mean over 18 categories is another number.
    """
    rows = _judged(answers)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for one, row in zip(answers, rows, strict=True):
        by_kind[one.item.kind].append(bool(row["right"]))
    right = sum(map(sum, by_kind.values()))
    first = sum(one.given and first_letter(one.text) == one.item.answer for one in answers)
    figures = {"accuracy": Figure.of_counts(right, len(rows))}
    figures["accuracy by first letter"] = Figure.of_counts(first, len(rows))
    figures |= {f"accuracy/{kind}": Figure.of_counts(sum(each), len(each)) for kind, each in by_kind.items()}
    counts = {"right": right, "right_by_first_letter": first, "questions": len(rows)}
    counts["naming_no_single_option"] = sum(r["read"] is None for r in rows)
    notes = {
        "naming_no_single_option": "wrong",
        "accuracy": "answers read as VLMEvalKit does without a language model; by first letter: MMStar's own scorer",
    }
    return Result("mmstar", figures, counts, notes, tuple(rows))
