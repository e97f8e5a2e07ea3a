"""Cases to read: where a reflection corrected the reasoning, spoiled it, or left it wrong (paper, figure 10)."""

from __future__ import annotations

import dataclasses

from PIL import Image

from qwenla_jax.study.collect import COPY, ROUTE, TEXT, Study
from qwenla_jax.study.redraw import make_image
from qwenla_jax.study.tables import turns

KINDS = (
    ((False, True), "The reflection corrects the reasoning", 2),
    ((True, False), "The reflection spoils the reasoning", 1),
    ((False, False), "The reflection leaves the reasoning wrong", 1),
)


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
        for index in [index for index, turn in enumerate(turns(one)) if turn == wanted][:count]:
            shown = [(name, systems[name]) for name in (TEXT, COPY, ROUTE) if name in systems]
            responses = [(name, m.texts[index]["response"], bool(m.numbers["right"][index])) for name, m in shown]
            text = one.texts[index]
            result.append(Case(title, make_image(one, index), text["question"], text["answer"], tuple(responses)))
    return result
