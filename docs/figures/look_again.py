"""Draws docs/figures/look_again.svg, an answer of the embedded checkpoint with ROUTE: python docs/figures/look_again.py

The answer is the one that this command prints:

    qwenla generate --model=tiny --image=docs/figures/scene.png --question="What color is the big triangle?" \
        --reattention=route --temperature=1 --seed=1
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Iterator
from pathlib import Path

import qwenla_jax
from qwenla_jax.inference.answer import Answer

FOLDER = Path(__file__).resolve().parent
QUESTION = "What color is the big triangle?"
SETTINGS = dict(reattention="route", temperature=1.0, seed=1)
WIDTH, SIDE, LEFT, LINE, AGAIN = 860, 150, 190, 20, 232  # pixels; AGAIN: top of the second image
COLUMNS = 78  # characters of a line of text
HIGHLIGHT = "#b36b00"


def text(x: int, y: int, line: str, color: str = "#24292f", weight: str = "normal") -> str:
    """One line of text."""
    style = f'fill="{color}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style} xml:space="preserve">{html.escape(line)}</text>'


def image(data: str) -> str:
    """The scene, enlarged, to be placed with `use`."""
    return (
        f'<defs><image id="scene" width="{SIDE}" height="{SIDE}" href="data:image/png;base64,{data}"/></defs>'
        f'<use href="#scene" x="20" y="42"/><use href="#scene" x="20" y="{AGAIN}"/>'
    )


def overlay(x: int, y: int, answer: Answer) -> Iterator[str]:
    """The grid of visual tokens: selected ones outlined, the others darkened."""
    grid = answer.reattention[0].images[0]
    width, height = SIDE / grid.cols, SIDE / grid.rows
    selected = sorted(grid.selected)
    every = [(row, col) for row in range(grid.rows) for col in range(grid.cols)]
    for row, col in [cell for cell in every if cell not in selected] + selected:
        box = f'x="{x + col * width:g}" y="{y + row * height:g}" width="{width:g}" height="{height:g}"'
        chosen = (row, col) in selected
        yield f"<rect {box} " + ('fill="none" stroke="#ffb000" stroke-width="3"/>' if chosen else 'fill="#000b"/>')


def draw(answer: Answer) -> str:
    """The whole figure."""
    data = base64.b64encode((FOLDER / "scene.png").read_bytes()).decode("ascii")
    body = [text(20, 28, f"Question: {answer.question}", weight="bold")]
    body += [image(data), text(20, 42 + SIDE + 18, "the image", "#57606a")]
    body += [*overlay(20, AGAIN, answer), text(20, AGAIN + SIDE + 18, "inserted again", HIGHLIGHT)]
    y = 58
    insertions = {insertion.offset: insertion for insertion in answer.reattention}
    for section in answer.sections:
        insertion = insertions.get(section.start)
        if insertion is not None:
            y += 8
            before, after = insertion.before, insertion.after
            lines = [
                f"ROUTE: {insertion.selected_tokens} of {insertion.visual_tokens} visual tokens are inserted again"
            ]
            if before is not None:
                lines.append(f"attention on visual tokens before: {before.total:.1%}")
            lines.append(
                f"in the reflection: {after.total:.1%} ({after.original:.1%} original, {after.inserted:.1%} inserted)"
            )
            for line in lines:
                body.append(text(LEFT, y, line, HIGHLIGHT))
                y += LINE
        color, weight = ("#24292f", "normal") if insertion is None else (HIGHLIGHT, "bold")
        for part in textwrap.wrap(f"<{section.name}>{section.text.strip()}</{section.name}>", COLUMNS):
            body.append(text(LEFT, y, part, color, weight))
            y += LINE
        y += 10
    height = max(y, AGAIN + SIDE + 34)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    checkpoint = qwenla_jax.load("tiny")
    result = qwenla_jax.ask(checkpoint, FOLDER / "scene.png", QUESTION, **SETTINGS)
    (FOLDER / "look_again.svg").write_text(draw(result))
    qwenla_jax.show(result)
