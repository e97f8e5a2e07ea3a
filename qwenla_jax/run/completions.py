"""Tables of completions to look at: one self-contained HTML file a logged step, and an index of them.

A response is the model's own text: all of it is escaped, and the page forbids scripts. Colours are blue and orange,
which are distinct in the common kinds of colour blindness, and every colour comes with a sign or a word.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qwenla_jax.text.tag_pieces import split_reflections
from qwenla_jax.utils.html import write_page

COMPLETIONS_FOLDER = "completions"
CHARTS = {
    "train/reward": "reward",
    "train/rewards/accuracy/mean": "accuracy",
    "train/completions/mean_length": "length in tokens",
}
WIDTH, HEIGHT = 600, 120  # of a chart
LARGEST_SIDE = 336  # pixels of an image in the page; larger ones are shrunk to keep the file small


@dataclass(frozen=True)
class Completion:
    """One sampled response and its rewards.

    Attributes:
      images: images of the question.
      prompt: the question as text.
      answer: the right answer.
      response: the sampled text, tags included.
      rewards: each reward's value by name, before its weight; empty where the rewards failed.
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


def table(rows: Sequence[Completion]) -> tuple[list[str], list[list[Any]]]:
    """The rows as names of columns and cells, without the images. Rewards that a row does not have are nan."""
    names = list(max((row.rewards for row in rows), key=len, default={}))
    header = ["question", "right answer", "response", *names, "reward", "advantage", "note"]
    return header, [
        [r.prompt, r.answer, r.response, *(r.rewards.get(n, math.nan) for n in names), r.reward, r.advantage, r.note]
        for r in rows
    ]


def preview(image: Image.Image) -> Image.Image:
    """A copy in RGB with at most `LARGEST_SIDE` pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return small


def write_completions(
    workdir: str | os.PathLike[str],
    step: int,
    rows: Sequence[Completion],
    history: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `completions/step_000100.html` and renews `completions/index.html`; returns the step's file.

    Consecutive rows with the same images and prompt are grouped under one question. A step written again replaces its
    file.

    Args:
      workdir: the run's folder.
      step: updates made when the responses were sampled, that of this step included.
      rows: the responses.
      history: the run's metrics, a row each with its `step`; the index has charts of `CHARTS`.

    Raises:
      OSError: the file cannot be written; a deleted run's folder is not made again.
    """
    names = table(rows)[0][3:-3]
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
        nan=math.nan,
    )
    matches = (re.fullmatch(r"step_(\d+)\.html", file.name) for file in folder.iterdir())
    steps = sorted((int(match[1]), match[0]) for match in matches if match)
    charts = [chart for metric, title in CHARTS.items() if (chart := _chart(metric, title, history)) is not None]
    write_page(folder / "index.html", "completions_index.html", steps=steps, charts=charts, width=WIDTH, height=HEIGHT)
    return path


def _chart(metric: str, title: str, history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Title, bounds and points of a metric's chart; None where there are less than two values."""
    known = [(row["step"], row[metric]) for row in history if row.get(metric) is not None]
    if len(known) < 2:
        return None
    known = known[:: math.ceil(len(known) / WIDTH)]  # more points than pixels would only make the page larger
    steps, values = zip(*known, strict=True)
    low, high, first, last = min(values), max(values), steps[0], steps[-1]
    wide, tall = (last - first) or 1, (high - low) or 1
    places = [f"{WIDTH * (x - first) / wide:.1f},{HEIGHT * (high - y) / tall:.1f}" for x, y in known]
    return {"title": title, "low": low, "high": high, "first": first, "last": last, "points": " ".join(places)}
