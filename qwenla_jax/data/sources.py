"""Sources of records: Grain random-access sources, index -> Record."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Record:
    """One question about pictures.

    Attributes:
      id: unique within its source.
      images: the pictures, RGB, of any size.
      question: the user's text, without any placeholder of a picture.
      answer: the right answer, bare.
      response: a response in the paper's answer format for supervised training; None where there is none.
      kind: type of the question, for accuracy by type.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    response: str | None
    kind: str
