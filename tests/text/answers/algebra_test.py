r"""Oracle: mathematics. The cases that differ guard against what the library alone would take: see TRAPS."""

import logging
import sys

import pytest

from qwenla_jax.text.answers import algebra
from qwenla_jax.text.answers.algebra import math_matches, require_math
from qwenla_jax.text.answers.match import matches

library = pytest.importorskip("math_verify")

# fmt: off
# (conclusion, right answer)
EQUAL = [
    (r"\sqrt{12}", r"2\sqrt{3}"), ("2*sqrt(3)", r"2\sqrt{3}"), ("2^3", "8"),
    (r"\frac{3\pi}{4}", r"\frac{3}{4}\pi{inches}"), ("x+1 ", "1+x"), (r"\sqrt{2}", "1.414214"),
    ("1.414214", r"\sqrt{2}"), (r"(2,\infty)", "x>2"), ("2<x", "x>2"), (r"\{\sqrt{4}, 1\}", r"\{1, 2\}"),
    (r"(1, \sqrt{4})", "(1, 2)"), (r"\frac{x^2-1}{x-1}", "x+1"), ("y = 2x+1", "y=1+2x"), ("2x+1", "y=1+2x"),
    (r"4\sqrt3 cm", r"\sqrt{48}"), (r"2\pi", "6.283185"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\ \frac{4}{2}\end{pmatrix}"), ("|{-5}|", "5"),
    ("5!", "120"), (r"\infty", r"\infty"), (r"\pi-\tan^{-1}(1/d)", r"$\pi-\tan ^{-1}\left(\frac{1}{d}\right)$"),
    (r"\frac{7^3}{2^{12}13^2}", r"\frac{343}{692224}"), (r"\log_2 8", "3"), (r"2\sqrt{221}", r"2 \sqrt { 221 }"),
    (r"\frac{6\sqrt3}{2}", r"3\sqrt3"), (r"\sqrt{3} \sqrt{3}", "3"), (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)"),
    (r"\boxed{\sqrt{12}}", r"\boxed{2\sqrt3}"), (r"\log_2 16", "4"), (r"\log_{10} 100", "2"), (r"\log_{10}100", "2"),
    (r"(2)13\pi", r"26\pi"), (r"\sqrt{2}13", r"13\sqrt2"), (r"\frac12\pi", r"\frac{\pi}{2}"),
    (r"\frac{3\sqrt{33}}5", r"0.6\sqrt{33}"), ("3√2", r"3\sqrt{2}"), ("√(12)", r"2\sqrt{3}"), ("80-2pi", r"80-2\pi"),
    ("2**3", "8"), ("10^6+1", "1000001"),
]

DIFFERENT = [
    ("cat", "act"), ("cba", "abc"), ("ba", "ab"), ("3 4", "7"), ("1=2=3", "3"), ("x+1", "y+1"),
    (r"\sin^2 x+\cos^2 x", "1"), (r"\int_0^1 2x dx", "1"), (r"\sum_{n=1}^{3} n", "6"), (r"10^{-8}\pi", "0"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), ("1.41", r"\sqrt{2}"),
    (r"50\%", r"\frac{\sqrt{1}}{2}"), ("0.5", r"50\%"), ("x>2", r"(2,\infty)"), (r"(\sqrt{4}, 1)", "(1, 2)"),
    ("(1, 2)", r"\{1, 2\}"), (r"\pm 2", "2"), ("2", r"\pm 2"), ("19, 46, 82", "21, 36, 82"), ("12:00", "1:00"),
    (r"1,3,\ldots,n", r"1,2,\ldots,n"), (r"1+\frac{1}{e}", r"1-\frac{1}{e}"), (r"4\sqrt3 cm", r"\sqrt{48} m"),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"-\infty", r"\infty"),
    (r"\sqrt{2} or \sqrt{3}", r"\sqrt{2}"), (r"\sqrt{2}, \sqrt{3}", r"\sqrt{2}"), (r"\frac{1}{0}", r"\frac{2}{0}"),
    (r"\foo{\frac{1}{2}}", "0.5"), ("221", r"2 \sqrt { 221 }"), ("3+0i", "3"), ("3x/x", "3"),
    (r"(0,1)\cup(2,4)", r"(2,3)\cup(0,1)"), (r"2\sqrt{3}\approx 3.46", r"2\sqrt3"),
    (r"\sqrt{12}=2\sqrt3", r"2\sqrt3"), (r"e^{\pi i}", "-1"), (r"10^{-7}\sqrt2", r"10^{-7}\sqrt3"),
    ("1e-7", r"\frac{\pi}{31415926}"), ("(2)13", "15"), (r"\sqrt12", r"2\sqrt3"), (r"\frac{1}{2}13", "2"),
    ("2^{12}13", "12288"), (r"\frac{7^3}{2^{12}13^2}", r"\frac{343}{36864}"), ("1.5.2", "0.3"),
    (r"\infty/\infty", "1"), (r"0\cdot\infty", "0"), (r"\sqrt{-1}", "1"), (r"\frac{\sqrt 2}{0}", "0"),
    ("", "3"), ("3", ""), (r"\sqrt{12}" * 40, r"\sqrt{12}" * 40 + "+0"), ("yes", "y e s"),
]

# (conclusion, right answer): differ, and the library alone takes them for the same.
TRAPS = [
    ("act", "cat"), ("2act", "2cat"), ("1=2=3", "3"), ("0.5", r"50\%"), ("3 4", "7"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ("(2)13", "15"), (r"\sin^2 x + \cos^2 x", "1"), (r"2\sqrt{3} \approx 3.46", r"2\sqrt{3}"), (r"10^{-8}\pi", "0.0"),
    (r"\frac{1}{2^{12} 13^2}", r"\frac{1}{36864}"),
    ("0.3333333", r"\frac{1}{3}"), ("2, 1", "1, 2"), ("x=2, y=1", "y=1, x=2"),
]
# fmt: on


@pytest.mark.parametrize(("conclusion", "answer"), EQUAL)
def test_equal_by_algebra(conclusion, answer):
    assert matches(conclusion, answer) or math_matches(conclusion, answer)
    assert math_matches(answer, answer)


@pytest.mark.parametrize(("conclusion", "answer"), DIFFERENT)
def test_different(conclusion, answer):
    assert not matches(conclusion, answer) and not math_matches(conclusion, answer)


@pytest.mark.parametrize(("conclusion", "answer"), TRAPS)
def test_traps_of_the_library_are_closed(conclusion, answer):
    config = [library.LatexExtractionConfig()]
    want, got = (library.parse(f"${text}$", config, parsing_timeout=None) for text in (answer, conclusion))
    assert library.verify(want, got, timeout_seconds=None)  # the trap is still there: else drop it from here
    assert not math_matches(conclusion, answer)


def test_the_right_answer_goes_first():
    # The library takes an interval for an inequality, not an inequality for an interval: it might be the question.
    assert math_matches(r"(2, \infty)", "x > 2") and not math_matches("x > 2", r"(2, \infty)")


@pytest.mark.parametrize(
    "text",
    ["10^{10^{10}}", "10^10^10", "9**9**9", "9^{9^9}", "2^{100000}", "2^{(9^9)}", "(99!)!", "10000!", "3!!", "2^{99!}"],
)
def test_what_is_too_large_is_not_worked_out(text, monkeypatch):
    monkeypatch.setattr(library, "verify", lambda *_, **__: pytest.fail("asked"))
    assert not math_matches(text, "3") and not math_matches(text, r"7\pi") and not math_matches("3", text)


@pytest.mark.parametrize("text", [r"e^{x^2}", r"2^{9999}\pi", "9!", r"x^{2}y^{3}"])
def test_what_is_not_too_large_is(text):
    assert math_matches(f"{text} + 0", text)


def test_options():
    options = (r"$3\sqrt{2}$", r"$2\sqrt{3}$", r"$\frac{\pi}{2}$", "B")
    assert math_matches(r"\sqrt{12}", "B", options) and math_matches("√12", r"2\sqrt{3}", options)
    assert not math_matches(r"\sqrt{12}", "A", options) and not math_matches(r"\sqrt{12}", "D", options)
    assert not math_matches("A", "A", options)  # a letter is no expression
    assert not math_matches(r"\sqrt{12}", "A", (r"2\sqrt{3}", r"\sqrt{4}\sqrt{3}"))  # two options are the same


def test_works_off_the_main_thread_and_says_nothing(caplog):
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(math_matches(r"\sqrt{8}", r"2\sqrt{2}")))
    with caplog.at_level(logging.DEBUG):
        thread.start()
        thread.join()
    assert results == [True]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_leaves_signals_alone():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        math_matches(r"\sqrt{18}", r"3\sqrt{2}")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900 and signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("ask", [require_math, lambda: math_matches("1", "1")])
def test_without_the_library(monkeypatch, ask):
    algebra._library.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'qwenla_jax\[math\]'"):
        ask()
