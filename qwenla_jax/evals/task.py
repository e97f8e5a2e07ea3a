"""What a benchmark is here: how its questions are read, and how answers to them become a score.

A `Task` reads rows of files into items; `Questions` hands them out as records for a model to answer; `answers` joins
items with predictions, which is where nothing may get lost; the task's `score` is a pure function of the answers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.raw_record import RawImage
from qwenla_jax.data.images.decode import open_image
from qwenla_jax.data.record import Record
from qwenla_jax.evals.result import Result
from qwenla_jax.evals.table_files import PREDICTION_KEYS, Row, some
from qwenla_jax.text.answers.match import extract_conclusion

CONCLUSION = ("auto", "always", "never")
MISSING = ("refuse", "wrong", "leave_out")
UNKNOWN = ("refuse", "ignore")
FALLBACK = ("random", "wrong")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      id: unique within the benchmark.
      question: the prompt's text as the benchmark has it, options included.
      answer: the right answer, or several; "" where it is withheld.
      options: letter -> text, in order.
      kind: category, subject or split that figures are told apart by.
      details: what else the score needs.
      images: unopened, in order.
    """

    id: str
    question: str = ""
    answer: str | tuple[str, ...] = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kind: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: tuple[RawImage, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """An item and what a model says.

    Attributes:
      item: the question.
      text: the text that is scored.
      given: False where the file holds no prediction for it.
      concluded: False where only conclusions are scored and it has none; then the text is empty.
    """

    item: Item
    text: str
    given: bool = True
    concluded: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to score.

    Attributes:
      conclusion: score the content of the last `<CONCLUSION>` alone: "auto" where any prediction holds such a tag.
      missing: what a question without a prediction is: "refuse" the file, "wrong" (an empty answer), or "leave_out";
        counted in any case.
      unknown: what a prediction without a question is: "refuse" or "ignore", counted.
      field: column of the predictions; None: the first of `table_files.PREDICTION_KEYS` that is there.
      fallback: an answer that names no option is a "random" one, as MMMU has it, or "wrong".
      seed: of that; 42 is MMMU's.
      synonyms: CHAIR's file; None: our own table.
      algebra: MathVision: compare values of LaTeX expressions, in processes that can be killed.
      replies: MMHal-Bench: item id -> what its judge replied.
    """

    conclusion: str = "auto"
    missing: str = "refuse"
    unknown: str = "refuse"
    field: str | None = None
    fallback: str = "random"
    seed: int = 42
    synonyms: Path | None = None
    algebra: bool = True
    replies: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        choices = {"conclusion": CONCLUSION, "missing": MISSING, "unknown": UNKNOWN, "fallback": FALLBACK}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
      name: what the command line calls it.
      ids: a row's ids, those of a question and of a prediction alike; several where one row stands for several items.
      item: the item of a question's row with one of its ids; raises ValueError where the row lacks something.
      score: the result of answers, in the order of the questions.
      read: items of rows, where they are not one by one (`None`: `item` of each).
    """

    name: str
    ids: Callable[[Row], tuple[str, ...]]
    item: Callable[[Row, str], Item]
    score: Callable[[Sequence[Answer], Settings], Result]
    read: Callable[[Sequence[Row], Settings], list[Item]] | None = None

    def items(self, rows: Sequence[Row], settings: Settings | None = None) -> list[Item]:
        """The questions of rows, in order.

        Raises:
          ValueError: a row lacks something, two have one id, or there is none.
        """
        if self.read is not None:
            result = self.read(rows, settings or Settings())
        else:
            result = [self.item(row, name) for row in rows for name in self.ids(row)]
        _check_ids([item.id for item in result], "question")
        return result


class Questions:
    """A task's items as a random-access source of records, for a model to answer; images open when asked for."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> tuple[Item, ...]:
        """The items, images unopened."""
        return self._items

    def __getitem__(self, index: int) -> Record:
        item = self._items[index]
        images = tuple(open_image(image.read(), f"{item.id}: {image.name}") for image in item.images)
        answer = item.answer if isinstance(item.answer, str) else item.answer[0]
        return Record(item.id, images, item.question, answer, None, item.kind, options=tuple(item.options.values()))


def _check_ids(names: Sequence[str], what: str) -> None:
    if not names:
        raise ValueError(f"there is no {what}")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"several {what}s have the id {some(twice)}; expected one each")


def join(
    task: Task,
    predictions: Sequence[Row],
    gold: Sequence[Row] | None,
    settings: Settings,
    size: int | None = None,
) -> tuple[list[Answer], dict[str, int], dict[str, str]]:
    """Questions with their predictions, in the order of the questions.

    Args:
      task: the benchmark.
      predictions: rows of the predictions.
      gold: rows of the questions; None: the predictions' rows hold them too.
      settings: what to do about those that do not match, and what text to score.
      size: only the first so many questions count; None: all.

    Returns:
      Answers, counts of what was unusual, and notes on which text is scored.

    Raises:
      ValueError: ids that stand twice, or do not match and are not to be counted; a row without a prediction's text.
    """
    names = [(name, row) for row in _with_ids(task, predictions, gold) for name in task.ids(row)]
    _check_ids([name for name, _ in names], "prediction")
    by_id = dict(names)
    if gold is not None and task.read is None:
        result = {name: row for row in gold for name in task.ids(row)}
        _check_ids([name for row in gold for name in task.ids(row)], "question")
        items = [task.item(row.below(by_id[name]) if name in by_id else row, name) for name, row in result.items()]
    else:
        items = task.items(predictions if gold is None else gold, settings)
    items = items[:size]
    known = {item.id for item in items}
    unknown, missing = [name for name in by_id if name not in known], [i.id for i in items if i.id not in by_id]
    if unknown and settings.unknown == "refuse":
        raise ValueError(
            f"no question has the id {some(unknown)} of a prediction; expected ids such as {some(list(known)[:2])} "
            "(unknown=ignore leaves such predictions out)"
        )
    if missing and settings.missing == "refuse":
        raise ValueError(
            f"no prediction for the question {some(missing)} ({len(missing)} of {len(items)}); missing=wrong counts "
            "them as wrong, missing=leave_out scores the others alone"
        )
    texts = {name: _prediction(row, settings.field) for name, row in by_id.items() if name in known}
    only = settings.conclusion == "always" or (
        settings.conclusion == "auto" and any("<CONCLUSION>" in text for text in texts.values())
    )
    answers = []
    for item in items:
        if item.id not in texts:
            if settings.missing == "wrong":
                answers.append(Answer(item, "", given=False))
            continue
        said = extract_conclusion(texts[item.id]) if only else texts[item.id]
        answers.append(Answer(item, said or "", concluded=said is not None))
    if not answers:
        raise ValueError("no question has a prediction; there is nothing to score")
    counts = {"answers": len(answers)}
    if missing:
        counts["without_prediction_" + ("as_wrong" if settings.missing == "wrong" else "left_out")] = len(missing)
    if unknown:
        counts["predictions_without_question_ignored"] = len(unknown)
    notes = {"scored_text": "the last <CONCLUSION> alone" if only else "the whole prediction"}
    if only:
        counts["missing_conclusions"] = lacking = sum(not one.concluded for one in answers)
        notes["missing_conclusion_rate"] = f"{lacking / len(answers):.2%}, scored as empty answers"
    return answers, counts, notes


def _with_ids(task: Task, predictions: Sequence[Row], gold: Sequence[Row] | None) -> list[Row]:
    """Predictions that come without ids get those of the questions, if all their texts are the same in order."""
    keyed = [key for key in ("id", "index", "question_id", "image_id") if any(key in row.values for row in predictions)]
    if gold is None or keyed or len(predictions) != len(gold):
        return list(predictions)
    asked = [(row.text("question", "text"), mine.text("question")) for row, mine in zip(gold, predictions, strict=True)]
    if any(theirs is None or theirs != mine for theirs, mine in asked):
        return list(predictions)
    kept = [{key: value for key, value in row.values.items() if key not in PREDICTION_KEYS} for row in gold]
    return [mine.below(Row("", 0, "", values)) for values, mine in zip(kept, predictions, strict=True)]


def _prediction(row: Row, field: str | None) -> str:
    keys = PREDICTION_KEYS if field is None else (field,)
    result = next((row.values[key] for key in keys if key in row.values), None)
    if result is None and any(key in row.values for key in keys):
        return ""
    if isinstance(result, list | dict) or result is None:
        row.need(*keys)
        raise ValueError(f"{row.where}: the prediction is a {type(result).__name__}; expected text")
    return row.text(*[key for key in keys if key in row.values][:1]) or ""
