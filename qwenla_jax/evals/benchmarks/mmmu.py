"""MMMU and MMMU-Pro, read as their own scorers do.

Paper, evaluation: accuracy on both. Choices are looked for in brackets, then as single words, then by their text; what
names none is a random choice there, which `Settings.fallback` can switch off.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from qwenla_jax.data.datasets.multiple_choice import literal
from qwenla_jax.evals.lettered import check_letter, options_of
from qwenla_jax.evals.result import Figure, Result
from qwenla_jax.evals.table_files import Row
from qwenla_jax.evals.task import Answer, Item, Settings

CONFIGS = ("standard (10 options)", "standard (4 options)", "vision")
WITHHELD = "?"  # the test's right answers
_SPLITS = ("dev_", "validation_", "test_")
_TRIMMED = (",", ".", "!", "?", ";", ":", "'")
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset((":", ",", ".", "!", "?", ";", "'"))
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
# As officially, but digits are read from their first one and as a whole: what fails there fails further on too, and the
# time is linear in the text.
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])")


def _trimmed(text: str) -> str:
    """One mark after the other is taken off both ends, once each and in this order."""
    for mark in _TRIMMED:
        text = text.strip(mark)
    return f" {text} "


def choice(text: str, options: Mapping[str, str], pro: bool = False) -> str | None:
    """The option (letter -> text) that an answer names, None where it names none.

    `pro` is MMMU-Pro's rule: a single letter after the last "Answer:" first, and looser passes for letters.
    """
    if pro and "Answer:" in text:
        after = text.rpartition("Answer:")[2].strip()
        named = [letter for letter in options if letter in after]
        if len(named) == 1:
            return named[0]
    said = _trimmed(text)
    forms = ("({})", "{} ", "{}.") if pro else ("({})", " {} ")
    for form in forms:
        if named := [letter for letter in options if form.format(letter) in said]:
            # MMMU-Pro's looser passes still look for " X " to tell which stands last; where none does, the first wins.
            last = form if form == "({})" else " {} "
            return max(named, key=lambda letter: said.rfind(last.format(letter)))
    if len(said.split()) > 5:
        lower = said.lower()
        if named := [letter for letter, option in options.items() if option.lower() in lower]:
            return max(named, key=lambda letter: lower.rfind(options[letter].lower()))
    return None


def normal(text: str) -> list[str | float]:
    """A number rounded to two places, or a text in lower case; a single character with a blank before and after."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def numbers(text: str) -> list[str]:
    """The numbers in a text as they stand there: with commas, scientific, others; in time linear in the text."""
    return [number for form in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for number in form.findall(text)]


def open_candidates(text: str) -> list[str | float]:
    """What an answer to an open question may mean: its key parts and the numbers in them."""
    text = text.strip().strip(".").lower()
    # Officially split at sentences too, by a capital that lower case does not have; so it never is, and is not here.
    pieces = text.split("\n")
    parts = []
    for number, piece in enumerate(pieces):
        leads = (*_LEADS, "=") if number == len(pieces) - 1 else _LEADS
        best = ""
        for tail in (piece.rpartition(lead)[2].strip() for lead in leads if lead in piece):
            if not best or len(tail) < len(best):
                best = tail
        if best and best not in _TRIVIAL:
            parts.append(best)
    parts = parts or [text]
    found = [*parts, *(number for part in parts for number in numbers(part))]
    return list(dict.fromkeys(value for one in found for value in normal(one)))


def open_right(text: str, gold: str | Sequence[str]) -> bool:
    """Whether an answer to an open question holds a right text or equals a right number."""
    wanted = [value for one in ([gold] if isinstance(gold, str) else gold) for value in normal(one)]
    texts = [value for value in wanted if isinstance(value, str)]
    for said in open_candidates(text):
        if isinstance(said, str):
            if any(value in said for value in texts):
                return True
        elif said in wanted:
            return True
    return False


def mmmu_ids(row: Row) -> tuple[str, ...]:
    """The row's id."""
    return (row.need("id", "index"),)


def mmmu_item(row: Row, name: str) -> Item:
    """A question of MMMU.

    Raises:
      ValueError: the row lacks something.
    """
    gold = row.values.get("ground_truth", row.values.get("answer"))
    if gold is None:
        row.need("ground_truth", "answer")
    options = options_of(row, gold)
    kind = row.text("question_type") or ("multiple-choice" if options else "open")
    closed = kind == "multiple-choice"
    if closed and not options:
        raise ValueError(f"{row.where}: a multiple-choice question without options; give the questions by --gold too")
    if not closed and isinstance(gold, str):
        several = literal(gold)  # several answers as the text of a list, as Hugging Face's copy writes them
        gold = several if isinstance(several, list) else gold
    answer = tuple(str(one) for one in gold) if isinstance(gold, list | tuple) else str(gold)
    if not closed and not all(one.strip() for one in ([answer] if isinstance(answer, str) else answer or [""])):
        raise ValueError(f"{row.where}: a right answer is blank, which every answer would hold")
    if closed and isinstance(answer, str) and (answer := answer.strip()) != WITHHELD:
        check_letter(row, answer, options)
    subject = row.text("subject", "category") or "_".join(name.split("_")[1:-1]) or "all"
    question = "\n".join([row.text("question") or "", *(f"({key}) {text}" for key, text in options.items())])
    split = row.text("split") or (name.partition("_")[0] if name.startswith(_SPLITS) else "")
    details = {"open": not closed, "split": split}
    return Item(name, question.strip(), answer, options if closed else {}, subject, details, row.images)


def score_mmmu(answers: Sequence[Answer], settings: Settings) -> Result:
    """Micro accuracy in percent, that of the subjects, and how many answers were chosen at random.

    Raises:
      ValueError: right answers are withheld.
    """
    if withheld := sum(one.item.answer == WITHHELD for one in answers):
        raise ValueError(f"mmmu: right answers are withheld ({withheld} of {len(answers)}); score dev or validation")
    return _score("mmmu", answers, settings, pro=False)


def _score(name: str, answers: Sequence[Answer], settings: Settings, pro: bool) -> Result:
    draw = random.Random(settings.seed)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    rows, unread, lucky = [], 0, 0
    for one in answers:
        item = one.item
        said: str | None = None
        if not one.given:
            right = False
        elif item.details.get("open"):
            right = open_right(one.text, item.answer)
        else:
            said = choice(one.text, item.options, pro)
            right = said is not None and said in ([item.answer] if isinstance(item.answer, str) else item.answer)
            if said is None:
                unread += 1
                if settings.fallback == "random":
                    right = draw.choice(list(item.options)) == item.answer
                    lucky += right
        by_kind[item.kind].append(right)
        rows.append({"id": item.id, "read": said, "answer": item.answer, "right": right})
    total = sum(map(len, by_kind.values()))
    correct = sum(map(sum, by_kind.values()))
    figures = {"accuracy": Figure.of_counts(correct, total)}
    figures |= {f"accuracy/{kind}": Figure.of_counts(sum(right), len(right)) for kind, right in by_kind.items()}
    counts = {"right": correct, "questions": total, "naming_no_option": unread}
    notes = {"naming_no_option": "wrong"}
    if settings.fallback == "random":
        counts["of_these_right_by_chance"] = lucky
        notes = {"naming_no_option": f"a random option, seed {settings.seed}"}
    return Result(name, figures, counts, notes, tuple(rows))


def pro_ids(row: Row) -> tuple[str, ...]:
    """ "CONFIG/id": the three configs use the same ids. The config is a column, or in the file's or folder's name."""
    name = row.need("id", "index")
    if name.startswith(tuple(f"{config}/" for config in CONFIGS)):
        return (name,)
    message = (row.text("config") or row.source).lower()
    if "vision" in message:
        return (f"{CONFIGS[2]}/{name}",)
    return (f"{CONFIGS[1] if re.search(r'4[ _]?option|standard[-_ (]*4', message) else CONFIGS[0]}/{name}",)


def pro_item(row: Row, name: str) -> Item:
    """A question of MMMU-Pro; its kind is the config.

    One published question (validation_Accounting_29) has its options as a list within the list, so that its right
    letter is none of them; nobody can answer it, and it counts as it does officially.

    Raises:
      ValueError: the row lacks something, or its answer is no letter.
    """
    answer = row.need("answer")
    options = options_of(row, answer)
    if not options:
        raise ValueError(f"{row.where}: holds no options; give the questions by --gold too")
    check_letter(row, answer, options)
    question = "\n".join([row.text("question") or "", *(f"{key}. {text}" for key, text in options.items())])
    return Item(name, question.strip(), answer, options, name.partition("/")[0], images=row.images)


def score_pro(answers: Sequence[Answer], settings: Settings) -> Result:
    """Accuracy of each config; "overall" is the mean of standard with 10 options and vision, where both are there."""
    result = _score("mmmu_pro", answers, settings, pro=True)
    figures = {name: figure for name, figure in result.figures.items() if name != "accuracy"}
    both = [figures.get(f"accuracy/{CONFIGS[0]}"), figures.get(f"accuracy/{CONFIGS[2]}")]
    if all(both):
        figures = {"overall": Figure(sum(figure.value for figure in both if figure) / 2)} | figures
        note = "mean of standard (10 options) and vision"
    else:
        note = "needs standard (10 options) and vision, give both files; not there"
    return Result("mmmu_pro", figures, result.counts, result.notes | {"overall": note}, result.rows)
