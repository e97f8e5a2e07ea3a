"""Rendered scenes: a few coloured shapes on a light ground, a pure function of (seed, split, index).

Paper silent: it has no such data. The images exist so that the whole pipeline runs without a download, and are made
so that a small model can read them with some errors: shapes are off any grid, partly cover each other, and are noisy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 112  # pixels; a multiple of 28, so that Qwen2.5-VL's resize does not change the image
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
SIZES: tuple[str, ...] = ("small", "big")
COLORS: tuple[str, ...] = ("red", "yellow", "green", "blue", "purple")
MAX_OBJECTS = 4
MIN_VISIBLE = 0.55  # of an object's area; the rest may be covered by later objects
MARK_REACH = 0.65  # radii; no mark is farther from the centre, and no other object closer

_RGB = ((214, 40, 40), (238, 214, 44), (44, 158, 72), (40, 92, 220), (142, 58, 182))
_NUM_OBJECTS_CDF = (0.1, 0.35, 0.7, 1.0)
_RADIUS = ((8.5, 10.5), (14.5, 17.5))  # pixels, lowest and highest for each of SIZES
_SUPERSAMPLE = 2
_COLOR_JITTER = 10  # of 255
_SQUARE_HALF = 0.88  # half a side, in radii
_TRIANGLE_TIP = 1.3  # centre to corner, in radii; the farthest that any shape reaches


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
      shape, color, size: words out of SHAPES, COLORS, SIZES.
      x, y: centre in pixels from the left and from the top.
      radius: pixels; a circle's radius, and the scale of the other shapes, which have about the circle's area.
      angle: rotation in radians (at most 0.2).
      rgb: the fill colour before noise and shading.
      mark: a word out of `marked_scenes.MARKS`; empty in scenes without marks.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """An image and what is on it.

    Attributes:
      objects: in drawing order, so later ones cover earlier ones.
      image: RGB, 112x112 pixels.
    """

    objects: tuple[SceneObject, ...]
    image: Image.Image

    def in_order(self) -> tuple[SceneObject, ...]:
        """The objects by size, colour and shape: the canonical order of captions.

        An order by place would require a small model to compare positions first.
        """
        rank = lambda thing: (SIZES.index(thing.size), COLORS.index(thing.color), SHAPES.index(thing.shape))  # noqa: E731
        return tuple(sorted(self.objects, key=rank))


def make_scene(seed: int, split: int, index: int) -> Scene:
    """Places and draws the objects of one scene, a pure function of its three arguments (each at least 0).

    Args:
      seed: of the whole set of scenes.
      split: 0 for training, 1 for held-out scenes, any other number for another disjoint set.
      index: the scene in its split.

    Raises:
      ValueError: an argument is negative.
    """
    if min(seed, split, index) < 0:
        raise ValueError(f"seed={seed}, split={split}, index={index}: expected numbers that are at least 0")
    rng = np.random.default_rng([seed, split, index])
    objects = place(rng, 1 + int(np.searchsorted(_NUM_OBJECTS_CDF, rng.random())), MAX_OBJECTS)
    return Scene(objects, render(objects, rng))


def render(
    objects: Sequence[SceneObject],
    rng: np.random.Generator,
    detail: Callable[[ImageDraw.ImageDraw, SceneObject, int], None] | None = None,
) -> Image.Image:
    """Draws objects in their order on a light ground with a slight shading and noise out of `rng`.

    Args:
      objects: what is drawn.
      rng: of ground, shading and noise.
      detail: draws details of an object, right after it: (canvas, object, pixels of the canvas a pixel).

    Returns:
      RGB, 112x112 pixels.
    """
    grey = rng.integers(196, 240)
    tint = rng.integers(-8, 9, size=3)
    ground = tuple(int(grey + shift) for shift in tint)
    side = SIDE * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for thing in objects:
        # A darker rim separates overlapping shapes of one colour.
        rim = tuple(value * 6 // 10 for value in thing.rgb)
        draw_shape(draw, thing, _SUPERSAMPLE, fill=thing.rgb, outline=rim, width=_SUPERSAMPLE)
        if detail is not None:
            detail(draw, thing, _SUPERSAMPLE)
    pixels = np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.int16)
    slope_x, slope_y = rng.uniform(-12.0, 12.0, size=2)
    ramp = np.linspace(-1.0, 1.0, SIDE)
    shade = np.rint(slope_x * ramp[None, :] + slope_y * ramp[:, None]).astype(np.int16)
    noise = np.frombuffer(rng.bytes(SIDE * SIDE * 3), dtype=np.uint8).reshape(SIDE, SIDE, 3) & 15
    noisy = pixels + (shade - 8)[:, :, None] + noise
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def place(rng: np.random.Generator, num: int, most: int, marks: Sequence[str] = ()) -> tuple[SceneObject, ...]:
    """Draws attributes and positions of `num` objects; a position that covers too much of another is drawn again.

    Args:
      rng: of everything drawn.
      num, most: how many objects, and how many a scene of this kind has at most.
      marks: the words for marks; with marks no two objects have the same name, and every mark is fully visible.
    """
    # A scene has few colours, shapes and marks, so that equal ones come together and counts above 1 are common.
    shapes = rng.permutation(len(SHAPES))[: rng.integers(2, len(SHAPES) + 1)]
    colors = rng.permutation(len(COLORS))[: rng.integers(2, 5)]
    offered = rng.permutation(len(marks))[: rng.integers(2, len(marks) + 1)] if marks else []
    rows, columns = np.mgrid[:SIDE, :SIDE]
    while True:  # the first objects may leave no place for the last; then all positions are drawn anew
        objects: list[SceneObject] = []
        inner: list[np.ndarray] = []  # of each object, the pixels that its mark may need
        owners = Image.new("L", (SIDE, SIDE))
        for _ in range(20 * most):
            if len(objects) == num:
                return tuple(objects)
            mark = marks[offered[rng.integers(len(offered))]] if marks else ""
            thing = replace(_draw_object(rng, shapes, colors), mark=mark)
            if marks and str(thing) in map(str, objects):
                continue
            trial = owners.copy()
            draw_shape(ImageDraw.Draw(trial), thing, 1, fill=len(objects) + 1)
            visible, pixels = trial.histogram(), np.asarray(trial)
            if all(
                visible[i + 1] >= MIN_VISIBLE * _area_of(other) and (pixels[inner[i]] == i + 1).all()
                for i, other in enumerate(objects)
            ):
                objects.append(thing)
                reach = MARK_REACH * thing.radius if marks else -1.0
                inner.append((np.hypot(columns - thing.x, rows - thing.y) <= reach) & (pixels == len(objects)))
                owners = trial


def _draw_object(rng: np.random.Generator, shapes: np.ndarray, colors: np.ndarray) -> SceneObject:
    """One object with its place, drawn from numbers of SHAPES and of COLORS (int [.] each)."""
    shape = int(shapes[rng.integers(len(shapes))])
    color = int(colors[rng.integers(len(colors))])
    size = int(rng.integers(len(SIZES)))
    u_radius, u_x, u_y, u_angle = rng.random(4)
    low, high = _RADIUS[size]
    radius = low + (high - low) * u_radius
    margin = _TRIANGLE_TIP * radius + 1.0
    jitter = rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, size=3)
    red, green, blue = (min(255, max(0, int(v + j))) for v, j in zip(_RGB[color], jitter, strict=True))
    return SceneObject(
        shape=SHAPES[shape],
        color=COLORS[color],
        size=SIZES[size],
        x=margin + (SIDE - 2 * margin) * u_x,
        y=margin + (SIDE - 2 * margin) * u_y,
        radius=radius,
        angle=0.4 * (u_angle - 0.5),
        rgb=(red, green, blue),
    )


def draw_shape(draw: ImageDraw.ImageDraw, thing: SceneObject, scale: int, **style: Any) -> None:
    """Draws an object's outline on a canvas of `scale` pixels a pixel, in a style of ImageDraw's."""
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), **style)
        return
    corners = [
        (x + r * reach * math.sin(thing.angle + turn), y - r * reach * math.cos(thing.angle + turn))
        for reach, turn in _corners(thing.shape)
    ]
    draw.polygon(corners, **style)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners as (distance in radii, angle clockwise from straight up)."""
    if shape == "square":
        return [(_SQUARE_HALF * math.sqrt(2.0), math.pi * (0.25 + 0.5 * i)) for i in range(4)]
    return [(_TRIANGLE_TIP, 2.0 * math.pi * i / 3.0) for i in range(3)]


def _area_of(thing: SceneObject) -> float:
    """Square pixels of the whole shape."""
    if thing.shape == "circle":
        unit = math.pi
    elif thing.shape == "square":
        unit = (2.0 * _SQUARE_HALF) ** 2
    else:
        unit = 0.75 * math.sqrt(3.0) * _TRIANGLE_TIP**2
    return unit * thing.radius**2
