"""How answers are drawn: HTML read back by the standard library's parser, maps drawn by hand."""

import base64
import io
import re
import sys
import types
from html.parser import HTMLParser

import pytest
from PIL import Image

import qwenla_jax
from qwenla_jax.inference.answer import Answer, Insertion, SelectedTokens, VisualAttention
from qwenla_jax.inference.show import show, to_text, token_map
from qwenla_jax.text.response_format import parse

TEXT = (
    "<SUMMARY>count</SUMMARY> <REASONING>a < b & <script>alert(1)</script></REASONING>"
    "<REFLECTION>again\x1b[31m</REFLECTION> <CONCLUSION>2</CONCLUSION>stray <REFLECTION>cut off"
)


def make_answer(text=TEXT, question="<b>How many?</b>", size=(60, 30)):
    selected = ((0, 0), (0, 2), (1, 1))
    offsets = [match.start() for match in re.finditer("<REFLECTION>", text)]
    insertions = [
        Insertion(
            position=10 * turn,
            offset=offset,
            images=(SelectedTokens(0, 2, 3, selected),),
            before=VisualAttention(0.2, 0.0, 0.25, 0.0) if turn else None,
            after=VisualAttention(0.1, 0.3, 0.2, 0.2),
        )
        for turn, offset in enumerate(offsets)
    ]
    return Answer(
        text=text,
        token_ids=list(range(40)),
        sections=list(parse(text).sections),
        reattention=insertions,
        skipped=1,
        stopped=False,
        seconds=1.25,
        question=question,
        images=(Image.new("RGB", size, (200, 30, 30)),),
    )


class Reader(HTMLParser):
    """Elements, their text, and whether every element is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def named(self, tag, kind=None):
        return [attrs for name, attrs in self.elements if name == tag and kind in (None, attrs.get("class"))]


def test_html_escapes_all_text():
    read = Reader(make_answer().to_html())
    assert not read.named("script") and not read.named("b")
    text = "".join(read.words)
    assert "a < b & <script>alert(1)</script>" in text
    assert "<b>How many?</b>" in text
    assert "again␛[31m" in text


def test_html_outlines_the_kept_tokens():
    answer = make_answer()
    read = Reader(answer.to_html())
    svgs = read.named("svg")
    assert [svg["viewbox"] for svg in svgs] == ["0 0 3 2"] * 2
    corners = {(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", read.named("path", "kept")[0]["d"])}
    assert corners == set(answer.reattention[0].images[0].selected)
    rest = {(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)", read.named("path", "left-out")[0]["d"])}
    assert rest == {(0, 1), (1, 0), (1, 2)}
    images = read.named("img")
    assert len(images) == 3  # as asked, and once an insertion
    kind, _, data = images[0]["src"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (60, 30)
    assert int(images[0]["width"]) == 2 * int(images[0]["height"])
    assert all(attrs.get("src", "data:").startswith("data:") for _, attrs in read.elements)


def test_html_has_the_sections_with_their_tags():
    read = Reader(make_answer().to_html())
    tags = re.findall(r"</?[A-Z]+>", "".join(read.words))
    assert tags == re.findall(r"</?[A-Z]+>", TEXT)
    assert len(read.named("span", "tag")) == len(tags)
    assert len(read.named("div", "part reflection")) == 1
    assert make_answer()._repr_html_() == make_answer().to_html()


def test_pieces_hold_the_whole_text_in_order():
    result = [
        (piece.name, piece.text, piece.insertion and piece.insertion.position) for piece in make_answer().pieces()
    ]
    assert result == [
        ("SUMMARY", "count", None),
        ("REASONING", "a < b & <script>alert(1)</script>", None),
        ("REFLECTION", "again\x1b[31m", 0),
        ("CONCLUSION", "2", None),
        (None, "stray", None),
        (None, "<REFLECTION>cut off", 10),
    ]


def test_text_says_where_it_looked():
    text = to_text(make_answer())
    assert "\x1b" not in text
    lines = text.splitlines()
    at = lines.index("[inserted before token 0: 3 of 6 visual tokens]")
    assert lines[at + 1 : at + 3] == ["    # . #", "    . # ."]
    assert lines[at + 3] == (
        "[attention on visual tokens: - -> 40.0% (original 10.0%, inserted 30.0%); - -> 1.00x an even share]"
    )
    assert lines[at + 4] == "REFLECTION"
    assert "[attention on visual tokens: 20.0% -> 40.0% (original 10.0%, inserted 30.0%); 0.80x -> 1.00x" in text
    assert lines[-1] == (
        "(40 tokens in 1.2 s; 1 more reflection without an insertion; cut off at the most tokens allowed)"
    )


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for kind, coloured in ((io.StringIO, False), (Terminal, True)):
        out = kind()
        show(make_answer(), file=out)
        assert ("\x1b[33m" in out.getvalue()) == coloured
        assert "\x1b[31m" not in out.getvalue()  # that one is the model's own
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    show(make_answer(), file=out)
    assert "\x1b" not in out.getvalue()


def test_a_notebook_gets_html(monkeypatch, capsys):
    shown = []
    display = types.ModuleType("IPython.display")
    display.display = shown.append
    ipython = types.ModuleType("IPython")
    shell = types.SimpleNamespace(kernel=object())
    ipython.get_ipython = lambda: shell
    ipython.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    answer = make_answer()
    qwenla_jax.show(answer)
    assert shown == [answer] and not capsys.readouterr().out
    shell.kernel = None  # a terminal's IPython
    qwenla_jax.show(answer)
    assert shown == [answer] and "REFLECTION" in capsys.readouterr().out


def test_what_a_terminal_cannot_write_is_replaced():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    show(make_answer(text="<SUMMARY>caf\xe9</SUMMARY>"), file=out)
    out.flush()
    assert b"caf?" in raw.getvalue()


@pytest.mark.parametrize(
    ("rows", "cols", "selected", "expected"),
    [
        (1, 4, [(0, 3)], [". . . #"]),
        (3, 2, [(0, 0), (2, 1)], ["# .", ". .", ". #"]),
        (3, 72, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 71)], ["#" + " ." * 35, "." + " ." * 34 + " +"]),
    ],
)
def test_token_map(rows, cols, selected, expected):
    assert token_map(SelectedTokens(0, rows, cols, tuple(selected))) == expected
