"""Questions whose reasoning has a chosen length and a result that joins what is seen: a function of its arguments.

Paper silent: it has no such data. A reasoning counts down and carries a number from step to step, so that its working
has to be kept: `27:3+4,26:7+4,25:1+4,24:5` adds 4 to 3 while 27 falls to 24, last digits alone. The control carries the
number without working, between words: `27 there are the objects,26 there are the objects,25 ...,24:3`. A step of either
has 7 tokens in the embedded tokenizer, and any step follows from the one before it, so that a model that knows short
ones has seen every step of the long ones. Nothing in question, summary and reasoning depends on where objects are.

A told scene stands in the question in words, and is described after the reasoning as a seen one is: such answers are
whole behind a long reasoning, and nothing in them is read from an image. A cut response is one of a seen scene that
breaks off behind its reasoning: a long working of such a question is learned, and nothing that is read behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qwenla_jax.data.synthetic.length_options import LengthOptions, steps_of
from qwenla_jax.data.synthetic.marked_scenes import MARKS, make_marked_scene
from qwenla_jax.data.synthetic.scene_questions import MAKERS, Objects, SceneQuestion, caption_of, listing_with_marks
from qwenla_jax.data.synthetic.scenes import Scene

LENGTH_KINDS = ("count", "mark_count", "mark_of")
_FILLER = " there are the objects"
_TOLD = 2**40  # from the index of an image's scene to that of the told one, which is the scene of no image


@dataclasses.dataclass(frozen=True)
class Joined:
    """What a question asks to see, and how that joins the result of the working.

    Attributes:
      question, summary: texts.
      conclude: result of the working, 0 to 9 -> (what stands before the answer's box, the answer).
    """

    question: str
    summary: str
    conclude: Callable[[int], tuple[str, str]]


def ask(
    scene: Scene, seed: int, split: int, index: int, options: LengthOptions, style: str = "structured"
) -> SceneQuestion:
    """The question of a scene. What is asked to see does not depend on `options`.

    Args:
      scene: `make_marked_scene(seed, split, index)`.
      seed, split, index: the scene's; everything is drawn from them.
      options: of the reasoning.
      style: "structured", with the paper's tags; "plain": the same lines without tags and without a reflection.
    """
    rng = np.random.default_rng([seed, split, index, 4])
    kind = LENGTH_KINDS[rng.integers(len(LENGTH_KINDS))]
    if options.told:
        scene = make_marked_scene(seed, split, index + _TOLD)
    joined, listing = _MAKERS[kind](scene.in_order(), rng), listing_with_marks(scene.in_order())
    rng = np.random.default_rng([seed, split, index, 5])
    working = options.workings[rng.integers(len(options.workings))]
    order = options.orders[rng.integers(len(options.orders))]
    steps = int(rng.integers(steps_of(options.low), steps_of(options.high) + 1))
    first, added = int(rng.integers(10)), int(rng.integers(1, 10))
    start = int(rng.integers(10 + steps, 100))
    end = start - steps
    if working == "chain":
        given = f"From {start} to {end} add {added} to {first}."
        values = [(first + added * step) % 10 for step in range(steps + 1)]
        parts = [f"{start - step}:{value}+{added}" for step, value in enumerate(values[:-1])]
    else:
        given, values = f"From {start} to {end} keep {first}.", [first]
        parts = [f"{start - step}{_FILLER}" for step in range(steps)]
    reasoning = ",".join([*parts, f"{end}:{values[-1]}"])
    before, answer = joined.conclude(values[-1])
    conclusion = f"{before}\\boxed{{{answer}}}"
    words = "look again" if options.words else ""
    if order == "after":
        sections = [("SUMMARY", joined.summary), ("REASONING", reasoning), ("REFLECTION", words), ("CAPTION", listing)]
    else:
        sections = [("SUMMARY", joined.summary), ("CAPTION", caption_of(scene)), ("REASONING", reasoning)]
        sections += [("REFLECTION", f"{words}: {listing}" if words else "")]
    sections.append(("CONCLUSION", conclusion))
    if options.cut:
        sections = sections[: [name for name, _ in sections].index("REASONING") + 1]
    if style == "plain":
        response = "\n".join(text.removeprefix("look again").removeprefix(": ") for _, text in sections if text)
        response = response.replace("\n\n", "\n")
    else:
        response = "".join(f"<{name}>{text}</{name}>" for name, text in sections)
    told = f" Told: {listing}." if options.told else ""
    return SceneQuestion(kind, f"{given}{told} {joined.question}", answer, response, True)


def _add(number: int) -> Callable[[int], tuple[str, str]]:
    return lambda result: (f"{result}+{number}=", str((result + number) % 10))


def _count(things: Objects, rng: np.random.Generator) -> Joined:
    draft = MAKERS["count"](things, rng)
    assert draft is not None
    return Joined(f"Add: {draft.question}", draft.summary.replace("count", "add"), _add(int(draft.answer)))


def _mark_count(things: Objects, rng: np.random.Generator) -> Joined:
    """The number is drawn first among those that the scene offers."""
    counts: dict[int, list[str]] = {}
    for mark in MARKS[1:]:
        counts.setdefault(sum(thing.mark == mark for thing in things), []).append(mark)
    offered = sorted(counts)
    number = offered[rng.integers(len(offered))]
    mark = counts[number][rng.integers(len(counts[number]))]
    return Joined(f"Add: How many objects have a {mark} mark?", f"add {mark} marks", _add(number))


def _mark_of(things: Objects, rng: np.random.Generator) -> Joined:
    """Two objects, with different marks where the scene has such, so that the working decides between two answers."""
    pairs = [(a, b) for a in things for b in things if a != b]
    pairs = [(a, b) for a, b in pairs if a.mark != b.mark] or pairs
    even, odd = pairs[rng.integers(len(pairs))]

    def conclude(result: int) -> tuple[str, str]:
        thing = odd if result % 2 else even
        return f"{result} {'odd' if result % 2 else 'even'} {thing}: ", thing.mark

    question = f"What mark is on the {even} if even, on the {odd} if odd?"
    return Joined(question, f"mark of {even}, {odd}", conclude)


_MAKERS: dict[str, Callable[[Objects, np.random.Generator], Joined]] = {
    "count": _count,
    "mark_count": _mark_count,
    "mark_of": _mark_of,
}
