"""Answers to questions about scenes, from the objects and the words of the question alone; the format of responses."""

import re

from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES, SIZES

SECTION = r"<{0}>[^<>]*</{0}>"
GRAMMAR = re.compile(
    "".join(SECTION.format(n) for n in ("SUMMARY", "CAPTION", "REASONING"))
    + f"({SECTION.format('REFLECTION')})?"
    + "<CONCLUSION>([^<>]*)</CONCLUSION>"
)


def recount(scene, question):
    """The answer, from the objects and the words of the question alone."""
    things = scene.objects
    words = re.findall(r"[a-z]+", question.lower())
    named = [w.removesuffix("s") if w.removesuffix("s") in SHAPES else w for w in words]
    named = [w for w in named if w in SHAPES + COLORS + SIZES]
    has = lambda thing, word: word in (thing.shape, thing.color, thing.size)  # noqa: E731
    number = lambda *ws: sum(all(has(t, w) for w in ws) for t in things)  # noqa: E731
    if question.startswith("How many"):
        return str(number(named[0]))
    if question.startswith("Is there"):
        return "yes" if number(*named) else "no"
    if question.startswith("Subtract"):
        return str(len(things) - number(named[0]))
    if question.startswith("Are there more"):
        return "yes" if number(named[0]) > number(named[1]) else "no"
    attribute = re.match(r"What (\w+) is", question)[1]
    fitting = {getattr(t, attribute) for t in things if all(has(t, w) for w in named)}
    assert len(fitting) == 1, question
    return fitting.pop()
