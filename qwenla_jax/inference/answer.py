"""One answer to one question, with its insertions and the attention that its images received."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from qwenla_jax.text.response_format import Section
from qwenla_jax.text.special_tokens import REFLECTION_NAME
from qwenla_jax.text.tag_pieces import split_tags
from qwenla_jax.utils.html import image_uri, render

_LARGEST_SIDE = 480  # pixels of an image's data in HTML
_SHOWN_SIDE = 240  # pixels of an image's longer side as HTML shows it


@dataclass(frozen=True)
class VisualAttention:
    """Attention that visual tokens receive from some response tokens: means over these tokens, all layers and heads.

    Attributes:
      original: share of the attention that goes to the visual tokens of the prompt, 0 to 1.
      inserted: share that goes to the visual tokens of all insertions so far together.
      even_original, even_inserted: the shares that they would get if a token's attention were spread evenly over all
        that it sees (the subject of theorems 3.1 and 3.2).
    """

    original: float
    inserted: float
    even_original: float
    even_inserted: float

    @property
    def total(self) -> float:
        """Share that goes to all visual tokens, original and inserted."""
        return self.original + self.inserted

    @property
    def ratio(self) -> float | None:
        """`total` over its even share: above 1, visual tokens receive more than an even share."""
        return _over(self.total, self.even_original + self.even_inserted)

    @property
    def ratio_original(self) -> float | None:
        """`original` over its even share; None where there are no such tokens."""
        return _over(self.original, self.even_original)

    @property
    def ratio_inserted(self) -> float | None:
        """`inserted` over its even share; None where there are no such tokens."""
        return _over(self.inserted, self.even_inserted)

    def to_dict(self) -> dict[str, float | None]:
        """All values under the attributes' names."""
        names = ("total", "ratio", "ratio_original", "ratio_inserted")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SelectedTokens:
    """What an insertion shows of one image.

    Attributes:
      image: its number in the question, from 0.
      rows, cols: the image's grid of visual tokens.
      selected: (row, col) of the tokens that are shown, in raster order.
    """

    image: int
    rows: int
    cols: int
    selected: tuple[tuple[int, int], ...]

    def mask(self) -> list[list[bool]]:
        """Whether each token is shown, by rows."""
        selected = set(self.selected)
        return [[(row, col) in selected for col in range(self.cols)] for row in range(self.rows)]


@dataclass(frozen=True)
class Insertion:
    """One insertion: the images' visual tokens, repeated right before this `<REFLECTION>`.

    Attributes:
      position: index of the `<REFLECTION>` token in the response's tokens, in which inserted tokens do not count.
      offset: index of that tag's first character in the response's text.
      images: every image of the question, with what is shown of it.
      before: attention of the response tokens since the insertion before this one (from its tag on), or since the
        response's start; None where the tag is the first token.
      after: attention of the reflection's tokens, from its tag to its closing tag; where it is not closed, to the
        next `<REFLECTION>` or the end.
    """

    position: int
    offset: int
    images: tuple[SelectedTokens, ...]
    before: VisualAttention | None
    after: VisualAttention

    @property
    def selected_tokens(self) -> int:
        """Visual tokens that are shown, of all images together."""
        return sum(len(one.selected) for one in self.images)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all images together."""
        return sum(one.rows * one.cols for one in self.images)

    def selection_line(self) -> str:
        """What the insertion shows, on one line."""
        return f"inserted before token {self.position}: {self.selected_tokens} of {self.visual_tokens} visual tokens"

    def attention_line(self) -> str:
        """How much attention went to visual tokens before the insertion and in its reflection, on one line."""
        before, after = self.before, self.after
        was, was_ratio = ("-", "-") if before is None else (f"{before.total:.1%}", _times(before.ratio))
        return (
            f"attention on visual tokens: {was} -> {after.total:.1%} (original {after.original:.1%}, inserted "
            f"{after.inserted:.1%}); {was_ratio} -> {_times(after.ratio)} an even share"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "position": self.position,
            "offset": self.offset,
            "images": [asdict(one) | {"selected": [list(cell) for cell in one.selected]} for one in self.images],
            "selected_tokens": self.selected_tokens,
            "visual_tokens": self.visual_tokens,
            "before": None if self.before is None else self.before.to_dict(),
            "after": self.after.to_dict(),
        }


@dataclass(frozen=True)
class Piece:
    """A part of the response's text.

    Attributes:
      name: of the section; None for text outside of every complete section, which keeps its tags.
      text: what is in it, a section's tags left out.
      insertion: the one right before it.
    """

    name: str | None
    text: str
    insertion: Insertion | None

    @property
    def is_reflection(self) -> bool:
        """Whether it is a complete reflection."""
        return self.name == REFLECTION_NAME

    def tagged(self) -> list[str]:
        """Text and tags in turn, a section's own tags included; those at odd places are tags."""
        if self.name is None:
            return split_tags(self.text)
        return ["", f"<{self.name}>", f" {self.text} ", f"</{self.name}>"]


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
      text: the response, without its stop token.
      token_ids: the response's tokens, the stop token included; inserted tokens are no part of them.
      sections: the complete sections, reflections included, in order; see `text.response_format.parse`.
      reattention: the insertions in order.
      skipped: skipped insertions: reflections of text alone, because `max_insertions` was spent.
      stopped: whether the model ended the response itself; False where `max_new_tokens` cut it off.
      seconds: wall-clock time from the question to the answer, compilation included where there was any.
      question: as it was asked.
      images: the images as a viewer shows them.
      inserts: whether the question was asked with insertions.
    """

    text: str
    token_ids: list[int]
    sections: list[Section]
    reattention: list[Insertion]
    skipped: int
    stopped: bool
    seconds: float
    question: str
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    inserts: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON can hold it, without question and images."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "sections": [asdict(section) for section in self.sections],
            "reattention": [insertion.to_dict() for insertion in self.reattention],
            "skipped": self.skipped,
            "stopped": self.stopped,
            "seconds": self.seconds,
        }

    def pieces(self) -> Iterator[Piece]:
        """The whole text in order, cut at sections and insertions; blanks between sections are left out."""
        insertions = {insertion.offset: insertion for insertion in self.reattention}

        def outside(start: int, end: int) -> Iterator[Piece]:
            cuts = [start, *(at for at in sorted(insertions) if start < at < end), end]
            for first, last in zip(cuts, cuts[1:], strict=False):
                text = self.text[first:last].strip()
                if text:
                    yield Piece(None, text, insertions.get(first))

        done = 0
        for section in self.sections:
            yield from outside(done, section.start)
            yield Piece(section.name, section.text.strip(), insertions.get(section.start))
            done = section.end
        yield from outside(done, len(self.text))

    def note(self) -> str:
        """One line about the whole answer."""
        count = len(self.token_ids)
        parts = [f"{count} token{'s' if count != 1 else ''} in {self.seconds:.1f} s"]
        if self.skipped:
            parts.append(f"{self.skipped} more reflection{'s' if self.skipped != 1 else ''} without an insertion")
        elif self.inserts and not self.reattention:
            parts.append("no reflection, so nothing was inserted")
        if not self.stopped:
            parts.append("cut off at the most tokens allowed")
        return "; ".join(parts)

    def to_html(self) -> str:
        """The answer as one HTML element: images, selected tokens outlined, text by sections. All text is escaped."""
        frames = []
        for image in self.images:
            width, height = (max(1, round(side * _SHOWN_SIDE / max(image.size))) for side in image.size)
            uri = image_uri(image, "JPEG", _LARGEST_SIDE, quality=90)
            frames.append({"uri": uri, "width": width, "height": height})
        return render("answer.html", answer=self, frames=frames)

    def _repr_html_(self) -> str:
        """What a notebook shows for it."""
        return self.to_html()


def _over(share: float, even: float) -> float | None:
    return share / even if even > 0 else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
