"""Figures draw the numbers that were written, and the page holds all of itself."""

import ast
import base64
import html.parser
import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import attention, heat, line, records, response, write_curve, write_run

from qwenla_jax.study import figures as fg
from qwenla_jax.study import tables as tb
from qwenla_jax.study.attention_figure import figure_5
from qwenla_jax.study.collect import BASE, COPY, ROUTE, TEXT, Curve, StudyError, collect
from qwenla_jax.study.redraw import make_image
from qwenla_jax.study.report_page import DRAWINGS, write_report

COUNT = 64


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds. Base answers: 32 of 20 tokens with an object at 4, right, and 32 of 29 with one at 12, invented."""
    folder = tmp_path_factory.mktemp("study")
    for seed in (0, 1):
        asked = records(seed, COUNT)
        short = [line(r, True, ((4, True),), 20, missed=0) for r in asked[:32]]
        long = [line(r, True, ((12, False),), 29, missed=1) for r in asked[32:]]
        said = ["no" if r.answer != "no" else "yes" for r in asked]
        corrected = [line(r) | {"response": response(said[i], r.answer)} for i, r in enumerate(asked)]
        sums = attention(early=0.4, middle=0.3, late=0.1 * (1 + seed), count=COUNT)
        write_run(
            folder / f"seed_{seed}",
            seed,
            count=COUNT,
            right={TEXT: 32, ROUTE: 40},
            base={"lines": short + long, "attention": sums},
            copy={"lines": corrected, "attention": sums, "batch_s": (0.6, 0.6, 0.6)},
            **{
                name: {"attention": attention(count=COUNT)}
                for name in ("cold_start", "Qwen_Zero", "text_only", "route", "route_25", "route_75", "vision_only")
                + ("no_BRPO_and_COPY", "no_BRPO_and_ROUTE")
            },
        )
    return collect([folder / "seed_0", folder / "seed_1"], ["seed_2 is not finished"])


def lines_of(axis):
    """Legend's word -> (x, y)."""
    return {one.get_label(): (one.get_xdata(), one.get_ydata()) for one in axis.get_lines()}


def test_figure_1(study):
    place, by_length, recall = fg.figure_1(study).axes
    x, y = lines_of(place)["plain (base)"]
    assert y.tolist() == [0, 100] and x[0] in (4, 4.5) and x[1] in (12, 12.5)
    x, y = lines_of(by_length)["plain (base)"]
    assert y.tolist() == [0, 100] and abs(x[0] - 20) <= 1 and abs(x[1] - 29) <= 1
    # Short: one of one named; long: an invented one, and one that is missed.
    assert lines_of(recall)["plain (base)"][1].tolist() == [100, 0]
    assert place.get_xlabel() == "tokens up to the object" and "(%)" in place.get_ylabel()


def test_figures_2_and_9(study):
    mass, over = fg.figure_2(study).axes
    x, y = lines_of(mass)["plain (base)"]
    assert x.tolist() == [3.5, 11.5, 19.5] and y.tolist() == pytest.approx([40, 30, 15])  # the last: 10 and 20
    assert lines_of(over)["plain (base)"][1].tolist() == pytest.approx([1.6, 1.2, 0.6])
    labels = fg.figure_9(study).axes[0].get_legend_handles_labels()[1]
    assert labels == ["text-only reflection", "COPY", "ROUTE 50%"]
    dashes = {(one.get_linestyle(), one.get_marker()) for one in fg.figure_9(study).axes[0].get_lines()}
    assert len(dashes) == 3  # told apart without colour


def test_figures_6_and_7(study):
    tokens, count = fg.figure_6(study).axes
    x, y = lines_of(count)["mean of seeds"]
    assert x[0] == 1.5 and x[-1] == 59.5 and y.tolist() == pytest.approx(0.01 * x)  # 60 steps, two a bin
    assert lines_of(tokens)["mean of seeds"][1].tolist() == pytest.approx(0.1 * x)
    (axis,) = fg.figure_7(study).axes
    drawn = next(c for c in axis.containers if "greedy" in c.get_label())
    assert drawn.lines[0].get_xdata().tolist() == [0, 30, 60]
    assert drawn.lines[0].get_ydata().tolist() == [25, 50, 75]
    ends = drawn.lines[2][0].get_segments()[1][:, 1]
    assert ends[0] + ends[1] == pytest.approx(100) and 41 < ends[0] < 42  # Wilson's for 64 of 128: 41.5 to 58.5


def test_figure_sweep(study):
    gain, time = fg.figure_sweep(study).axes
    here = next(c for c in gain.containers if c.get_label() == "here").lines[0]
    assert here.get_xdata().tolist() == [0, 25, 50, 75, 100]
    assert here.get_ydata().tolist() == pytest.approx([0, 50, 12.5, 50, 50])
    here = next(c for c in time.containers if c.get_label() == "here").lines[0]
    assert here.get_ydata().tolist() == pytest.approx([0, 0, 0, 0, 20])
    assert lines_of(gain)["paper (7B, MMMU)"][1].tolist() == pytest.approx([0, -3.2, 0.3, 0.7, 1.5])
    assert lines_of(time)["paper (7B, MMMU)"][1][-1] == pytest.approx(27.45, abs=0.1)  # the 27% of the paper's text


def test_figure_5(study):
    figure = figure_5(study)
    maps = [image.get_array() for axis in figure.axes for image in axis.get_images()]
    drawn = [np.asarray(m) for m in maps if m.shape == (2, 2)]
    assert len(drawn) == 12
    np.testing.assert_allclose(drawn[0], [[2, 4], [6, 8]])  # percent, the original and its copy together
    assert "20% in all" in figure.axes[1].get_xlabel()
    asked = study.seeds[0].systems[COPY].texts[0]
    assert figure.get_suptitle() == f"{asked['question']} Right answer: {asked['answer']}"
    with pytest.raises(StudyError, match="3 questions have maps .* number 7"):
        figure_5(study, 7)


def test_a_bin_with_too_little_is_not_drawn(tmp_path):
    lines = [line(r, True, ((4, True),) if i else ((20, False),)) for i, r in enumerate(records(0))]
    write_run(tmp_path, systems=(BASE, TEXT), base={"lines": lines})
    x, y = lines_of(fg.figure_1(collect([tmp_path])).axes[0])["plain (base)"]
    assert len(x) == 1 and y.tolist() == [0]


def test_a_curve_needs_points(tmp_path):
    write_run(tmp_path, systems=(BASE,))
    write_curve(tmp_path, evaluated=((60, 0.5),))
    with pytest.raises(StudyError, match=r"metrics.jsonl: eval/accuracy stands at 1 steps .*curve_every"):
        fg.figure_7(collect([tmp_path]))
    (tmp_path / "brpo/metrics.jsonl").unlink()
    with pytest.raises(StudyError, match=r"metrics.jsonl: no such file"):
        fg.figure_6(collect([tmp_path]))


def test_tables(study):
    row = dict(zip(tb.overhead_table(study).heads, tb.overhead_table(study).rows[2], strict=True))
    assert (row["system"], row["tokens"], row["put in"], row["ms"]) == (COPY, "30.0", "18.0", "60.00")
    assert row["over text-only"] == "+20% [+20, +20]" and row["paper: tokens"] == "1811.4"
    assert tb.sweep_table(study).rows[2][3].startswith("+12.5 points [") and tb.sweep_table(study).rows[0][3] == "-"
    accuracy = {row[0]: row for row in tb.accuracy_table(study).rows}
    assert accuracy[TEXT][1].startswith("50.0 [") and accuracy[TEXT][2] == "50.0 [38.1, 61.9]; 50.0 [38.1, 61.9]"
    kinds = {row[0]: row[1:] for row in tb.kinds_table(study).rows}
    asked = [int(n) for n in kinds["questions"]]
    right = sum(float(share) * n for share, n in zip(kinds[TEXT], asked, strict=True)) / 100
    assert sum(asked) == 128 and min(asked) > 0 and right == pytest.approx(64, abs=0.05)
    hallucinated = {row[0]: row for row in tb.hallucination_table(study).rows}
    assert hallucinated[BASE][1].startswith("50.0 [") and hallucinated[BASE][3].startswith("50.0 [")  # 64 of 128
    assert hallucinated[BASE][4].startswith("50.0 [") and hallucinated[BASE][6] == "2.00"  # 1 of 2 marks each
    # Every reasoning with COPY is wrong and every conclusion right; text-only concludes rightly in half.
    reflected = {row[0]: row[1:] for row in tb.reflection_table(study).rows}
    assert reflected[COPY] == ("128", "0 (0.0%)", "128 (100.0%)", "0 (0.0%)", "0 (0.0%)")
    assert reflected[TEXT] == ("128", "0 (0.0%)", "64 (50.0%)", "0 (0.0%)", "64 (50.0%)")
    for make in tb.TABLES:
        table = make(study)
        assert all(len(r) == len(table.heads) for r in table.rows) and table.caption


class Page(html.parser.HTMLParser):
    """What a browser would load, and whether every element is closed in its turn."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.marks = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marks.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "mark" in self.open:
            self.marks[-1] += data


def write_page(study, folder):
    """The page that is written, read back."""
    write_report(study, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_self_contained(study, tmp_path):
    path = tmp_path / "report.html"
    write_report(study, path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text()
    page = Page(text)
    assert ", p < 0.001" in page.text and "50.0 [38.1, 61.9]<br>50.0 [38.1, 61.9]" in text
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form", "video"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data"):
                assert tag == "img" and value.startswith("data:image/"), (tag, name)
    assert "@import" not in text and "url(" not in text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(len(attrs["alt"]) > 20 for attrs in images)
    figures = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert figures == [f"figure-{n}" for n in ("1", "2", "5", "6", "7", "9", "m")]
    tables = [tag for tag, _ in page.tags if tag == "caption"]
    assert len(tables) == 1 + len(tb.TABLES) and "missing" in text and "seed_2 is not finished" in page.text
    assert page.text.count("The reflection corrects the reasoning") == 2
    for attrs in images:
        kind, _, data = attrs["src"].partition(";base64,")
        raw = base64.b64decode(data, validate=True)
        if kind.endswith("svg+xml"):
            refs = [v for e in ET.fromstring(raw).iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(ref.startswith("#") for ref in refs)
        else:
            Image.open(io.BytesIO(raw)).verify()
    assert len(figures) == len(DRAWINGS)


def test_what_is_missing_is_reported(tmp_path):
    folder = write_run(tmp_path / "seed_0", systems=(BASE, TEXT), base={"maps": heat(0)})
    page = write_page(collect([folder]), tmp_path)
    for name in ("Figure 5", "Figure 9", "Figure m", "Ablation table", "Examples"):
        assert f"{name} is not here: no evaluation of" in page.text, name
    assert "in seed_0/evaluate" in page.text and str(tmp_path) not in page.text
    assert "were not judged" in page.text


def test_a_response_is_text(tmp_path):
    hostile = "</REFLECTION></dd><script>&\x1b[31m\udc80<REFLECTION>a<REFLECTION>b</SUMMARY>"
    lines = [line(r) | {"response": response("nothing", r.answer) + hostile} for r in records(0)]
    run = write_run(tmp_path / "seed_0", systems=(COPY,), copy={"lines": lines})
    page = write_page(collect([run]), tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("</REFLECTION></dd><script>&␛[31m?<REFLECTION>a<REFLECTION>b</SUMMARY>") == 2
    assert page.marks == ["<REFLECTION>look again</REFLECTION>", "<REFLECTION>a<REFLECTION>b</SUMMARY>"] * 2


def test_a_figure_is_the_same_file_twice(study):
    first, second = (fg.to_bytes(fg.figure_2(study)) for _ in range(2))
    assert first == second
    assert Image.open(io.BytesIO(fg.to_bytes(fg.figure_2(study), "png"))).size[0] > 1000


def test_without_matplotlib(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(fg.NoMatplotlib, match=r"qwenla_jax\[report\]"):
        write_report(study, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    """It says what it leaves out, and writes nothing where something is amiss."""
    command = [sys.executable, "launch/pipeline.py", f"--workdir={tmp_path}", "--report"]
    write_run(tmp_path / "seed_0", systems=(COPY,))
    (tmp_path / "seed_1").mkdir()
    root = Path(fg.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.splitlines()[0] == "left out: seed_1 is not finished (it has no table.json)"
    assert "1 seed(s), 40 questions each" in done.stdout and (tmp_path / "report.html").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "seed_0", "seed_1"]


def test_matplotlib_is_imported_only_to_draw():
    """Nowhere in the package at import: only in functions, and for types."""
    package = Path(fg.__file__).parents[1]
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:  # `if TYPE_CHECKING:` is not run
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not re.search(r"\bmatplotlib\b", ast.unparse(node)), path


def test_another_version_of_the_scenes(tmp_path):
    folder = write_run(tmp_path, systems=(COPY,))
    path = folder / "evaluate/copy/answers.jsonl"
    path.write_text(path.read_text().replace('"question": "', '"question": "Really? '))
    with pytest.raises(StudyError, match="another version of the scenes"):
        make_image(collect([folder]).of(COPY)[0], 0)


def test_step_means():
    nothing = np.zeros(0, int)
    curve = Curve(np.arange(1, 6), np.array([1, 3, math.nan, 5, 9.0]), *[np.zeros(5)] * 2, nothing, nothing, nothing)
    steps, means = fg.step_means(curve, "count", 2)
    assert steps.tolist() == [1.5, 3.5, 5] and means.tolist() == [2, 5, 9]
