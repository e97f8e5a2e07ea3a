"""One self-contained HTML page about a study: verdicts, figures, tables, examples; needs the extra `report`."""

from __future__ import annotations

import base64
import collections
import dataclasses
import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qwenla_jax.study import figures as fg
from qwenla_jax.study.attention_figure import figure_5
from qwenla_jax.study.cases import case_html, cases
from qwenla_jax.study.claims import FAILS, HOLDS, NOT_JUDGED, RULE, UNKNOWN, Verdict, bounds, p_text, verdicts, written
from qwenla_jax.study.collect import BASE, Study, StudyError
from qwenla_jax.study.statistics import LEAST
from qwenla_jax.study.tables import TABLES, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNS = {HOLDS: "✓", FAILS: "✗", UNKNOWN: "?", NOT_JUDGED: "–"}
BANDS = f"Bands are 95% intervals (bootstrap over questions, all seeds); fewer than {LEAST} behind a point: not drawn."
_STYLE = """
:root{color-scheme:light;--line:#c8c8c8;--soft:#f4f4f4}
body{font:15px/1.5 system-ui,sans-serif;color:#111;background:#fff;margin:1.5rem auto;max-width:62rem;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:2px solid var(--line)}
h3{font-size:1rem;margin:.6rem 0 .3rem}
figure{margin:1.2rem 0;break-inside:avoid}figure>img{width:52rem;max-width:100%;height:auto;display:block;margin:0 auto}
figcaption,caption{font-size:.9rem;color:#333;text-align:left;padding:.3rem 0;caption-side:top}
.wide{overflow-x:auto}.wide:not(.long){break-inside:avoid}
table{border-collapse:collapse;width:100%;font-size:.88rem;margin:1rem 0}
th,td{border-top:1px solid var(--line);padding:.25rem .5rem;text-align:right;vertical-align:top;
 font-variant-numeric:tabular-nums}
thead th:first-child,.text th,.text td{text-align:left}table:not(.text) td,.narrow{white-space:nowrap}
thead th{border-top:2px solid #555;border-bottom:1px solid #555;background:var(--soft)}
tbody th{font-weight:600;text-align:left;white-space:nowrap}tbody tr:last-child>*{border-bottom:2px solid #555}
td.verdict{white-space:nowrap;font-weight:600}
.holds,.yes{color:#00527f}.fails,.no{color:#a64200}.unknown,.not-judged{color:#555}
.note{font-size:.9em;color:#444}h1,h2,h3,caption{break-after:avoid}
.missing{background:var(--soft);border-left:4px solid #999;padding:.4rem .8rem}
.case{break-inside:avoid;border-top:1px solid var(--line);padding:.4rem 0}h2+.case{border-top:0}
.case>div{display:flex;gap:1rem;align-items:flex-start}.case img{border:1px solid var(--line);flex:none}
dl{margin:0}dt{font-weight:600;margin-top:.4rem}dd{margin:0;overflow-wrap:anywhere}
.tag{color:#666;font:.8em ui-monospace,monospace}mark{background:#fbe6c5;border-left:3px solid #d18f00;padding:0 .2em}
@page{size:A4;margin:14mm}
@media print{body{max-width:none;margin:0;padding:0;font-size:10pt}.wide{overflow:visible}table{font-size:8pt}
 tr{break-inside:avoid}mark,thead th{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
      name: as one refers to it.
      draw: makes it.
      caption: what is seen, with units.
      alt: the same for one who does not see it.
      form: "svg", or "png" where there is an image in it.
    """

    name: str
    draw: Callable[[Study], Figure]
    caption: str
    alt: str
    form: str = "svg"


DRAWINGS = (
    Drawing(
        "Figure 1",
        fg.figure_1,
        "Invented objects and recall in captions against generation length, plain and with text-only reflection. "
        "(a) CHAIR_i of the objects that end so many tokens into the answer; (b) CHAIR_i and (c) recall of answers by "
        f"their length. Captions name small objects first, and longer answers are about fuller scenes. {BANDS}",
        "three line charts: CHAIR_i by the object's place, CHAIR_i and recall by the answer's length",
    ),
    Drawing(
        "Figure 2",
        fg.figure_2,
        "Attention on visual tokens against generation length, mean over layers, heads and answers, plain and with "
        "text-only reflection: (a) as a share of all attention, (b) over the share that evenly spread attention would "
        f"pay. {BANDS}",
        "two line charts: attention on visual tokens falls or stays with the token of the answer, base and text-only",
    ),
    Drawing(
        "Figure 5",
        figure_5,
        "Attention over the image when key words are written, mean over layers and heads, for one question: the "
        "original model, text-only reflection, COPY and ROUTE. A square is a visual token; attention on its copies is "
        "added to it. Each column has its own scale. Below each map: its word and its sum. Chosen: the first question "
        "that all four name key words for and COPY answers right.",
        "a grid of heat maps over one scene: rows are systems, columns are key words",
        "png",
    ),
    Drawing(
        "Figure 6",
        fg.figure_6,
        "Reflections in sampled responses over BRPO steps: (a) their total length, (b) their count. Means over "
        "up to 30 bins of steps; thin lines: single seeds.",
        "two line charts over BRPO steps: tokens in reflections and number of reflections a response",
    ),
    Drawing(
        "Figure 7",
        fg.figure_7,
        "Accuracy over BRPO steps: greedy answers to the same held-out questions, others and fewer than table A's, "
        "with Wilson's 95% interval over all seeds' answers, and of the responses sampled in training.",
        "a line chart of accuracy over BRPO steps, held-out and while training",
    ),
    Drawing(
        "Figure 9",
        fg.figure_9,
        "Attention on visual tokens, original and put in, against generation length for text-only reflection, COPY and "
        f"ROUTE: (a) as a share of all attention, (b) over the even share. {BANDS}",
        "two line charts: attention on visual tokens by token of the answer for text-only, COPY and ROUTE",
    ),
    Drawing(
        "Figure m",
        fg.figure_sweep,
        "The m sweep of table 5: (a) accuracy and (b) wall time an answer, over text-only reflection (m = 0), with 95% "
        "intervals (over questions; over batches); the paper's at 7B on MMMU beside it.",
        "two line charts over m: difference in accuracy and added time, here and in the paper",
    ),
)


def write_report(study: Study, path: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
      NoMatplotlib: the extra `report` is not installed.
    """
    fg.require_matplotlib()
    page = report_html(study)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)


def report_html(study: Study) -> str:
    """The page's text. What a study lacks is named in its place."""
    judged = verdicts(study)
    parts = [_head(study), "<h2 id='verdicts'>The paper's claims</h2>", _summary(judged), _verdict_table(judged, study)]
    parts += [f"<p class='note'>{html.escape(RULE)}</p>", "<h2 id='figures'>Figures</h2>"]
    parts += [_part(study, drawing.name, lambda d=drawing: _figure(d, study)) for drawing in DRAWINGS]
    parts.append("<h2 id='tables'>Tables</h2>")
    parts += [_part(study, _title(make), lambda make=make: table_html(make(study))) for make in TABLES]
    parts.append("<h2 id='examples'>Examples</h2>")
    parts.append(
        _part(study, "Examples", lambda: "".join(map(case_html, cases(study))) or "<p>No answer reflects.</p>")
    )
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>Qwen Look Again: a study</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def table_html(table: Table) -> str:
    """A table with its caption."""
    heads = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in table.heads)
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell).replace('; ', '<br>')}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return (
        f"<div class='wide'><table><caption><b>{html.escape(table.name)}.</b> {html.escape(table.caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _head(study: Study) -> str:
    count = len(study.seeds)
    one = study.seeds[0].systems[study.systems[0]]
    profiled = len(one.attention.parts["tokens"])
    names = html.escape(", ".join(seed.path.name for seed in study.seeds))
    lines = [
        "<h1>Qwen Look Again: what came out</h1>",
        f"<p>{count} seed{'s' if count > 1 else ''} ({names}), "
        f"{study.questions} fresh rendered scenes each, {len(study.systems)} systems: "
        f"{html.escape(', '.join(study.systems))}. Answers are greedy; attention is measured on {profiled} of the "
        "scenes. The model is small and the images are simple: what the paper found at 7B need not show here, and "
        "what shows here need not hold there.</p>",
    ]
    lines += [f"<p class='missing'>Left out: {html.escape(line)}</p>" for line in study.left_out]
    if BASE in study.systems and count == 1:
        lines.append("<p class='note'>With one seed, nothing is said about what another training would give.</p>")
    return "\n".join(lines)


def _summary(judged: list[Verdict]) -> str:
    counts = collections.Counter(verdict.verdict for verdict in judged)
    plural = {HOLDS: "hold", FAILS: "do not hold", UNKNOWN: UNKNOWN, NOT_JUDGED: "were " + NOT_JUDGED}
    message = ", ".join(f"{counts[kind]} {word}" for kind, word in plural.items() if counts[kind])
    return f"<p>Of {len(judged)} measured statements: {html.escape(message)}.</p>"


def _verdict_table(judged: list[Verdict], study: Study) -> str:
    heads = ("", "claim", "paper", "measured here", "difference [95%]", "p", "seeds", "verdict")
    rows = []
    for v in judged:
        known = v.verdict != NOT_JUDGED
        number = f"{written(v.result.value, v.unit)}\n{bounds(v.result, v.unit)}" if known else ""
        seeds = f"{v.agreeing} of {len(v.seeds)}" if known else ""
        p = p_text(v.result.p).removeprefix("p ").removeprefix("= ") if known else ""
        cells = (v.claim, v.paper, v.measure, number, p, seeds)
        reason = html.escape(_local(v.reason, study))
        note = f"<br><span class='note'>{reason}</span>" if v.reason else ""
        kind = {HOLDS: "holds", FAILS: "fails", UNKNOWN: "unknown", NOT_JUDGED: "not-judged"}[v.verdict]
        body = [f"<td>{html.escape(cell)}</td>" for cell in cells]
        body[2] = body[2].replace("</td>", f"{note}</td>")
        body[3:] = [cell.replace("<td>", "<td class='narrow'>").replace("\n", "<br>") for cell in body[3:]]
        rows.append(
            f"<tr><th scope='row'>{html.escape(v.number)}</th>{''.join(body)}"
            f"<td class='verdict {kind}'>{SIGNS[v.verdict]} {html.escape(v.verdict)}</td></tr>"
        )
    head = "".join(f"<th scope='col'>{cell}</th>" for cell in heads)
    return (
        "<div class='wide long'><table class='text'><caption><b>Verdicts.</b> Each claim of the paper against the "
        "numbers measured here, all seeds pooled; under “seeds”, those that lie on the claim's side by themselves."
        "</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(drawing: Drawing, study: Study) -> str:
    data = base64.b64encode(fg.to_bytes(drawing.draw(study), drawing.form)).decode("ascii")
    kind = "image/svg+xml" if drawing.form == "svg" else "image/png"
    width = " style='width:44rem'" if drawing.form == "png" else ""
    name, alt = html.escape(drawing.name), html.escape(drawing.alt, quote=True)
    place = name.replace(" ", "-").lower()
    return (
        f"<figure id='{place}'><img src='data:{kind};base64,{data}' alt='{name}: {alt}'{width}>"
        f"<figcaption><b>{name}.</b> {html.escape(drawing.caption)}</figcaption></figure>"
    )


def _part(study: Study, name: str, make: Callable[[], str]) -> str:
    """A part of the page, or what it lacks."""
    try:
        return make()
    except StudyError as error:
        why = html.escape(_local(str(error), study))
        return f"<p class='missing'><b>{html.escape(name)}</b> is not here: {why}.</p>"


def _local(text: str, study: Study) -> str:
    """Paths as one who has the study's folder sees them: from there, not from this machine's root."""
    return text.replace(f"{study.seeds[0].path.parent}{os.sep}", "")


def _title(make: Callable[[Study], Table]) -> str:
    return make.__name__.replace("_", " ").capitalize()
