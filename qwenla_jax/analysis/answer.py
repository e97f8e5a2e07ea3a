"""One answer to one question, with where it looked again and how much attention its pictures got."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from qwenla_jax.text.sections import Section


@dataclass(frozen=True)
class VisualAttention:
    """Attention paid to visual tokens by some response tokens: means over these tokens, all layers and all heads.

    Attributes:
      original: share of the attention that goes to the visual tokens of the prompt, 0 to 1.
      inserted: share that goes to the visual tokens of all insertions so far together.
      even_original, even_inserted: the shares that they would get if a token's attention were spread evenly over all
        that it sees (theorems 3.1 and 3.2 are about these).
    """

    original: float
    inserted: float
    even_original: float
    even_inserted: float

    @property
    def total(self) -> float:
        """Share that goes to visual tokens, wherever they stand."""
        return self.original + self.inserted

    @property
    def ratio(self) -> float | None:
        """`total` over its even share: above 1, visual tokens get more than their number would give them."""
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
        """All of it under the attributes' names."""
        names = ("total", "ratio", "ratio_original", "ratio_inserted")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class KeptTokens:
    """What an insertion shows of one picture.

    Attributes:
      picture: its number in the question, from 0.
      rows, cols: the picture's grid of visual tokens.
      kept: (row, col) of the tokens that are shown, in raster order.
    """

    picture: int
    rows: int
    cols: int
    kept: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LookAgain:
    """One insertion: the pictures' visual tokens stand right before this `<REFLECTION>` again.

    Attributes:
      position: index of the `<REFLECTION>` token in the response's tokens, in which inserted tokens do not count.
      offset: index of that tag's first character in the response's text.
      pictures: every picture of the question, with what is shown of it.
      before: attention of the response tokens since the insertion before this one (from its tag on), or since the
        response's start; None where the tag is the first token.
      after: attention of the reflection's tokens, from its tag to its closing tag; where it is not closed, to the
        next `<REFLECTION>` or the end.
    """

    position: int
    offset: int
    pictures: tuple[KeptTokens, ...]
    before: VisualAttention | None
    after: VisualAttention

    @property
    def kept_tokens(self) -> int:
        """Visual tokens that are shown, of all pictures together."""
        return sum(len(one.kept) for one in self.pictures)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that there are."""
        return sum(one.rows * one.cols for one in self.pictures)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "position": self.position,
            "offset": self.offset,
            "pictures": [asdict(one) | {"kept": [list(cell) for cell in one.kept]} for one in self.pictures],
            "kept_tokens": self.kept_tokens,
            "visual_tokens": self.visual_tokens,
            "before": None if self.before is None else self.before.to_dict(),
            "after": self.after.to_dict(),
        }


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
      text: the response, without its stop token.
      token_ids: the response's tokens, the stop token included; inserted tokens are no part of them.
      sections: the complete sections, reflections included, in order; see `text.sections.parse`.
      reattention: the insertions in order.
      refused: reflections that would have looked again, had `max_insertions` not been spent.
      stopped: whether the model ended the response itself; False where `max_new_tokens` cut it off.
      seconds: wall-clock time from the question to the answer, compilation included where there was any.
      question: as it was asked.
      images: the pictures as a viewer shows them.
    """

    text: str
    token_ids: list[int]
    sections: list[Section]
    reattention: list[LookAgain]
    refused: int
    stopped: bool
    seconds: float
    question: str
    images: tuple[Image.Image, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON can hold it, without question and pictures."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "sections": [asdict(section) for section in self.sections],
            "reattention": [look.to_dict() for look in self.reattention],
            "refused": self.refused,
            "stopped": self.stopped,
            "seconds": self.seconds,
        }

    def _repr_html_(self) -> str:
        """What a notebook shows for it."""
        from qwenla_jax.analysis.show import to_html  # that file draws this class, so it imports this one

        return to_html(self)


def _over(share: float, even: float) -> float | None:
    return share / even if even > 0 else None
