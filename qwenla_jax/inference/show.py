"""Shows an answer: in a notebook as HTML, in a terminal as text."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

from qwenla_jax.inference.answer import Answer, SelectedTokens
from qwenla_jax.text.tag_pieces import split_tags

_WIDEST_MAP = 36  # cells of a terminal's map; a larger grid is drawn by blocks
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line break: a model must not steer a terminal
_BOLD, _DIM, _YELLOW, _CYAN, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[33m", "\x1b[36m", "\x1b[0m"


def show(answer: Answer, file: TextIO | None = None) -> None:
    """Shows an answer: in a notebook with its images, elsewhere as text.

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
    _write(text + "\n", stream)


def show_part(text: str, file: TextIO) -> None:
    """Writes a part of a streamed text, without a line break of its own, and flushes it."""
    _write(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), file)
    file.flush()


def show_notes(answer: Answer, file: TextIO) -> None:
    """What a streamed text leaves to say: the insertions, and the line about the whole answer."""
    lines = [f"[{line}]" for one in answer.reattention for line in (one.selection_line(), one.attention_line())]
    _write("\n".join(["", *lines, f"({answer.note()})", ""]), file)


def _write(text: str, stream: TextIO) -> None:
    known = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(known, "replace").decode(known))


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process (Colab's is one)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def token_map(selected: SelectedTokens) -> list[str]:
    """The grid as lines: "#" where tokens are selected, "." where not, "+" for a group of cells of which some are."""
    step = -(-max(selected.rows, selected.cols) // _WIDEST_MAP)
    mask = selected.mask()
    lines = []
    for top in range(0, selected.rows, step):
        blocks = (
            [one for row in mask[top : top + step] for one in row[left : left + step]]
            for left in range(0, selected.cols, step)
        )
        lines.append(" ".join("#" if all(block) else "+" if any(block) else "." for block in blocks))
    return lines


def to_text(answer: Answer, color: bool = False) -> str:
    """The answer for a terminal.

    Args:
      answer: see there.
      color: with ANSI escape codes.
    """
    paint = (lambda code, text: f"{code}{text}{_RESET}") if color else (lambda code, text: text)
    lines = []
    for piece in answer.pieces():
        if piece.insertion is not None:
            lines.append(paint(_YELLOW, f"[{piece.insertion.selection_line()}]"))
            for selected in piece.insertion.images:
                if len(piece.insertion.images) > 1:
                    lines.append(f"    image {selected.image}")
                lines += [paint(_YELLOW, f"    {line}") for line in token_map(selected)]
            lines.append(paint(_YELLOW, f"[{piece.insertion.attention_line()}]"))
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece.text)
        if piece.name is None:
            parts = split_tags(text)
            lines.append("".join(paint(_DIM, part) if i % 2 else part for i, part in enumerate(parts)))
        else:
            head = paint(_CYAN + _BOLD if piece.is_reflection else _BOLD, piece.name)
            lines += [head, *(f"  {line}" for line in text.split("\n") if line.strip())]
        lines.append("")
    return "\n".join([*lines, paint(_DIM, f"({answer.note()})")])
