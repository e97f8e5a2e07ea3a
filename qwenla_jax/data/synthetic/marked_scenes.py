"""Rendered scenes whose objects bear marks, discs in another colour, a pure function of (seed, split, index).

Paper silent: it has no such data. A caption has size, colour and shape, as for scenes without marks, and never the
mark: a question about a mark is answered from the image, not from the text so far.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from qwenla_jax.data.synthetic.scenes import (
    COLORS,
    MIN_VISIBLE,
    SHAPES,
    SIDE,
    Scene,
    SceneObject,
    area_of,
    draw_object,
    draw_shape,
    render,
)

# One token each in the embedded tokenizer. They differ in colour: forms of one colour (dot, bar, cross) were
# not learned by the embedded model in 5,000 steps.
MARKS: tuple[str, ...] = ("none", "black", "gray")
MIN_OBJECTS, MAX_OBJECTS = 3, 5
MARK_REACH = 0.65  # radii; no mark is farther from the centre, and no other object closer

_DISC = 0.55  # a mark's radius, in radii of its object
_RGB = {"black": (20, 20, 20), "gray": (205, 205, 205)}


@dataclass(frozen=True)
class MarkedObject(SceneObject):
    """One shape with its mark.

    Attributes:
      mark: a word out of MARKS.
    """

    mark: str


def make_marked_scene(seed: int, split: int, index: int) -> Scene:
    """Places and draws 3 to 5 `MarkedObject`s, no two alike in size, colour and shape.

    Args:
      seed, split, index: as in `scenes.make_scene`; the scenes are different ones.

    Raises:
      ValueError: an argument is negative.
    """
    if min(seed, split, index) < 0:
        raise ValueError(f"seed={seed}, split={split}, index={index}: expected numbers that are at least 0")
    rng = np.random.default_rng([seed, split, index, 2])
    objects = _place(rng)
    return Scene(objects, render(objects, rng, _draw_mark))


def _place(rng: np.random.Generator) -> tuple[MarkedObject, ...]:
    """As in `scenes`; in addition, no two objects have the same name and every mark is fully visible."""
    num = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    shapes = rng.permutation(len(SHAPES))[: rng.integers(2, len(SHAPES) + 1)]
    colors = rng.permutation(len(COLORS))[: rng.integers(2, 5)]
    # Few marks in a scene, so that several objects share one and a wrong guess is often one that occurs.
    marks = rng.permutation(len(MARKS))[: rng.integers(2, len(MARKS) + 1)]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    while True:  # the first objects may leave no place for the last; then all positions are drawn anew
        objects: list[MarkedObject] = []
        inner: list[np.ndarray] = []  # of each object, the pixels that its mark may need
        owners = Image.new("L", (SIDE, SIDE))
        for _ in range(20 * MAX_OBJECTS):
            if len(objects) == num:
                return tuple(objects)
            mark = MARKS[marks[rng.integers(len(marks))]]
            thing = MarkedObject(**vars(draw_object(rng, shapes, colors)), mark=mark)
            if str(thing) in map(str, objects):
                continue
            trial = owners.copy()
            draw_shape(ImageDraw.Draw(trial), thing, 1, fill=len(objects) + 1)
            visible, pixels = trial.histogram(), np.asarray(trial)
            if all(
                visible[i + 1] >= MIN_VISIBLE * area_of(other) and (pixels[inner[i]] == i + 1).all()
                for i, other in enumerate(objects)
            ):
                objects.append(thing)
                inner.append(np.hypot(columns - thing.x, rows - thing.y) <= MARK_REACH * thing.radius)
                # Only the pixels that the shape covers count.
                inner[-1] &= pixels == len(objects)
                owners = trial


def _draw_mark(draw: ImageDraw.ImageDraw, thing: SceneObject, scale: int) -> None:
    assert isinstance(thing, MarkedObject)
    if thing.mark != "none":
        x, y, reach = thing.x * scale, thing.y * scale, _DISC * thing.radius * scale
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=_RGB[thing.mark])
