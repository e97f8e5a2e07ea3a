"""Tables of completions to look at: one self-contained HTML file a logged step, and an index of them.

A response is the model's own text, so it is escaped piece by piece and the page forbids scripts. Colours are blue and
orange, which the common kinds of colour blindness tell apart, and every colour stands beside a sign or a word.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwenla_jax.text.special_tokens import REFLECTION_CLOSE, REFLECTION_OPEN, TAGS

COMPLETIONS_FOLDER = "completions"
LARGEST_SIDE = 336  # pixels of an image in the page; larger ones are shrunk to keep the file small

_STYLE = """
:root{color-scheme:light dark;--line:#8886;--soft:#8881;--plus:#0072b2;--minus:#b34700;--mark:#f5c24f55}
@media(prefers-color-scheme:dark){:root{--plus:#56b4e9;--minus:#f0994a}}
body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1rem;margin:0}
section{border-top:2px solid var(--line);padding:1rem 0}
.question{display:flex;gap:1rem;align-items:flex-start;margin-bottom:.7rem}
.question img{max-width:10rem;height:auto;border:1px solid var(--line)}
.question p{margin:.2rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
th,td{border-top:1px solid var(--line);padding:.35rem .5rem;text-align:right;vertical-align:top}
th{font-weight:600}
td.text,th.text{text-align:left;width:70%}
td.text{white-space:pre-wrap;overflow-wrap:anywhere}
td.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.tag{opacity:.6;font:.8em ui-monospace,monospace}
mark{background:var(--mark);color:inherit;border-left:3px solid #d18f00;padding:0 .2em}
.plus{color:var(--plus);font-weight:600}.minus{color:var(--minus);font-weight:600}
@media(max-width:40rem){
 table,tbody,tr,td{display:block}thead{display:none}tr{border-top:1px solid var(--line);padding:.4rem 0}
 td,td.text{border:0;text-align:left;width:auto;padding:.1rem 0}
 td.number{display:inline-block;margin-right:1rem}td.number::before{content:attr(data-label) " ";opacity:.7}
}
@media print{body{max-width:none;margin:0;font-size:10pt}tr,.question{break-inside:avoid}
 mark{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


@dataclass(frozen=True)
class Completion:
    """One sampled response and what it earned.

    Attributes:
      images: images of the question.
      prompt: the question as text.
      answer: the right answer.
      response: the sampled text, tags included.
      rewards: each reward's value by name, before its weight; every row of a table has the same names.
      reward: weighted sum.
      advantage: reward relative to its group.
      note: a remark, e.g. "cut off at 64 tokens"; empty for none.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str
    response: str
    rewards: Mapping[str, float]
    reward: float
    advantage: float
    note: str = ""


def write_completions(workdir: str | os.PathLike[str], step: int, rows: Sequence[Completion]) -> Path:
    """Writes `completions/step_000100.html` and renews `completions/index.html`; returns the step's file.

    Rows that follow each other with the same images and prompt stand under one question. A step written again
    replaces its file.

    Raises:
      ValueError: rows with different reward names.
      OSError: the file cannot be written; the run's folder is not made again.
    """
    names = list(rows[0].rewards) if rows else []
    for number, row in enumerate(rows):
        if list(row.rewards) != names:
            raise ValueError(f"rows[{number}].rewards: got {list(row.rewards)}, expected {names} as in rows[0]")
    folder = Path(workdir) / COMPLETIONS_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}.html"
    body = f'<p><a href="index.html">all steps</a></p>\n<h1>Completions of step {step}</h1>\n'
    _write(path, f"Step {step}", body + "".join(_section(group, names) for group in _questions(rows)))
    _write_index(folder)
    return path


def response_html(response: str) -> str:
    """Escaped text of a response: tags dimmed, reflections (an unclosed one too) inside `<mark>`."""
    reflection = rf"({re.escape(REFLECTION_OPEN)}.*?(?:{re.escape(REFLECTION_CLOSE)}|\Z))"
    pieces = re.split(reflection, response, flags=re.DOTALL)
    # A split by one group alternates: text outside, reflection, text outside, ...
    return "".join(f"<mark>{_tagged(p)}</mark>" if i % 2 else _tagged(p) for i, p in enumerate(pieces))


def _tagged(text: str) -> str:
    pieces = re.split("(" + "|".join(map(re.escape, TAGS)) + ")", text)
    return "".join(f'<span class="tag">{_escape(p)}</span>' if i % 2 else _escape(p) for i, p in enumerate(pieces))


def _escape(text: str) -> str:
    """Text safe in HTML and UTF-8: control characters become their images, lone surrogates a replacement mark."""
    visible = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", lambda m: chr(0x2400 + ord(m[0])), text)
    return html.escape(visible.encode("utf-8", "replace").decode("utf-8"))


def _questions(rows: Sequence[Completion]) -> Iterator[list[Completion]]:
    group: list[Completion] = []
    for row in rows:
        question = (row.prompt, row.answer, row.images)
        if group and question != (group[0].prompt, group[0].answer, group[0].images):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _section(group: Sequence[Completion], names: Sequence[str]) -> str:
    first = group[0]
    images = "".join(
        f'<img src="{_data_uri(image)}" alt="image {i} of the question">' for i, image in enumerate(first.images, 1)
    )
    labels = [*names, "reward", "advantage"]
    head = "".join(f'<th scope="col">{_escape(label)}</th>' for label in labels)
    lines = []
    for row in group:
        note = f" <em>({_escape(row.note)})</em>" if row.note else ""
        values = [*(_number(row.rewards[name]) for name in names), _number(row.reward), _signed(row.advantage)]
        cells = "".join(
            f'<td class="number" data-label="{_escape(label)}">{value}</td>'
            for label, value in zip(labels, values, strict=True)
        )
        lines.append(f'<tr><td class="text">{response_html(row.response)}{note}</td>{cells}</tr>\n')
    return (
        f'<section><div class="question">{images}<div><h2>Question</h2><p>{_escape(first.prompt)}</p>'
        f"<h2>Right answer</h2><p>{_escape(first.answer)}</p></div></div>\n"
        f'<table><thead><tr><th scope="col" class="text">response</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></section>\n"
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else str(value)


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else str(value)
    kind = "plus" if value > 0 else "minus" if value < 0 else "zero"
    return f'<span class="{kind}">{text}</span>'


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _write_index(folder: Path) -> None:
    names = (re.fullmatch(r"step_(\d+)\.html", path.name) for path in folder.iterdir())
    steps = sorted((int(name[1]), name[0]) for name in names if name)
    links = "".join(f'<li><a href="{name}">step {step}</a></li>\n' for step, name in steps)
    _write(folder / "index.html", "Completions", f"<h1>Completions</h1>\n<ul>\n{links}</ul>\n")


def _write(path: Path, title: str, body: str) -> None:
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)
