"""Tables of completions to look at: one self-contained HTML file a logged step, and an index of them.

A response is the model's own text: all of it is escaped, and the page forbids scripts. Colours are blue and orange,
which are distinct in the common kinds of colour blindness, and every colour comes with a sign or a word.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwenla_jax.text.tag_pieces import split_reflections
from qwenla_jax.utils.html import write_page

COMPLETIONS_FOLDER = "completions"
LARGEST_SIDE = 336  # pixels of an image in the page; larger ones are shrunk to keep the file small


@dataclass(frozen=True)
class Completion:
    """One sampled response and its rewards.

    Attributes:
      images: images of the question.
      prompt: the question as text.
      answer: the right answer.
      response: the sampled text, tags included.
      rewards: each reward's value by name, before its weight; every row of a table has the same names.
      reward: weighted sum.
      advantage: reward relative to its group.
      note: a remark, e.g. "cut off at 64 tokens"; empty for none.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str
    response: str
    rewards: Mapping[str, float]
    reward: float
    advantage: float
    note: str = ""


def write_completions(workdir: str | os.PathLike[str], step: int, rows: Sequence[Completion]) -> Path:
    """Writes `completions/step_000100.html` and renews `completions/index.html`; returns the step's file.

    Consecutive rows with the same images and prompt are grouped under one question. A step written again replaces its
    file.

    Raises:
      ValueError: rows with different reward names.
      OSError: the file cannot be written; a deleted run's folder is not made again.
    """
    names = list(rows[0].rewards) if rows else []
    for number, row in enumerate(rows):
        if list(row.rewards) != names:
            raise ValueError(f"rows[{number}].rewards: got {list(row.rewards)}, expected {names} as in rows[0]")
    folder = Path(workdir) / COMPLETIONS_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}.html"
    questions = itertools.groupby(rows, key=lambda row: (row.prompt, row.answer, row.images))
    write_page(
        path,
        "completions.html",
        step=step,
        questions=[list(group) for _, group in questions],
        names=names,
        largest_side=LARGEST_SIDE,
        split=split_reflections,
    )
    matches = (re.fullmatch(r"step_(\d+)\.html", file.name) for file in folder.iterdir())
    steps = sorted((int(match[1]), match[0]) for match in matches if match)
    write_page(folder / "index.html", "completions_index.html", steps=steps)
    return path
