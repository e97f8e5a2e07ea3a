"""The length study's report as Markdown, page and PDF has the analysis's numbers, all of them in each.

Oracle: `html.parser` and pypdf read the files back; differences are worked out from the files' digits.
"""

import html.parser
import json
import re
import sys

import numpy as np
import pypdf
import pytest
from length_studies import QUICK, SCENES, content, folder_of

from qwenla_jax.study import report_formats
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.figures import NoMatplotlib
from qwenla_jax.study.length_analysis import Contrast, Study, right
from qwenla_jax.study.length_arms import BLANK, COPY, OTHER, ROUTE_25, SQUEEZED, TEXT
from qwenla_jax.study.length_claims import AGREES, OPEN, OPPOSITE, claims, reading
from qwenla_jax.study.length_figure import COLOURS, length_figure
from qwenla_jax.study.length_report import write_length_report
from qwenla_jax.study.length_results import read_results, write_result
from qwenla_jax.study.report_formats import Report, Section, illustration, write_formats
from qwenla_jax.study.tables import Table


class Page(html.parser.HTMLParser):
    """A page's elements in their order, its text, and the cells of its tables by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.rows, self.inside = [], "", [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data


def bare(text):
    """Without blanks, as lines are broken otherwise in each form."""
    return "".join(text.split())


def pdf_text(path):
    return "\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report on two base models of two seeds each, with an arm more than the quick size has."""
    folder = tmp_path_factory.mktemp("length")
    folder_of(folder / "results", arms=(*QUICK, ROUTE_25), bases="ab")
    write_length_report(folder / "results", folder / "report.md")
    return folder


def accuracy(arm, seed):
    return content(arm, seed)["cells"]["chain/160"]["continued"]["right"].count("1") / SCENES


def test_numbers_are_those_of_the_files(written):
    page = Page((written / "report.html").read_text())
    after, before = ([accuracy(arm, seed) for seed in (0, 1)] for arm in (COPY, TEXT))
    seeds = ", ".join(f"{100 * (x - y):+.1f}" for x, y in zip(after, before, strict=True))
    row = next(row for row in page.rows if row[0] == f"COPY - {TEXT}")
    assert row[1] == "above 0" and row[3] == f"a: {seeds}; b: {seeds}" and row[5] == AGREES
    assert row[2].startswith(f"{100 * (np.mean(after) - np.mean(before)):+.1f} [")
    one = Study.of(read_results(written / "results")).difference("short", COPY, TEXT, right(160))
    assert row[2].endswith(f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}]")
    assert row[4] == f"{100 * one.spread:.1f} ({100 * one.scenes_spread:.1f})"


def test_all_forms_have_all_of_it(written):
    page = Page((written / "report.html").read_text())
    markdown = (written / "report.md").read_text().replace("\\|", "|").replace("&lt;", "<").replace("&amp;", "&")
    pdf = pdf_text(written / "report.pdf")
    cells = [cell for row in page.rows for cell in row if cell]
    assert len(cells) > 200 and len(page.rows) == sum(line.startswith("| ") for line in markdown.split("\n"))
    for text in (bare(markdown), bare(pdf)):
        assert [cell for cell in cells if bare(cell) not in text] == []
    for number in range(1, 10):
        name = "H1 (primary)." if number == 1 else f"H{number}."
        assert name in page.text and name in pdf and name in markdown, name
    for text in (page.text, pdf, markdown):
        for words in ("no results of vision-only (short)", "the study has no such arm"):
            assert bare(words) in bare(text)


def test_accuracy_over_length_comes_first(written):
    page = Page((written / "report.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert names.index("img") < names.index("table")
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert "accuracy over N" in images[0]["alt"] and "colour words over N" in images[1]["alt"]
    markdown = (written / "report.md").read_text()
    assert markdown.index("(accuracy.svg)") < markdown.index("|---") < markdown.index("(colours.svg)")
    assert (written / "accuracy.svg").read_text() != (written / "colours.svg").read_text()
    assert len(pypdf.PdfReader(written / "report.pdf").pages[0].images) == 1


def test_the_page_loads_nothing(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert name not in ("src", "href", "srcset", "data") or value.startswith("data:image/svg+xml;base64,")
    assert "url(" not in text and "@import" not in text and str(written) not in text
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert text.count("<table") == text.count('<div class="wide') > 10  # each scrolls by itself


def test_the_figure_draws_the_numbers(written):
    study = Study.of(read_results(written / "results"))
    figure = length_figure(study)
    (axis,) = figure.axes
    arms = {container.get_label(): container for container in axis.containers}
    assert list(arms) == [TEXT, BLANK, COPY, ROUTE_25, OTHER, SQUEEZED]
    assert len({(c.lines[0].get_color(), c.lines[0].get_marker()) for c in arms.values()}) == len(arms)
    for arm, container in arms.items():
        x, y = container.lines[0].get_data()
        assert np.asarray(x) == pytest.approx([16, 160], rel=0.08)
        assert y[1] == pytest.approx(100 * np.mean([accuracy(arm, seed) for seed in (0, 1)]))
        one = study.share("short", arm, right(160))
        ends = container.lines[2][0].get_segments()[1][:, 1]
        assert ends == pytest.approx([100 * one.low, 100 * one.high])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["16", "160"] and "right answers" in axis.get_ylabel()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(arms)
    assert "colour" in length_figure(study, COLOURS, "colour words (%)").axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("low", "high", "seeds", "stated", "expected"),
    [
        (1, 3, (2, 1), 1, AGREES),
        (1, 3, (2, 1), -1, OPPOSITE),
        (-3, -1, (-2, -1), -1, AGREES),
        (-3, -1, (-2, -1), 1, OPPOSITE),
        (-1, 3, (2, 1), 1, OPEN),  # the interval holds 0
        (1, 3, (4, -0.1), 1, OPEN),  # a seed disagrees
        (float("nan"), float("nan"), (2, 1), 1, OPEN),
        (1, 3, (2, 1), 0, "-"),
    ],
)
def test_a_reading(low, high, seeds, stated, expected):
    one = Contrast(2.0, low, high, low, high, (seeds,), 1.0, 1.0)
    assert reading(one, stated) == expected


def test_every_hypothesis_has_its_controls():
    by_number = {number.split()[0]: differences for number, _, differences in claims()}
    assert list(by_number)[:9] == [f"H{n}" for n in range(1, 10)] and all(by_number.values())
    for number, condition in (("H1", "short"), ("H3", "long")):
        against = [(one.stated, {term[1:3] for term in one.terms}) for one in by_number[number]]
        for arm in (TEXT, BLANK, OTHER):
            assert (1, {(condition, COPY), (condition, arm)}) in against
        assert "filler" in by_number[number][3].words
    assert [one.stated for one in by_number["H4"]] == [-1, -1, 0, 0]


def test_what_is_missing_is_said(tmp_path):
    folder = folder_of(tmp_path / "results")
    (folder / "a_1_COPY.json").unlink()
    (folder / "a_1_anotherimage.json").unlink()
    head = write_length_report(folder, tmp_path / "report.md")
    page = Page((tmp_path / "report.html").read_text())
    for text in (head, page.text, " ".join(pdf_text(tmp_path / "report.pdf").split())):
        assert re.search(r"Missing\S* of the size quick: base a, short, seed 1: COPY \+ another image\.", text)
        assert "Not judged" in text and "base a, seed 1, short: no result of COPY" in text
    row = next(row for row in page.rows if row[0] == f"COPY - {TEXT}")
    assert row[2:] == ["", "", "", "not judged: base a, seed 1, short: no result of COPY"]
    # A single arm.
    only = tmp_path / "only" / "results"
    write_result(only / "a_0.json", content(TEXT))
    write_length_report(only, tmp_path / "only" / "report.md")
    assert "no results of COPY (short)" in (tmp_path / "only" / "report.html").read_text()
    # A measure that a file lacks: the file is named, and not where it lies.
    one = content(COPY)
    del one["cells"]["chain/160"]
    write_result(only / "a_0_COPY.json", one)
    write_length_report(only, tmp_path / "only" / "report.md")
    text = (tmp_path / "only" / "report.html").read_text()
    assert "not judged: a_0_COPY.json: no continued right at 160 tokens of chain" in text and str(tmp_path) not in text
    with pytest.raises(StudyError, match="holds no results"):
        write_length_report(tmp_path / "none", tmp_path / "none.md")
    assert not (tmp_path / "none.md").exists()


def test_of_the_full_size_all_is_missing_that_is_not_there(tmp_path):
    folder = folder_of(tmp_path / "results", seeds=3)
    assert "fewer than three" not in (head := write_length_report(folder, tmp_path / "report.md"))
    assert "full: base a, long: every arm; base a, paper-order: every arm; base a, short, seed 0, 1, 2: pause" in head
    assert "vision-only; base a, short, seed 3, 4: every arm; base b: everything. What" in head


def test_answers_are_text(tmp_path):
    hostile = "</td><script>&amp; a|b **c** \x1b[31m\udc80\n<REFLECTION> [x](y) " + 900 * "27:3+4,"
    one = content(COPY)
    one["answers"] = {"chain/160": {"free": [hostile]}}
    write_result(tmp_path / "results" / "a.json", json.loads(json.dumps(one)))
    write_length_report(tmp_path / "results", tmp_path / "report.md")
    page = Page((tmp_path / "report.html").read_text())
    shown = hostile.replace("\x1b", "␛").replace("\udc80", "?")
    assert page.rows[-1] == ["COPY, N = 160, free", shown] and "script" not in {tag for tag, _ in page.tags}
    last = (tmp_path / "report.md").read_text().rstrip().split("\n")[-1]
    assert "&lt;/td>&lt;script>&amp;amp; a\\|b **c**" in last
    text = bare(pdf_text(tmp_path / "report.pdf"))
    assert bare("</td><script>&amp; a|b **c**") in text and 2800 < 7 * text.count("27:3+4,") < 3000 and "…" in text


def test_without_the_libraries(tmp_path, monkeypatch):
    report = Report(
        "A title", [Section("A part", ["Words, **bold** ones.", Table("T", "of two.", ("a", "b"), (("1", "2"),))])]
    )
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "fpdf", None)
        lines = write_formats(report, tmp_path / "a.md")
    assert lines[2] == "no a.pdf: it needs fpdf2 and matplotlib: pip install 'qwenla_jax[report]'"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.md"]
    assert (tmp_path / "a.md").read_text() == (
        "# A title\n\n## A part\n\nWords, **bold** ones.\n\n**T.** of two.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    assert "Words, <b>bold</b> ones." in (tmp_path / "a.html").read_text()

    def draw():
        raise NoMatplotlib("figures need matplotlib")

    assert illustration("a", "A", "", "", draw) == "No figure: figures need matplotlib."
    with monkeypatch.context() as without:
        without.setattr(report_formats, "require_matplotlib", draw)
        assert "no a.pdf" in write_formats(report, tmp_path / "a.md")[2]
    assert write_formats(report, tmp_path / "a.md")[2] == str(tmp_path / "a.pdf")
    outline = pypdf.PdfReader(tmp_path / "a.pdf").outline
    assert [entry.title for entry in outline] == ["A part"]
