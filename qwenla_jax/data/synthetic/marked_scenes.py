"""Rendered scenes whose objects bear marks, discs in another colour, a pure function of (seed, split, index).

Paper silent: it has no such data. A caption has size, colour and shape, as for scenes without marks, and never the
mark: a question about a mark is answered from the image, not from the text so far.
"""

import numpy as np
from PIL import ImageDraw

from qwenla_jax.data.synthetic.scenes import Scene, SceneObject, place, render

# One token each in the embedded tokenizer. They differ in colour: forms of one colour (dot, bar, cross) were
# not learned by the embedded model in 5,000 steps.
MARKS: tuple[str, ...] = ("none", "black", "gray")
MIN_OBJECTS, MAX_OBJECTS = 3, 5

_DISC = 0.55  # a mark's radius, in radii of its object
_RGB = {"black": (20, 20, 20), "gray": (205, 205, 205)}


def make_marked_scene(seed: int, split: int, index: int) -> Scene:
    """Places and draws 3 to 5 objects with marks, no two alike in size, colour and shape.

    Args:
      seed, split, index: as in `scenes.make_scene`; the scenes are different ones.

    Raises:
      ValueError: an argument is negative.
    """
    if min(seed, split, index) < 0:
        raise ValueError(f"seed={seed}, split={split}, index={index}: expected numbers that are at least 0")
    rng = np.random.default_rng([seed, split, index, 2])
    objects = place(rng, int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1)), MAX_OBJECTS, MARKS)
    return Scene(objects, render(objects, rng, _draw_mark))


def _draw_mark(draw: ImageDraw.ImageDraw, thing: SceneObject, scale: int) -> None:
    if thing.mark in _RGB:
        x, y, reach = thing.x * scale, thing.y * scale, _DISC * thing.radius * scale
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=_RGB[thing.mark])
