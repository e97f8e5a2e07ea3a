"""Cases to read: where a reflection corrected the reasoning, spoiled it, or left it wrong (paper, figure 10)."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import re

from PIL import Image

from qwenla_jax.study.collect import COPY, ROUTE, TEXT, Study
from qwenla_jax.study.redraw import make_image
from qwenla_jax.study.tables import turns
from qwenla_jax.text.special_tokens import REFLECTION_CLOSE, REFLECTION_OPEN, TAGS

KINDS = (
    ((False, True), "The reflection corrects the reasoning", 2),
    ((True, False), "The reflection spoils the reasoning", 1),
    ((False, False), "The reflection leaves the reasoning wrong", 1),
)
_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS))


@dataclasses.dataclass(frozen=True)
class Case:
    """One question with the answers of several systems.

    Attributes:
      title: what the reflection did, in the answer with COPY.
      image: the image.
      question, answer: with the right answer.
      responses: (system, response, whether it is right).
    """

    title: str
    image: Image.Image
    question: str
    answer: str
    responses: tuple[tuple[str, str, bool], ...]


def cases(study: Study) -> list[Case]:
    """The first questions of each kind in the first seed's order, judged by the answers with COPY.

    Raises:
      StudyError: COPY was not evaluated.
    """
    one = study.of(COPY)[0]
    systems = study.seeds[0].systems
    result = []
    for wanted, title, count in KINDS:
        places = [index for index, turn in enumerate(turns(one)) if turn == wanted][:count]
        for index in places:
            shown = [(name, systems[name]) for name in (TEXT, COPY, ROUTE) if name in systems]
            result.append(
                Case(
                    title=title,
                    image=make_image(one, index),
                    question=one.texts[index]["question"],
                    answer=one.texts[index]["answer"],
                    responses=tuple(
                        (name, m.texts[index]["response"], bool(m.numbers["right"][index])) for name, m in shown
                    ),
                )
            )
    return result


def case_html(case: Case) -> str:
    """A case as HTML; all text is escaped, and reflections are marked."""
    alt = f"the scene that is asked about: {case.question}"
    rows = ""
    for name, response, right in case.responses:
        kind, word = ("yes", "✓ right") if right else ("no", "✗ wrong")
        rows += f"<dt>{html.escape(name)} <span class='{kind}'>{word}</span></dt><dd>{marked(response)}</dd>"
    asked = f"<p><b>{html.escape(case.question)}</b> Right answer: {html.escape(case.answer)}.</p>"
    return (
        f"<article class='case'><h3>{html.escape(case.title)}</h3><div>"
        f"<img src='{image_url(case.image)}' width='168' height='168' alt='{html.escape(alt, quote=True)}'>"
        f"<div>{asked}<dl>{rows}</dl></div></div></article>"
    )


def marked(response: str) -> str:
    """A response with its tags grey and its reflections marked, escaped."""
    out, last, inside = [], 0, False
    for tag in _TAG.finditer(response):
        out.append(html.escape(response[last : tag.start()]))
        shown = f"<span class='tag'>{html.escape(tag[0])}</span>"
        # A response may open a reflection twice, or close none.
        if tag[0] == REFLECTION_OPEN and not inside:
            shown, inside = f"<mark>{shown}", True
        elif tag[0] == REFLECTION_CLOSE and inside:
            shown, inside = f"{shown}</mark>", False
        out.append(shown)
        last = tag.end()
    return "".join(out) + html.escape(response[last:]) + ("</mark>" if inside else "")


def image_url(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
