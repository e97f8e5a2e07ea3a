"""Questions about scenes, their answers, and structured responses in the paper's answer format.

Paper silent: it has no such data. Answers are balanced by drawing the answer first and then a question that has it.
Responses use few words, so that the small tokenizer has each as one token. A mistake in a reasoning is what a model
would really do: one object is taken for a member of a group or is missed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qwenla_jax.data.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject
from qwenla_jax.text.special_tokens import REFLECTION_CLOSE, REFLECTION_OPEN, SECTION_TAGS

KINDS: tuple[str, ...] = ("count", "existence", "attribute", "subtract", "compare")

# How often an answer of 0, 1, ... is asked for where the scene offers it: small numbers are nearly always on offer.
_COUNT_WEIGHTS = (0.35, 0.6, 1.6, 5.0, 12.0, 20.0)
_LEFT_WEIGHTS = (1.0, 1.0, 1.3, 1.6, 2.6, 1.0)


@dataclass(frozen=True)
class SceneQuestion:
    """A question about one scene and all that its response is made of.

    Attributes:
      kind: one of KINDS.
      question, answer: the answer bare ("yes", "3", "red", "circle").
      summary, caption, reasoning: right contents of these sections; the reasoning leads to the answer.
      mistake: a wrong reasoning that could be a misperception.
      check: what a reflection finds when it looks at the scene again.
    """

    kind: str
    question: str
    answer: str
    summary: str
    caption: str
    reasoning: str
    mistake: str
    check: str


@dataclass(frozen=True)
class _Group:
    """Objects that share a colour, a shape, or both; None stands for any."""

    color: str | None = None
    shape: str | None = None

    def __contains__(self, thing: SceneObject) -> bool:
        return self.color in (None, thing.color) and self.shape in (None, thing.shape)

    def plural(self) -> str:
        """As in "red objects", "circles", "red circles"."""
        return f"{self.color} {self.shape or 'object'}s" if self.color else f"{self.shape}s"

    def label(self) -> str:
        """As in "red", "circle", "red circle"."""
        return " ".join(word for word in (self.color, self.shape) if word)

    def distinguish(self, thing: SceneObject) -> str:
        """The word by which members of the group differ."""
        if self.color and self.shape:
            return thing.size
        return thing.shape if self.color else thing.color


def ask(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    """One question about a scene, its kind drawn evenly from KINDS.

    Where a scene admits no question of the kind (an attribute needs an object that a description singles out), the
    next kind in KINDS is taken.
    """
    makers: tuple[Callable[[Scene, np.random.Generator], SceneQuestion | None], ...] = (
        _count,
        _existence,
        _attribute,
        _subtract,
        _compare,
    )
    first = int(rng.integers(len(makers)))
    for i in range(len(makers)):
        question = makers[(first + i) % len(makers)](scene, rng)
        if question is not None:
            return question
    raise ValueError("a scene without objects admits no question; expected at least 1 object")


def write_response(
    question: SceneQuestion, rng: np.random.Generator, reflection_share: float = 0.5, correction_share: float = 0.3
) -> str:
    """A response in the paper's answer format (paper, the answer format): the conclusion is always right.

    Args:
      question: what to answer.
      rng: decides on the reflection; always two draws are taken, so the shares do not move anything else.
      reflection_share: how often exactly one reflection stands between reasoning and conclusion.
      correction_share: how often such a reflection corrects a wrong reasoning ("wait") instead of confirming a right
        one ("again").
    """
    u_reflection, u_correction = rng.random(2)
    reflect = u_reflection < reflection_share
    correct = reflect and u_correction < correction_share
    reflection = f"{'wait' if correct else 'again'}, {question.check}" if reflect else None
    reasoning = question.mistake if correct else question.reasoning
    return structured_response(question.summary, question.caption, reasoning, reflection, question.answer)


def structured_response(summary: str, caption: str, reasoning: str, reflection: str | None, conclusion: str) -> str:
    """Puts contents between the tags, sections back to back, the reflection (if any) before the conclusion."""
    contents = (summary, caption, reasoning, conclusion)
    parts = [f"{SECTION_TAGS[2 * i]}{text}{SECTION_TAGS[2 * i + 1]}" for i, text in enumerate(contents)]
    if reflection is not None:
        parts.insert(3, f"{REFLECTION_OPEN}{reflection}{REFLECTION_CLOSE}")
    return "".join(parts)


def _count(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    things = scene.left_to_right()
    groups = [*_single_groups(), *(_Group(color, shape) for color in COLORS for shape in SHAPES)]
    sizes = [sum(thing in group for thing in things) for group in groups]
    group = groups[_draw_by_answer(sizes, _COUNT_WEIGHTS, rng)]
    members = [thing in group for thing in things]
    slip = _flip(members, rng)

    def listing(picked: Sequence[bool]) -> str:
        words = [group.distinguish(thing) for thing, one in zip(things, picked, strict=True) if one]
        return f"{group.label()}: {_list(words)} = {len(words)}"

    return SceneQuestion(
        kind="count",
        question=f"How many {group.plural()} are there?",
        answer=str(sum(members)),
        summary=f"count {group.plural()}",
        caption=_caption(things),
        reasoning=listing(members),
        mistake=listing(slip),
        check=listing(members),
    )


def _subtract(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    things = scene.left_to_right()
    groups = _single_groups()
    sizes = [sum(thing not in group for thing in things) for group in groups]
    # An absent group is asked for now and then: subtracting nothing is a question about what is not there.
    if rng.random() < 0.9:
        sizes = [size if size < len(things) else -1 for size in sizes]
    group = groups[_draw_by_answer(sizes, _LEFT_WEIGHTS, rng)]
    left = [thing not in group for thing in things]
    slip = _flip(left, rng)

    def listing(picked: Sequence[bool]) -> str:
        words = [thing.shape if group.shape else thing.color for thing, one in zip(things, picked, strict=True) if one]
        return f"left: {_list(words)} = {len(words)}"

    return SceneQuestion(
        kind="subtract",
        question=f"Subtract all {group.plural()}. How many objects are left?",
        answer=str(sum(left)),
        summary=f"subtract {group.plural()}",
        caption=_caption(things),
        reasoning=listing(left),
        mistake=listing(slip),
        check=listing(left),
    )


def _existence(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    things = scene.left_to_right()
    yes = bool(rng.random() < 0.5)
    by_shape = rng.random() < 0.2
    if by_shape:
        groups = [_Group(shape=shape) for shape in SHAPES]
    else:
        groups = [_Group(color, shape) for color in COLORS for shape in SHAPES]
    groups = [group for group in groups if any(thing in group for thing in things) == yes]
    if not groups:  # every shape is there
        return None
    if not yes and not by_shape and rng.random() < 0.75:
        # POPE's adversarial half: what is not there shares its colour and its shape with what is.
        near = [group for group in groups if _near(group, things) == 2]
        groups = near or [group for group in groups if _near(group, things) == 1] or groups
    group = groups[rng.integers(len(groups))]
    described = group.label()
    asked = _Group(color=group.color) if group.color else _Group(shape=group.shape)
    other = _Group(shape=group.shape)

    def listing(among: _Group, objects: Sequence[SceneObject]) -> str:
        return f"{among.label()}: {_list([among.distinguish(thing) for thing in objects if thing in among])}"

    return SceneQuestion(
        kind="existence",
        question=f"Is there {'an' if described[0] in 'aeiou' else 'a'} {described}?",
        answer="yes" if yes else "no",
        summary=f"find {described}",
        caption=_caption(things),
        reasoning=listing(asked, things),
        mistake=_existence_mistake(asked, group, yes, things, rng),
        check=listing(other, things),
    )


def _existence_mistake(
    asked: _Group, group: _Group, yes: bool, things: Sequence[SceneObject], rng: np.random.Generator
) -> str:
    """Misses what is asked for where it is there, else sees one object as what is asked for."""
    if yes:
        kept = [thing for thing in things if thing not in group]
        return f"{asked.label()}: {_list([asked.distinguish(thing) for thing in kept if thing in asked])}"
    closeness = [_near(group, [thing]) for thing in things]
    closest = [i for i, near in enumerate(closeness) if near == max(closeness)]
    misread = closest[rng.integers(len(closest))]
    words = []
    for i, thing in enumerate(things):
        if i == misread:
            words.append(group.shape or "" if group.color else thing.color)
        elif thing in asked:
            words.append(asked.distinguish(thing))
    return f"{asked.label()}: {_list(words)}"


def _attribute(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    things = scene.left_to_right()
    of_color = bool(rng.random() < 0.5)
    with_size = bool(rng.random() < 0.5)

    def describe(thing: SceneObject, sized: bool) -> str:
        word = thing.shape if of_color else thing.color
        return f"{thing.size} {word}" if sized else word

    for sized in (with_size, not with_size):
        descriptions = [describe(thing, sized) for thing in things]
        unique = [i for i, words in enumerate(descriptions) if descriptions.count(words) == 1]
        if unique:
            break
    else:
        return None
    thing = things[unique[rng.integers(len(unique))]]
    described = describe(thing, sized) if of_color else f"{describe(thing, sized)} object"
    answer = thing.color if of_color else thing.shape
    seen = {other.color if of_color else other.shape for other in things} - {answer}
    wrong = sorted(seen) or [word for word in (COLORS if of_color else SHAPES) if word != answer]
    asked = "color" if of_color else "shape"
    return SceneQuestion(
        kind="attribute",
        question=f"What {asked} is the {described}?",
        answer=answer,
        summary=f"{asked} of {described}",
        caption=_caption(things),
        reasoning=f"{described}: {answer}",
        mistake=f"{described}: {wrong[rng.integers(len(wrong))]}",
        check=f"{described}: {answer}",
    )


def _compare(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    things = scene.left_to_right()
    yes = bool(rng.random() < 0.5)
    by_shape = bool(rng.random() < 0.5)
    groups = [_Group(shape=shape) for shape in SHAPES] if by_shape else [_Group(color=color) for color in COLORS]
    sizes = [sum(thing in group for thing in things) for group in groups]
    pairs = [(i, j) for i, a in enumerate(sizes) for j, b in enumerate(sizes) if i != j and a + b > 0 and (a > b) == yes]
    both = [(i, j) for i, j in pairs if min(sizes[i], sizes[j]) > 0]
    if both and rng.random() < 0.7:  # a comparison with nothing is easier
        pairs = both
    first, second = (groups[i] for i in pairs[rng.integers(len(pairs))])
    # The mistake: one object is taken for a member of the other group, or of none, so that the comparison turns over
    # where one object can do that.
    seen = [0 if thing in first else 1 if thing in second else 2 for thing in things]
    slips = [[*seen[:i], side, *seen[i + 1 :]] for i in range(len(things)) for side in range(3) if side != seen[i]]
    turned = [slip for slip in slips if (slip.count(0) > slip.count(1)) != yes]
    slips = turned or slips
    slip = slips[rng.integers(len(slips))]

    def listing(sides: Sequence[int]) -> str:
        parts = []
        for side, group in enumerate((first, second)):
            words = [group.distinguish(thing) for thing, one in zip(things, sides, strict=True) if one == side]
            parts.append(f"{group.label()}: {_list(words)}")
        return ", ".join(parts)

    if by_shape:
        question = f"Are there more {first.plural()} than {second.plural()}?"
        summary = f"compare {first.plural()} and {second.plural()}"
    else:
        question = f"Are there more {first.color} than {second.color} objects?"
        summary = f"compare {first.color} and {second.color}"
    return SceneQuestion(
        kind="compare",
        question=question,
        answer="yes" if yes else "no",
        summary=summary,
        caption=_caption(things),
        reasoning=listing(seen),
        mistake=listing(slip),
        check=f"{first.label()} = {seen.count(0)}, {second.label()} = {seen.count(1)}",
    )


def _single_groups() -> list[_Group]:
    return [*(_Group(color=color) for color in COLORS), *(_Group(shape=shape) for shape in SHAPES)]


def _draw_by_answer(answers: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> int:
    """Draws an answer by weight from those on offer, then evenly one of its groups; negative answers are barred."""
    offered = sorted({answer for answer in answers if answer >= 0})
    if not offered:
        raise ValueError("no question has an answer; expected a scene with at least 1 object")
    edges = np.cumsum([weights[answer] for answer in offered])
    answer = offered[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
    places = [i for i, value in enumerate(answers) if value == answer]
    return places[rng.integers(len(places))]


def _flip(members: Sequence[bool], rng: np.random.Generator) -> list[bool]:
    """One object misjudged."""
    i = int(rng.integers(len(members)))
    return [member != (j == i) for j, member in enumerate(members)]


def _near(group: _Group, things: Sequence[SceneObject]) -> int:
    """How many of the group's colour and shape occur among the objects, 0 to 2."""
    return sum(
        [
            any(thing.color == group.color for thing in things),
            any(thing.shape == group.shape for thing in things),
        ]
    )


def _caption(things: Sequence[SceneObject]) -> str:
    return ", ".join(str(thing) for thing in things)


def _list(words: Sequence[str]) -> str:
    return " ".join(words) if words else "none"


def vocabulary() -> tuple[str, ...]:
    """Every attribute word; the small tokenizer should have each as one token."""
    return (*SIZES, *COLORS, *SHAPES)
