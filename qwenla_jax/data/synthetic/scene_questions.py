"""Questions about rendered scenes, and structured responses to them; a pure function of (seed, split, index).

paper silent: the paper's cold start takes 2k records of LLaVA-CoT-100k with one reflection inserted by hand. Here the
response is written from the scene, to teach the format and the checking on images that a small model can read. The
reasoning is a short verdict. A reflection between reasoning and conclusion lists the relevant objects; where the
reasoning was wrong, it corrects it. So a response with a reflection has more evidence for its conclusion. The
conclusion is always right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject

KINDS: tuple[str, ...] = ("count", "existence", "attribute", "subtract", "compare")
Objects = Sequence[SceneObject]


@dataclasses.dataclass(frozen=True)
class SceneQuestion:
    """A question with its answer and a response.

    Attributes:
      kind: one of KINDS.
      question, answer: text; the answer is a number in digits, yes or no, or one word.
      response: all four sections, and perhaps one reflection; in plain style the same without sections.
      reasoning_right: False where the reasoning is wrong and the reflection corrects it.
    """

    kind: str
    question: str
    answer: str
    response: str
    reasoning_right: bool


@dataclasses.dataclass(frozen=True)
class Draft:
    """A question before its response is written.

    Attributes:
      question, answer: as in SceneQuestion.
      summary: what is asked, in few words.
      glance: the reasoning up to its verdict.
      wrong: a wrong verdict.
      check: what a reflection goes through, up to its verdict.
    """

    question: str
    summary: str
    answer: str
    glance: str
    wrong: str
    check: str


def caption_of(scene: Scene) -> str:
    """All objects in their canonical order."""
    return ", ".join(map(str, scene.in_order()))


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
      scene: `make_scene(seed, split, index)`.
      seed, split, index: the scene's; question and response are drawn from them.
      reflection_share: share of the responses that hold a reflection.
      correction_share: share of those reflections that correct a wrong reasoning.
      style: "structured": the paper's format; "plain": summary, caption, working with its verdict and the answer in a
        box, a line each, as an instruction model writes before it learns the format. Never wrong on the way, no
        reflections; "brief": the paper's format, but the caption gives the number of objects, the reasoning names what
        is asked for, and a reflection describes all objects: without one the answer is a guess at a glance.
    """
    rng = np.random.default_rng([seed, split, index, 1])  # one more number than the scene's: another stream
    things = scene.in_order()
    kind = KINDS[rng.integers(len(KINDS))]
    draft = MAKERS[kind](things, rng)
    if draft is None:  # no object is unique by two words
        kind, draft = "count", _count(things, rng)
    # Drawn in every case, so that the shares do not change the scene's question.
    reflects, corrects = rng.random() < reflection_share, rng.random() < correction_share
    return write(scene, kind, draft, draft.glance, reflects, corrects, style)


def write(
    scene: Scene,
    kind: str,
    draft: Draft,
    glance: str,
    reflects: bool,
    corrects: bool,
    style: str,
    boxed: bool = False,
) -> SceneQuestion:
    """A question with its response, from a draft.

    Args:
      scene: for the caption.
      kind: type of the question.
      draft: see there.
      glance: the reasoning up to its verdict, in place of the draft's.
      reflects, corrects: whether there is a reflection, and whether it corrects the reasoning.
      style: as in `ask`.
      boxed: whether the conclusion's answer is in a box, as a plain one's is.
    """
    box = f"\\boxed{{{draft.answer}}}"
    if style == "plain":
        # The order of the structured one: from another, formats were not learned in hundreds of steps.
        lines = draft.summary, caption_of(scene), f"{draft.check}: {draft.answer}", box
        response = "\n".join(lines)
        return SceneQuestion(kind, draft.question, draft.answer, response, True)
    corrects = corrects and reflects and style != "brief"
    if style == "brief":
        caption, reasoning, check = f"{len(scene.objects)} objects", glance, caption_of(scene)
    else:
        caption, reasoning = caption_of(scene), f"{glance}: {draft.wrong if corrects else draft.answer}"
        check = draft.check
    sections = [
        ("SUMMARY", draft.summary),
        ("CAPTION", caption),
        ("REASONING", reasoning),
        *([("REFLECTION", f"look again: {check}: {draft.answer}")] if reflects else []),
        ("CONCLUSION", box if boxed else draft.answer),
    ]
    response = "".join(f"<{name}>{text}</{name}>" for name, text in sections)
    return SceneQuestion(kind, draft.question, draft.answer, response, not corrects)


def _count(things: Objects, rng: np.random.Generator) -> Draft:
    """The number asked for is drawn first among those the scene offers, so that no number is much more frequent."""
    counts: dict[int, list[str]] = {}
    for word in (*SHAPES, *COLORS, *SIZES):
        counts.setdefault(sum(_is(thing, word) for thing in things), []).append(word)
    offered = sorted(counts)
    number = offered[rng.integers(len(offered))]
    word = counts[number][rng.integers(len(counts[number]))]
    noun = _plural(word)
    chosen = [thing for thing in things if _is(thing, word)]
    wrong = near_number(number, len(things), rng)
    return Draft(f"How many {noun} are there?", f"count {noun}", str(number), noun, str(wrong), listing(chosen, word))


def _existence(things: Objects, rng: np.random.Generator) -> Draft:
    """Half yes. The absent ones have a colour and a shape that occur, but not together (POPE's adversarial kind)."""
    present = sorted({(thing.color, thing.shape) for thing in things})
    near = [
        (color, shape)
        for color in sorted({thing.color for thing in things})
        for shape in SHAPES
        if (color, shape) not in present
    ]
    yes = bool(rng.integers(2)) or not near
    pairs = present if yes else near
    color, shape = pairs[rng.integers(len(pairs))]
    of_color = [thing for thing in things if thing.color == color]
    answer, wrong = ("yes", "no") if yes else ("no", "yes")
    return Draft(
        f"Is there a {color} {shape}?",
        f"find {color} {shape}",
        answer,
        f"{color} {shape}",
        wrong,
        listing(of_color),
    )


def _attribute(things: Objects, rng: np.random.Generator) -> Draft | None:
    """Asks for the third attribute of an object that is unique by the two others."""
    words: dict[str, tuple[str, ...]] = {"color": COLORS, "shape": SHAPES, "size": SIZES}
    options = []
    for asked in words:
        given = [name for name in ("size", "color", "shape") if name != asked]
        for thing in things:
            same = [o for o in things if all(getattr(o, name) == getattr(thing, name) for name in given)]
            if len(same) == 1:
                options.append((asked, given, thing))
    if not options:
        return None
    asked, given, thing = options[rng.integers(len(options))]
    noun = " ".join(getattr(thing, name) for name in given) + (" shape" if asked == "shape" else "")
    answer = getattr(thing, asked)
    others = [word for word in words[asked] if word != answer]
    wrong = others[rng.integers(len(others))]
    return Draft(f"What {asked} is the {noun}?", f"{asked} of {noun}", answer, noun, wrong, str(thing))


def _subtract(things: Objects, rng: np.random.Generator) -> Draft:
    """The subtracted word usually occurs in the scene."""
    words = [word for word in (*SHAPES, *COLORS) if any(_is(thing, word) for thing in things)]
    if rng.random() < 0.15:
        words = [*SHAPES, *COLORS]
    word = words[rng.integers(len(words))]
    left = [thing for thing in things if not _is(thing, word)]
    return Draft(
        f"Subtract all {_plural(word)}. How many objects are left?",
        f"subtract {_plural(word)}",
        str(len(left)),
        "left",
        str(near_number(len(left), len(things), rng)),
        listing(left),
    )


def _compare(things: Objects, rng: np.random.Generator) -> Draft:
    """Half yes, as far as the scene allows."""
    words = SHAPES if rng.integers(2) else COLORS
    number = {word: sum(_is(thing, word) for thing in things) for word in words}
    seen = [word for word in words if number[word]]
    pairs = [(a, b) for a in words for b in words if a != b and (a in seen or b in seen)]
    more = [(a, b) for a, b in pairs if number[a] > number[b]]
    want = bool(rng.integers(2)) and bool(more)
    fitting = more if want else [pair for pair in pairs if pair not in more]
    a, b = fitting[rng.integers(len(fitting))]
    answer, wrong = ("yes", "no") if want else ("no", "yes")
    return Draft(
        f"Are there more {_plural(a)} than {_plural(b)}?",
        f"compare {_plural(a)}, {_plural(b)}",
        answer,
        f"more {_plural(a)}",
        wrong,
        f"{_plural(a)} {number[a]}, {_plural(b)} {number[b]}",
    )


MAKERS: dict[str, Callable[[Objects, np.random.Generator], Draft | None]] = {
    "count": _count,
    "existence": _existence,
    "attribute": _attribute,
    "subtract": _subtract,
    "compare": _compare,
}


def _is(thing: SceneObject, word: str) -> bool:
    return word in (thing.shape, thing.color, thing.size)


def _plural(word: str) -> str:
    return f"{word}s" if word in SHAPES else f"{word} shapes"


def _short(thing: SceneObject, word: str = "") -> str:
    """Two words, of which one is the size where the question is about it."""
    return f"{thing.size if word in SIZES else thing.color} {thing.shape}"


def listing(things: Objects, word: str = "") -> str:
    """Objects by two words each, distinct for a question about `word`; "none" where there is none."""
    return ", ".join(_short(thing, word) for thing in things) or "none"


def listing_with_marks(things: Objects) -> str:
    """Objects by name, each with its mark behind it."""
    return ", ".join(f"{thing} {thing.mark}" for thing in things)


def near_number(number: int, most: int, rng: np.random.Generator) -> int:
    """A number one off, from 0 to `most`."""
    offered = [n for n in (number - 1, number + 1) if 0 <= n <= most]
    return offered[rng.integers(len(offered))]
