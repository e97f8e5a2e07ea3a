"""Oracle: html.parser reads the page back: no injected element, the text as sampled, the image's own pixels."""

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from qwenla_jax.run.completions import Completion, write_completions

ATTACK = (
    '</td></table><script>alert("1")</script><img src=x onerror=alert(2)> &lt; & \' " \x00\x1b[31m \udc80 é 猫 '
    "<REFLECTION>a <b>look</b></REFLECTION> after <REFLECTION>unclosed\n"
)


class Page(HTMLParser):
    """Elements, the text of each table cell, what stands in marks, and whether every element is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.cells, self.marks, self.images, self.links = [], [], [], [], [], []
        self.spans = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        assert not any(name.startswith("on") for name in attrs)
        if tag == "img":
            self.images.append(attrs["src"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "span":
            self.spans.append(attrs["class"])
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        if tag == "mark":
            self.marks.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data
        if "mark" in self.open:
            self.marks[-1] += data


def noise_image(value=0, size=(20, 12)):
    pixels = np.random.default_rng(value).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(response="<SUMMARY>s</SUMMARY>", image=None, advantage=0.5, prompt="How many?", **rewards):
    return Completion(
        images=(image or noise_image(),),
        prompt=prompt,
        answer="3",
        response=response,
        rewards=rewards or {"format": 1.0, "accuracy": 0.0, "balance": -0.25},
        reward=0.75,
        advantage=advantage,
    )


def test_injected_markup_stays_text(tmp_path):
    path = write_completions(tmp_path, 100, [row(ATTACK, prompt=ATTACK + "<style>")])
    assert path == tmp_path / "completions" / "step_000100.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.tags.count("img") == 1 and page.tags.count("table") == 1
    assert page.tags.count("style") == 1 and "b" not in page.tags
    assert page.cells[0] == ATTACK.replace("\x00", "␀").replace("\x1b", "␛").replace("\udc80", "?")
    assert page.marks == ["<REFLECTION>a <b>look</b></REFLECTION>", "<REFLECTION>unclosed\n"]


def test_numbers_signs_and_colours(tmp_path):
    rows = [row(advantage=1.25), row(advantage=-1.25), row(advantage=0.0), row(advantage=float("nan"))]
    page = Page(write_completions(tmp_path, 1, rows).read_text(encoding="utf-8"))
    assert page.cells[1:6] == ["1.00", "0.00", "-0.25", "0.75", "+1.25"]
    assert page.cells[11] == "\N{MINUS SIGN}1.25"
    assert [s for s in page.spans if s != "tag"] == ["plus", "minus", "zero", "zero"]


def test_the_image_is_inside_and_stands_once_a_question(tmp_path):
    one, other = noise_image(1), noise_image(2, (900, 300))
    rows = [row(image=one), row(image=one, response="b"), row(image=other)]
    page = Page(write_completions(tmp_path, 1, rows).read_text(encoding="utf-8"))
    assert len(page.images) == 2 and len(page.cells) == 3 * 6
    kinds, data = zip(*(uri.split(",", 1) for uri in page.images), strict=True)
    assert set(kinds) == {"data:image/png;base64"}
    read = [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]
    np.testing.assert_array_equal(np.asarray(read[0]), np.asarray(one))
    assert read[1].size == (336, 112) and other.size == (900, 300)


def test_index_links_every_step_in_order(tmp_path):
    for step in (200, 5, 1_000_000, 5):
        write_completions(tmp_path, step, [row()])
    page = Page((tmp_path / "completions" / "index.html").read_text(encoding="utf-8"))
    assert page.links == ["step_000005.html", "step_000200.html", "step_1000000.html"]
    assert all((tmp_path / "completions" / link).is_file() for link in page.links)


def test_no_rows_is_a_page(tmp_path):
    assert "table" not in Page(write_completions(tmp_path, 1, []).read_text(encoding="utf-8")).tags


def test_a_row_whose_rewards_failed_stands_among_the_others(tmp_path):
    failed = dataclasses.replace(row(), rewards={}, reward=math.nan, advantage=math.nan)
    page = Page(write_completions(tmp_path, 1, [failed, row()]).read_text(encoding="utf-8"))
    assert page.cells[1:6] == ["nan"] * 5 and page.cells[7:] == ["1.00", "0.00", "-0.25", "0.75", "+0.50"]


def test_the_index_plots_reward_accuracy_and_length(tmp_path):
    names = ("train/reward", "train/rewards/accuracy/mean", "train/completions/mean_length")
    values = [(1, 0.5, 0.25, 30), (3, 2.5, None, 40), (5, 1.5, 0.75, 20)]
    history = [{"step": step} | dict(zip(names, rest, strict=True)) for step, *rest in values] + [{"step": 5, "x": 1.0}]
    write_completions(tmp_path, 5, [row()], history)
    text = (tmp_path / "completions" / "index.html").read_text(encoding="utf-8")
    Page(text)
    points = [
        [tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="(.*?)"', text)
    ]
    assert points == [
        [(0, 120), (300, 0), (600, 60)],  # y grows downwards in SVG
        [(0, 120), (600, 0)],
        [(0, 60), (300, 0), (600, 120)],
    ]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [
        "reward: 0.5 to 2.5, steps 1 to 5",
        "accuracy: 0.25 to 0.75, steps 1 to 5",
        "length in tokens: 20 to 40, steps 1 to 5",
    ]
    long = [{"step": step, "train/reward": 1.0} for step in range(10**4)]
    write_completions(tmp_path, 6, [row()], long)
    text = (tmp_path / "completions" / "index.html").read_text(encoding="utf-8")
    assert 300 < len(re.search(r'points="(.*?)"', text)[1].split()) <= 600


def test_an_empty_reflection_is_marked_too(tmp_path):
    path = write_completions(tmp_path, 1, [row("a<REFLECTION></REFLECTION>b")])
    assert Page(path.read_text(encoding="utf-8")).marks == ["<REFLECTION></REFLECTION>"]
