"""All benchmarks by name, and scoring files in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwenla_jax.evals.benchmarks import chair_task, mathvision_task, mmbench_mmstar, mmhal, mmmu, pope_mme
from qwenla_jax.evals.images import coco_images, with_images
from qwenla_jax.evals.lettered import LETTERS
from qwenla_jax.evals.result import Result
from qwenla_jax.evals.table_files import Row, read_rows
from qwenla_jax.evals.task import Answer, Questions, Settings, Task, join

_LETTERS = frozenset(LETTERS)


@functools.cache
def tasks() -> Mapping[str, Task]:
    """The benchmarks by the names that the command line takes."""
    result = (
        Task("chair", chair_task.chair_ids, chair_task.chair_item, chair_task.score_chair, chair_task.read_images),
        Task("pope", pope_mme.pope_ids, pope_mme.pope_item, pope_mme.score_pope),
        Task("mme", pope_mme.mme_ids, pope_mme.mme_item, pope_mme.score_mme),
        Task("mmhal", mmhal.mmhal_ids, mmhal.mmhal_item, mmhal.score_mmhal),
        Task("mmmu", mmmu.mmmu_ids, mmmu.mmmu_item, mmmu.score_mmmu),
        Task("mmmu_pro", mmmu.pro_ids, mmmu.pro_item, mmmu.score_pro),
        Task("mmbench", mmbench_mmstar.choice_ids, mmbench_mmstar.mmbench_item, mmbench_mmstar.score_mmbench),
        Task("mmstar", mmbench_mmstar.choice_ids, mmbench_mmstar.mmstar_item, mmbench_mmstar.score_mmstar),
        Task(
            "mathvision",
            mathvision_task.mathvision_ids,
            mathvision_task.mathvision_item,
            mathvision_task.score_mathvision,
        ),
    )
    return {task.name: task for task in result}


def task_of(name: str) -> Task:
    """A benchmark.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in tasks():
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(tasks())}")
    return tasks()[name]


def questions_of(
    name: str, gold: Sequence[Path], settings: Settings | None = None, images: Path | None = None
) -> Questions:
    """A benchmark's questions as records, for a model to answer.

    Args:
      name, gold, settings: the benchmark, files of its questions, and how they are read.
      images: folder of the images that the files name; None: each file's own folder.

    Raises:
      FileNotFoundError, ValueError: as in `table_files.read_rows` and `Task.items`.
    """
    rows = [row for path in gold for row in with_images(read_rows(path), images or path.parent)]
    items = task_of(name).items(rows, settings)
    return Questions(coco_images(items, images) if name == "chair" and images is not None else items)


def _rows(paths: Sequence[Path]) -> list[Row]:
    return [row for path in paths for row in read_rows(path)]


def read_answers(
    name: str, predictions: Sequence[Path], gold: Sequence[Path], settings: Settings, size: int | None = None
) -> tuple[list[Answer], dict[str, int], dict[str, str]]:
    """Answers of files, counts and notes; see `task.join`.

    Raises:
      FileNotFoundError, ValueError: as in `table_files.read_rows` and `task.join`.
    """
    return join(task_of(name), _rows(predictions), _rows(gold) if gold else None, settings, size)


def score_answers(
    name: str, answers: Sequence[Answer], counts: Mapping[str, int], notes: Mapping[str, str], settings: Settings
) -> Result:
    """The task's score with the counts and notes of the join in front.

    Answers of several splits (MMMU's dev and validation in one file) are scored split by split, the largest first; no
    figure adds them up.

    Raises:
      ValueError: as the task's `score`.
    """
    splits: dict[str, list[Answer]] = {}
    for one in answers:
        splits.setdefault(str(one.item.details.get("split", "")), []).append(one)
    ordered = sorted(splits, key=lambda split: -len(splits[split]))
    output = {split: task_of(name).score(splits[split], settings) for split in ordered}
    counts, notes = dict(counts), dict(notes)
    # Its options' cell is empty, or the letter is wrong: nobody can answer it, and it counts as it does officially.
    if odd := sum(bool(one.item.options) and one.item.answer in _LETTERS - one.item.options.keys() for one in answers):
        counts["whose_right_letter_is_no_option"] = odd
    if len(output) == 1:
        (whole,) = output.values()
        return dataclasses.replace(whole, counts=counts | whole.counts, notes=notes | whole.notes)
    rows = {row["id"]: row for result in output.values() for row in result.rows}
    labels = {split: split or "without a split" for split in ordered}
    for split, result in output.items():
        counts |= {f"{key}/{labels[split]}": number for key, number in result.counts.items()}
        notes |= result.notes
    figures = {f"{key}/{labels[split]}": value for split, one in output.items() for key, value in one.figures.items()}
    return Result(name, figures, counts, notes, tuple(rows[one.item.id] for one in answers))


def score_files(
    name: str, predictions: Sequence[Path], gold: Sequence[Path] = (), settings: Settings | None = None
) -> Result:
    """Scores files of predictions; `gold` is empty where they hold the questions too.

    Raises:
      FileNotFoundError, ValueError: as in `read_answers` and `score_answers`.
    """
    settings = settings or Settings()
    return score_answers(name, *read_answers(name, predictions, gold, settings), settings)
