"""Attention over a picture at key words, one row a system (paper, figure 5); needs the extra `report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qwenla_jax.analysis.figures import STYLE, require_matplotlib
from qwenla_jax.analysis.pictures import picture_of
from qwenla_jax.analysis.study import BASE, COPY, ROUTE, TEXT, Seed, Study, StudyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = ((BASE, "original"), (TEXT, "text-only"), (COPY, "COPY"), (ROUTE, "ROUTE 50%"))
WORDS = ("caption", "last look", "answer")
HEADS = {"caption": "first word of the caption\nthat names a thing", "last look": "last such word\nbefore the answer"}


def figure_5(study: Study, number: int = 0) -> Figure:
    """Attention on the picture when key words are written: the original model, text-only reflection, COPY and ROUTE.

    Args:
      study: its first seed is drawn from.
      number: of the questions that can be drawn, which.

    Raises:
      StudyError: no such question; see `drawable`.
    """
    seed = study.seeds[0]
    offered = drawable(study)
    if not 0 <= number < len(offered):
        raise StudyError(
            f"{seed.path / 'evaluate'}: {len(offered)} questions have maps of all key words in the heat.json of "
            f"{', '.join(name for name, _ in ROWS)}; number {number} is not among them"
        )
    index = offered[number]
    matplotlib = require_matplotlib()
    image = picture_of(seed.systems[BASE], index)
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.35)
    maps = {name: _words(seed, name, index) for name, _ in ROWS}
    top = max(total(word).max() for words in maps.values() for word in words.values())
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = matplotlib.figure.Figure(figsize=(6.6, 6.9), layout="constrained")
        axes = figure.subplots(len(ROWS), 1 + len(WORDS))
        width, height = image.size
        for row, (name, label) in enumerate(ROWS):
            for axis in axes[row]:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            axes[row, 0].set_ylabel(label, fontsize=10)
            axes[row, 0].imshow(image, extent=(0, width, height, 0))
            for axis, part in zip(axes[row, 1:], WORDS, strict=True):
                word = maps[name][part]
                cells = total(word)
                axis.imshow(faded, extent=(0, width, height, 0))
                drawn = axis.imshow(
                    100 * cells,
                    cmap="viridis",
                    vmin=0,
                    vmax=100 * top,
                    alpha=0.72,
                    extent=(0, width, height, 0),
                    interpolation="nearest",
                )
                axis.set_xlabel(f"“{word['word']}”: {cells.sum():.0%} on the picture", fontsize=8)
                if row == 0:
                    axis.set_title(HEADS.get(part, "the answer"), fontsize=8.5)
        axes[0, 0].set_title("picture", fontsize=8.5)
        bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
        bar.set_label("share of all attention on a visual token (%), insertions added")
    return figure


def drawable(study: Study) -> list[int]:
    """Questions of the first seed of which every row has all key words; those first that COPY answers right."""
    seed = study.seeds[0]
    study.require(*(name for name, _ in ROWS))
    count = min(len(seed.systems[name].heat) for name, _ in ROWS)
    whole = [i for i in range(count) if all(set(WORDS) <= set(_words(seed, name, i)) for name, _ in ROWS)]
    return sorted(whole, key=lambda i: -seed.systems[COPY].numbers["right"][i])


def total(word: Mapping[str, Any]) -> np.ndarray:
    """Attention on each visual token, [rows, cols]: the prompt's and all that was put in."""
    return np.array(word["original"], float) + np.array(word["inserted"], float)


def _words(seed: Seed, name: str, index: int) -> dict[str, Mapping[str, Any]]:
    return {word["part"]: word for word in seed.systems[name].heat[index]["words"]}
