"""A report of paragraphs, tables and figures, written from one structure as Markdown, as an HTML page and as PDF.

The page is one file that loads nothing. The PDF needs fpdf2 and matplotlib, whose fonts it has (the extra `report`).
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenla_jax.study.figures import NoMatplotlib, require_matplotlib, to_bytes
from qwenla_jax.study.tables import Table
from qwenla_jax.utils.atomic_files import replacing, write_text
from qwenla_jax.utils.html import data_uri, valid_text, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN, FULL_WIDTH = 14.0, 182.0  # millimetres of a page of A4
LONGEST = 3000  # characters of a cell of the PDF, a row of which has to fit on a page
FONT = "DejaVuSans"


@dataclasses.dataclass(frozen=True)
class Illustration:
    """A figure that is drawn: `stem` of its file beside the Markdown, what one who cannot see it reads, its bytes."""

    stem: str
    name: str
    caption: str
    alt: str
    svg: bytes
    png: bytes

    @property
    def uri(self) -> str:
        """The figure as a URI that holds it."""
        return data_uri(self.svg, "image/svg+xml")


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, "" for what stands below the title, and what follows. A paragraph may have `**bold words**`."""

    heading: str
    parts: Sequence[str | Table | Illustration]


@dataclasses.dataclass(frozen=True)
class Report:
    """A title and sections."""

    title: str
    sections: Sequence[Section]


def illustration(stem: str, name: str, caption: str, alt: str, draw: Callable[[], Figure]) -> Illustration | str:
    """A figure; where matplotlib is not installed a paragraph that says how to get it."""
    try:
        figure = draw()
    except NoMatplotlib as error:
        return f"No figure: {error}."
    return Illustration(stem, name, caption, alt, to_bytes(figure), to_bytes(figure, "png"))


def write_formats(report: Report, path: Path) -> list[str]:
    """Writes a report as Markdown with its figures beside it, as a page and as PDF.

    Args:
      report: what is written.
      path: of the Markdown; the others have its name with another suffix. Its folder is made.

    Returns:
      a line for each: its path, or what it lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in (part for section in report.sections for part in section.parts):
        if isinstance(part, Illustration):
            write_text(path.with_name(f"{part.stem}.svg"), part.svg.decode())
    write_text(path, _markdown(report))
    page, pdf = path.with_suffix(".html"), path.with_suffix(".pdf")
    write_page(page, "sections.html", report=report)
    try:
        content = _pdf(report)
    except ModuleNotFoundError:
        return [str(path), str(page), f"no {pdf.name}: it needs fpdf2 and matplotlib: pip install 'qwenla_jax[report]'"]
    with replacing(pdf) as fresh:
        fresh.write_bytes(content)
    return [str(path), str(page), str(pdf)]


def _markdown(report: Report) -> str:
    lines = [f"# {report.title}\n"]
    for section in report.sections:
        lines += [f"## {section.heading}\n"] * bool(section.heading)
        for part in section.parts:
            if isinstance(part, str):
                lines.append(f"{part}\n")
            elif isinstance(part, Illustration):
                lines.append(f"![{part.alt}]({part.stem}.svg)\n\n**{part.name}.** {part.caption}\n")
            else:
                rows = [_row(row) for row in part.rows]
                rule = "|---" * len(part.heads) + "|"
                lines += [f"**{part.name}.** {part.caption}\n", _row(part.heads), rule, *rows, ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    escaped = (
        " ".join(valid_text(cell).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
        for cell in cells
    )
    return f"| {' | '.join(escaped)} |"


def _pdf(report: Report) -> bytes:
    """The bytes of the PDF. Raises ModuleNotFoundError where fpdf2 or matplotlib is not installed."""
    from fpdf import FPDF

    fonts = Path(require_matplotlib().get_data_path()) / "fonts" / "ttf"

    class Pages(FPDF):
        def footer(self) -> None:
            self.set_y(-MARGIN)
            self.set_font(FONT, size=7)
            self.cell(0, 5, str(self.page_no()), align="R")

    pdf = Pages(format="A4")
    pdf.set_margin(MARGIN)
    pdf.set_auto_page_break(True, MARGIN + 4)
    pdf.add_font(FONT, "", fonts / f"{FONT}.ttf")
    pdf.add_font(FONT, "B", fonts / f"{FONT}-Bold.ttf")
    pdf.set_title(report.title)
    pdf.set_lang("en")
    pdf.add_page()
    _text(pdf, f"**{report.title}**", 15)
    for section in report.sections:
        if section.heading:
            pdf.ln(3)
            if pdf.will_page_break(120 if isinstance(section.parts[0], Illustration) else 45):
                pdf.add_page()
            pdf.start_section(section.heading)
            _text(pdf, f"**{section.heading}**", 12)
        for part in section.parts:
            if isinstance(part, str):
                _text(pdf, part, 9)
            elif isinstance(part, Illustration):
                width = 0.8 * FULL_WIDTH
                pdf.image(io.BytesIO(part.png), w=width, x=(pdf.w - width) / 2, alt_text=part.alt)
                _text(pdf, f"**{part.name}.** {part.caption}", 8)
            else:
                _table(pdf, part)
    return bytes(pdf.output())


def _text(pdf: Any, text: str, size: float) -> None:
    pdf.set_font(FONT, size=size)
    pdf.multi_cell(0, 0.5 * size, valid_text(text), markdown=True, align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1.5)


def _table(pdf: Any, table: Table) -> None:
    """A table; columns are as wide as their longest cell where there is room, and each page repeats the head."""
    from fpdf.fonts import FontFace

    pdf.set_font(FONT, size=8)
    if pdf.will_page_break(min(22 + 9 * len(table.rows), 70)):
        pdf.add_page()
    _text(pdf, f"**{table.name}.** {table.caption}", 8)
    pdf.set_font(FONT, size=7)
    columns = zip(table.heads, *table.rows, strict=True)
    widths = [max(map(pdf.get_string_width, map(valid_text, column))) + 6.0 for column in columns]
    widest = FULL_WIDTH  # columns that are wider share what the others leave
    while sum(min(width, widest) for width in widths) > FULL_WIDTH:
        widest -= 1.0
    widths = [min(width, widest) for width in widths]
    aligned = tuple("LEFT" if table.prose or i < table.names else "RIGHT" for i in range(len(widths)))
    with pdf.table(
        col_widths=tuple(widths),
        text_align=aligned,
        v_align="TOP",
        line_height=3.4,
        padding=0.6,
        borders_layout="HORIZONTAL_LINES",
        headings_style=FontFace(emphasis="BOLD", fill_color=240),
    ) as rows:
        for cells in (table.heads, *table.rows):
            row = rows.row()
            for cell in cells:
                row.cell(valid_text(cell if len(cell) <= LONGEST else f"{cell[:LONGEST]}…"))
    pdf.ln(3)
