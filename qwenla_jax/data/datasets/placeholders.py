"""Placeholders of images in a question's text: `<image>`, and `<image1>`, `<image 2>`, ... where they are numbered."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PLACEHOLDER = re.compile(r"<image {0,3}(\d{0,9})>")
_VIDEO = "<video>"
_BLANKS = " \t"


def without_placeholders(text: str) -> str:
    """Text without `<image>`; where the text numbers several images, "(picture 2)" for each.

    The prompt puts a record's images before its text. MathVision numbers the parts of its one image, and some
    questions refer to them within a sentence, so their numbers stay. Time linear in the text.
    """
    several = len({match[1] for match in _PLACEHOLDER.finditer(text)}) > 1
    lines = []
    for line in text.split("\n"):
        pieces = _PLACEHOLDER.split(line)  # text, number, text, number, ..., text
        if len(pieces) > 1:
            if not any(piece.strip(" \t\r") for piece in pieces[::2]):
                continue
            line = _joined(pieces, several)
        lines.append(line.rstrip(" \t\r"))
    return "\n".join(lines).strip()


def _joined(pieces: Sequence[str], several: bool) -> str:
    """A line's pieces, with one blank for each removed placeholder."""
    texts = [pieces[0]]
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        if several and number:
            texts[-1] += f"(picture {number}){after}"
        else:
            texts.append(after)
    if len(texts) > 1:
        inner = [piece.strip(_BLANKS) for piece in texts[1:-1]]
        texts = [texts[0].rstrip(_BLANKS), *inner, texts[-1].lstrip(_BLANKS)]
    return " ".join(piece for piece in texts if piece)


def named_images(texts: Sequence[str], before: int = 0) -> tuple[str, ...]:
    """Texts, such as a question's options, with "picture 2" for each placeholder.

    Args:
      texts: the texts.
      before: number of placeholders without a number before the texts, whose own numbers continue from there.
    """

    def name(match: re.Match[str]) -> str:
        nonlocal before
        before += not match[1]
        return f"picture {match[1] or before}"

    return tuple(_PLACEHOLDER.sub(name, text) if "<image" in text else text for text in texts)


def count_unnumbered(text: str) -> int:
    """Number of `<image>` in a text."""
    return sum(not match[1] for match in _PLACEHOLDER.finditer(text)) if "<image" in text else 0


def placeholder_fault(texts: Sequence[str], images: int, parts: bool = False) -> str | None:
    """The message for a number of images that does not fit the placeholders; None where it does.

    Args:
      texts: the question and its options.
      images: number of the record's images.
      parts: the numbers may name parts of one image.
    """
    if any(_VIDEO in text for text in texts):
        return f"the question has a place for a video, {_VIDEO}, and a record of this kind has none; leave it out"
    matches = [match[1] for text in texts if "<image" in text for match in _PLACEHOLDER.finditer(text)]
    if not matches:
        return None
    numbers = {int(number) for number in matches if number}
    unnumbered = sum(not number for number in matches)
    # An image may be named twice by its number, and need not be named at all.
    wanted = unnumbered + (max(numbers) + (0 in numbers) if numbers else 0)
    wrong = not images if parts else images < wanted if numbers else images != wanted
    if not wrong:
        return None
    return f"the question has places for {wanted} image(s) (<image>), the record has {images}; expected one for each"
