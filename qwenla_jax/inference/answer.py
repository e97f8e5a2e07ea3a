"""One answer to one question, with where it looked again and how much attention its images got."""

from __future__ import annotations

import base64
import html
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from PIL import Image

from qwenla_jax.text.response_format import Section
from qwenla_jax.text.special_tokens import REFLECTION_NAME, TAGS


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
class SelectedTokens:
    """What an insertion shows of one image.

    Attributes:
      image: its number in the question, from 0.
      rows, cols: the image's grid of visual tokens.
      kept: (row, col) of the tokens that are shown, in raster order.
    """

    image: int
    rows: int
    cols: int
    selected: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Insertion:
    """One insertion: the images' visual tokens stand right before this `<REFLECTION>` again.

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
        """Visual tokens that there are."""
        return sum(one.rows * one.cols for one in self.images)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "position": self.position,
            "offset": self.offset,
            "images": [asdict(one) | {"kept": [list(cell) for cell in one.selected]} for one in self.images],
            "selected_tokens": self.selected_tokens,
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
      skipped: reflections that would have looked again, had `max_insertions` not been spent.
      stopped: whether the model ended the response itself; False where `max_new_tokens` cut it off.
      seconds: wall-clock time from the question to the answer, compilation included where there was any.
      question: as it was asked.
      images: the images as a viewer shows them.
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

    def _repr_html_(self) -> str:
        """What a notebook shows for it."""
        from qwenla_jax.inference.answer import to_html

        return to_html(self)


def _over(share: float, even: float) -> float | None:
    return share / even if even > 0 else None


_WIDEST_MAP = 36  # cells of a terminal's map; a larger grid is drawn by blocks


_LARGEST_IMAGE = 480  # pixels of a side in HTML


_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS))


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line break: a model must not steer a terminal


_BOLD, _DIM, _YELLOW, _CYAN, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[33m", "\x1b[36m", "\x1b[0m"


_STYLE = """
.qla { font-family: sans-serif; line-height: 1.5; max-width: 60em; }
.qla .question { font-weight: bold; margin: .5em 0; }
.qla .part { border-left: 3px solid #8888; padding: .2em .8em; margin: .5em 0; white-space: pre-wrap; }
.qla .reflection { border-color: #e69f00; background: #e69f0018; }
.qla .tag { font-family: monospace; font-size: .85em; opacity: .65; }
.qla .reflection .tag { color: #b87a00; opacity: 1; font-weight: bold; }
.qla .look { margin: .5em 0 0 1em; font-size: .9em; }
.qla .image { position: relative; display: inline-block; margin: .3em .6em .3em 0; line-height: 0; }
.qla .image svg { position: absolute; left: 0; top: 0; width: 100%; height: 100%; }
.qla .note { font-size: .85em; opacity: .7; }
"""


@dataclass(frozen=True)
class Piece:
    """A part of the response's text.

    Attributes:
      name: of the section; None for text outside of every complete section, in which tags stand as they came.
      text: what is in it, a section's tags left out.
      insertion: the one that stands right before it.
    """

    name: str | None
    text: str
    insertion: Insertion | None


def pieces(answer: Answer) -> Iterator[Piece]:
    """The whole text in order, cut at sections and insertions; blanks between sections are left out."""
    insertions = {insertion.offset: insertion for insertion in answer.reattention}

    def outside(start: int, end: int) -> Iterator[Piece]:
        cuts = [start, *(at for at in sorted(insertions) if start < at < end), end]
        for first, last in zip(cuts, cuts[1:], strict=False):
            text = answer.text[first:last].strip()
            if text:
                yield Piece(None, text, insertions.get(first))

    done = 0
    for section in answer.sections:
        yield from outside(done, section.start)
        yield Piece(section.name, section.text.strip(), insertions.get(section.start))
        done = section.end
    yield from outside(done, len(answer.text))


def show(answer: Answer, file: TextIO | None = None) -> None:
    """Shows an answer where one is looking: in a notebook with its images, elsewhere as text.

    Args:
      answer: from `qwenla_jax.ask`.
      file: where text goes, coloured if it is a terminal (and the variable NO_COLOR is not set); None: to a notebook's
        cell if there is one, else to standard output.
    """
    if file is None and in_notebook():
        from IPython.display import display  # there is one, so this is no dependency

        display(answer)
        return
    stream = sys.stdout if file is None else file
    text = to_text(answer, color=stream.isatty() and not os.environ.get("NO_COLOR"))
    known = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(known, "replace").decode(known), file=stream)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process (Colab's is one)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def insertion_line(insertion: Insertion) -> str:
    """What one insertion shows, on one line."""
    shown = f"{insertion.selected_tokens} of {insertion.visual_tokens} visual tokens kept"
    return f"looked again at token {insertion.position}: {shown}"


def attention_line(insertion: Insertion) -> str:
    """How much attention went to visual tokens before an insertion and in its reflection, on one line."""
    before, after = insertion.before, insertion.after
    was, was_ratio = ("-", "-") if before is None else (f"{before.total:.1%}", _times(before.ratio))
    return (
        f"attention on visual tokens: {was} -> {after.total:.1%} (original {after.original:.1%}, inserted "
        f"{after.inserted:.1%}); {was_ratio} -> {_times(after.ratio)} an even share"
    )


def note_line(answer: Answer) -> str:
    """One line about the whole answer."""
    count = len(answer.token_ids)
    parts = [f"{count} token{'s' if count != 1 else ''} in {answer.seconds:.1f} s"]
    if answer.skipped:
        parts.append(f"{answer.skipped} more reflection{'s' if answer.skipped != 1 else ''} without looking again")
    if not answer.stopped:
        parts.append("cut off by the longest length allowed")
    return "; ".join(parts)


def token_map(selected: SelectedTokens) -> list[str]:
    """The grid as lines: "#" where tokens are kept, "." where not, "+" for a block of which some are."""
    step = -(-max(selected.rows, selected.cols) // _WIDEST_MAP)
    chosen = set(selected.selected)
    lines = []
    for top in range(0, selected.rows, step):
        line = ""
        for left in range(0, selected.cols, step):
            block = [
                (row, col) in chosen
                for row in range(top, min(top + step, selected.rows))
                for col in range(left, min(left + step, selected.cols))
            ]
            line += "#" if all(block) else "+" if any(block) else "."
        lines.append(" ".join(line))
    return lines


def to_text(answer: Answer, color: bool = False) -> str:
    """The answer for a terminal.

    Args:
      answer: see there.
      color: with ANSI escape codes.
    """
    paint = (lambda code, text: f"{code}{text}{_RESET}") if color else (lambda code, text: text)
    lines = []
    for piece in pieces(answer):
        if piece.insertion is not None:
            lines.append(paint(_YELLOW, f"[{insertion_line(piece.insertion)}]"))
            for selected in piece.insertion.images:
                if len(piece.insertion.images) > 1:
                    lines.append(f"    image {selected.image}")
                lines += [paint(_YELLOW, f"    {line}") for line in token_map(selected)]
            lines.append(paint(_YELLOW, f"[{attention_line(piece.insertion)}]"))
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece.text)
        if piece.name is None:
            lines.append(_TAG.sub(lambda tag: paint(_DIM, tag[0]), text))
        else:
            head = paint(_CYAN + _BOLD if piece.name == REFLECTION_NAME else _BOLD, piece.name)
            lines += [head, *(f"  {line}" for line in text.split("\n") if line.strip())]
        lines.append("")
    return "\n".join([*lines, paint(_DIM, f"({note_line(answer)})")])


def to_html(answer: Answer) -> str:
    """The answer as one piece of HTML: images, kept tokens outlined, text by sections. All text is escaped."""
    images = [_image_data(image) for image in answer.images]
    frames = "".join(_figure(data, image) for data, image in zip(images, answer.images, strict=True))
    parts = [f"<style>{_STYLE}</style>", frames, f'<div class="question">{_escaped(answer.question)}</div>']
    for piece in pieces(answer):
        if piece.insertion is not None:
            shown = "".join(
                _figure(images[selected.image], answer.images[selected.image], selected)
                for selected in piece.insertion.images
            )
            parts.append(
                f'<div class="look">{_escaped(insertion_line(piece.insertion))}<br>{shown}<br>'
                f"{_escaped(attention_line(piece.insertion))}</div>"
            )
        if piece.name is None:
            body = _TAG.split(piece.text)
            tags = [*(_mark(tag[0]) for tag in _TAG.finditer(piece.text)), ""]
            inner = "".join(_escaped(text) + tag for text, tag in zip(body, tags, strict=True))
            parts.append(f'<div class="part">{inner}</div>')
        else:
            kind = "part reflection" if piece.name == REFLECTION_NAME else "part"
            first, last = _mark(f"<{piece.name}>"), _mark(f"</{piece.name}>")
            parts.append(f'<div class="{kind}">{first} {_escaped(piece.text)} {last}</div>')
    parts.append(f'<div class="note">{_escaped(note_line(answer))}</div>')
    return f'<div class="qla">{"".join(parts)}</div>'


def _mark(tag: str) -> str:
    return f'<span class="tag">{_escaped(tag)}</span>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _image_data(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_LARGEST_IMAGE, _LARGEST_IMAGE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _figure(data: str, image: Image.Image, selected: SelectedTokens | None = None) -> str:
    """An image, with the tokens that an insertion keeps outlined and the others darkened."""
    scale = 240 / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    overlay = ""
    if selected is not None:
        every = [(row, col) for row in range(selected.rows) for col in range(selected.cols)]
        chosen = set(selected.selected)
        square = lambda cells: "".join(f"M{col} {row}h1v1h-1z" for row, col in cells)  # noqa: E731
        overlay = (
            f'<svg viewBox="0 0 {selected.cols} {selected.rows}" preserveAspectRatio="none">'
            f'<path class="left-out" d="{square(cell for cell in every if cell not in chosen)}" fill="#000a"/>'
            f'<path class="kept" d="{square(selected.selected)}" fill="none" stroke="#ffb000" stroke-width="2" '
            'vector-effect="non-scaling-stroke"/></svg>'
        )
    return f'<span class="image"><img src="{data}" width="{width}" height="{height}" alt="image">{overlay}</span>'
