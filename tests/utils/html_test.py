"""Templates escape what they are given; oracle: html.unescape reads it back."""

import configparser
import fnmatch
import html
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from qwenla_jax.utils.html import render, write_page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qwenla_jax"
STEPS = [(1, "a.html")]


def index(name):
    return render("completions_index.html", steps=[(name, "a.html")], charts=[])


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "&lt; & \" '", "é 猫 \t\n"])
def test_text_is_escaped(text):
    page = index(text)
    assert "<script" not in page
    assert text in html.unescape(page)
    for special in "<>\"'":
        assert special not in page.partition('<a href="a.html">')[2].partition("</a>")[0]


def test_what_html_cannot_hold_is_replaced(tmp_path):
    write_page(tmp_path / "a.html", "completions_index.html", charts=[], steps=[("\x00\x1b[1m\x0c\udc80", "a.html")])
    assert "step ␀␛[1m␌?</a>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_missing_value_is_an_error_and_leaves_the_page(tmp_path):
    path = tmp_path / "a.html"
    write_page(path, "completions_index.html", steps=STEPS, charts=[])
    before = path.read_bytes()
    with pytest.raises(jinja2.UndefinedError, match="'steps' is undefined"):
        write_page(path, "completions_index.html", charts=[])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.html"]


def test_jinja_is_imported_only_to_draw():
    code = "import sys, qwenla_jax.run.completions, qwenla_jax.inference.show; assert 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_wheel_holds_every_file_that_is_no_module():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.package_data"]["qwenla_jax"].split()
    others = [path for path in PACKAGE.rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    names = [path.relative_to(PACKAGE).as_posix() for path in others]
    assert "templates/page.html" in names
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
