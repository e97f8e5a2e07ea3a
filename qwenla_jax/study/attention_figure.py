"""Attention over an image at key words, one row a system (paper, figure 5); needs the extra `report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qwenla_jax.study.collect import BASE, COPY, ROUTE, TEXT, Seed, Study, StudyError
from qwenla_jax.study.figures import STYLE, require_matplotlib
from qwenla_jax.study.redraw import make_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = ((BASE, "original"), (TEXT, "text-only"), (COPY, "COPY"), (ROUTE, "ROUTE 50%"))
WORDS = ("caption", "last look", "answer")
HEADS = {
    "caption": "first word of the caption\nthat names a thing",
    "last look": "last such word\nbefore the answer",
    "answer": "the answer",
}


def figure_5(study: Study, number: int = 0) -> Figure:
    """Attention on the image when key words are written: the original model, text-only reflection, COPY and ROUTE.

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
    image = make_image(seed.systems[BASE], index)
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.35)
    maps = {name: _words(seed, name, index) for name, _ in ROWS}
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = matplotlib.figure.Figure(figsize=(6.6, 7.1), layout="constrained")
        axes = figure.subplots(len(ROWS), 1 + len(WORDS))
        width, height = image.size
        over = {"extent": (0, width, height, 0)}
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, (_, label) in zip(axes[:, 0], ROWS, strict=True):
            axis.set_ylabel(label, fontsize=10)
            axis.imshow(image, **over)
        text = seed.systems[BASE].texts[index]
        figure.suptitle(f"{text['question']} Right answer: {text['answer']}", fontsize=9.5)
        axes[0, 0].set_title("image", fontsize=8.5)
        for column, part in zip(axes[:, 1:].T, WORDS, strict=True):
            cells = [100 * total(maps[name][part]) for name, _ in ROWS]
            top = max(c.max() for c in cells)  # one scale a column: rows are to be compared, words are not
            for axis, (name, _), drawn in zip(column, ROWS, cells, strict=True):
                axis.imshow(faded, **over)
                shades = {"cmap": "viridis", "vmin": 0, "vmax": top, "alpha": 0.66, "interpolation": "nearest"}
                image_of = axis.imshow(drawn, **shades, **over)
                axis.set_xlabel(f"“{maps[name][part]['word']}”: {drawn.sum():.0f}% in all", fontsize=8.5)
            column[0].set_title(HEADS[part], fontsize=8.5)
            bar = figure.colorbar(image_of, ax=column, location="bottom", shrink=0.9, aspect=16, pad=0.02)
            bar.set_label("% of attention", fontsize=8)
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
