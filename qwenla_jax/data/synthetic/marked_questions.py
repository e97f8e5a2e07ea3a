"""Questions about scenes with marks, and structured responses to them; a pure function of (seed, split, index).

Paper silent: see `scene_questions`, which makes two fifths of the questions. The others ask about a mark, which the
caption does not name. The reasoning derives the answer, listing the marks of all objects for a question about marks;
one that a reflection corrects names the objects alone, and its verdict is a guess. A reflection names the relevant
objects with their marks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qwenla_jax.data.synthetic.marked_scenes import MARKS
from qwenla_jax.data.synthetic.scene_questions import (
    KINDS,
    MAKERS,
    Draft,
    Objects,
    SceneQuestion,
    caption_of,
    listing_with_marks,
    near_number,
    write,
)
from qwenla_jax.data.synthetic.scenes import Scene, SceneObject

MARK_KINDS: tuple[str, ...] = ("mark", "same_mark", "mark_existence")
MARKED_KINDS: tuple[str, ...] = (*MARK_KINDS, *KINDS)
MARK_SHARE = 0.6  # of the questions


def ask(
    scene: Scene,
    seed: int,
    split: int,
    index: int,
    reflection_share: float = 0.5,
    correction_share: float = 0.3,
    style: str = "structured",
) -> SceneQuestion:
    """The question of a scene.

    Args:
      scene: `make_marked_scene(seed, split, index)`.
      seed, split, index, reflection_share, correction_share, style: as in `scene_questions.ask`.
    """
    rng = np.random.default_rng([seed, split, index, 3])
    things = scene.in_order()
    kinds = MARK_KINDS if rng.random() < MARK_SHARE else KINDS
    kind = kinds[rng.integers(len(kinds))]
    draft = _MARK_MAKERS[kind](things, rng) if kind in _MARK_MAKERS else MAKERS[kind](things, rng)
    if draft is None:  # no object is unique by two words
        kind, draft = "count", MAKERS["count"](things, rng)
    assert draft is not None
    # Drawn in every case, so that the shares do not change the scene's question.
    reflects, corrects = rng.random() < reflection_share, rng.random() < correction_share
    # The base model learns to read marks from responses that list them all; with one mark a response it learned none.
    working = listing_with_marks(things) if kind in MARK_KINDS else draft.check
    if style == "plain":
        draft = dataclasses.replace(draft, check=working)
    # The working is where the base model has it: verdicts without it were not learned in hundreds of steps.
    reasoning = f"{caption_of(scene)}: {draft.glance}" if reflects and corrects else working
    # With the box the base model repeats its verdict: a conclusion without it did not follow the reasoning.
    return write(scene, kind, draft, reasoning, reflects, corrects, style, boxed=True)


def _mark(things: Objects, rng: np.random.Generator) -> Draft:
    thing = things[int(rng.integers(len(things)))]
    others = [mark for mark in MARKS if mark != thing.mark]
    wrong = others[rng.integers(len(others))]
    question = f"What mark is on the {thing}?"
    return Draft(question, f"mark of {thing}", thing.mark, str(thing), wrong, _marked(thing))


def _same_mark(things: Objects, rng: np.random.Generator) -> Draft:
    """Two steps: which mark, and what has it. The number is drawn first among those that the scene offers."""
    sharing = {thing: [other for other in things if other.mark == thing.mark] for thing in things}
    offered = sorted({len(others) for others in sharing.values()})
    number = offered[rng.integers(len(offered))]
    fitting = [thing for thing in things if len(sharing[thing]) == number]
    thing = fitting[rng.integers(len(fitting))]
    check = ", ".join([_marked(thing), *(str(other) for other in sharing[thing] if other != thing)])
    wrong = near_number(number, len(things), rng)
    question = f"How many objects have the mark of the {thing}?"
    return Draft(question, f"count mark of {thing}", str(number), str(thing), str(wrong), check)


def _mark_existence(things: Objects, rng: np.random.Generator) -> Draft:
    """Half yes. Absent pairs have a colour and, where possible, a mark that both occur, but not together."""
    marks = MARKS[1:]  # "with a none mark" is no question
    present = sorted({(thing.color, thing.mark) for thing in things if thing.mark in marks})
    colors = sorted({thing.color for thing in things})
    absent = [(color, mark) for color in colors for mark in marks if (color, mark) not in present]
    occurring = {thing.mark for thing in things}
    near = [pair for pair in absent if pair[1] in occurring] or absent
    yes = bool(rng.integers(2))
    pairs = present if yes and present else near or present
    color, mark = pairs[rng.integers(len(pairs))]
    answer, wrong = ("yes", "no") if (color, mark) in present else ("no", "yes")
    check = ", ".join(_marked(thing) for thing in things if thing.color == color)
    question = f"Is there a {color} shape with a {mark} mark?"
    return Draft(question, f"find {color} {mark}", answer, color, wrong, check)


_MARK_MAKERS: dict[str, Callable[[Objects, np.random.Generator], Draft]] = {
    "mark": _mark,
    "same_mark": _same_mark,
    "mark_existence": _mark_existence,
}


def _marked(thing: SceneObject) -> str:
    return f"{thing} {thing.mark}"
