"""Random answers through every parser: nothing raises, no answer takes a second.

Oracle: the clock, and what a parser may return. `QWENLA_FUZZ=100000 pytest tests/evals/parsers_fuzz_test.py` is the
long form, and `QWENLA_FUZZ_SEED` repeats a seed.
"""

import os
import random
import time

import pytest
from measure import seconds, takes_linear_time

from qwenla_jax.evals.benchmarks.chair import mentions, read_synonyms
from qwenla_jax.evals.benchmarks.latex_values import DEADLINE_S, same_values
from qwenla_jax.evals.benchmarks.mathvision_task import mathvision_answer, same_text
from qwenla_jax.evals.benchmarks.mmbench_mmstar import first_letter, read_letter
from qwenla_jax.evals.benchmarks.mmhal import rating
from qwenla_jax.evals.benchmarks.mmmu import choice, open_candidates, open_right
from qwenla_jax.evals.benchmarks.pope_mme import mme_answer, pope_answer
from qwenla_jax.evals.lettered import inline_options

CASES = int(os.environ.get("QWENLA_FUZZ", "3000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
OPTIONS = {"A": "red", "B": "", "C": "(", "D": "\\frac{1}{2}", "E": "5"}
PIECES = r"""
A B. (C) D) E: yes no not No, Answer: answer is the|final|answer|is The|answer|should|be so thus = \approx
\boxed{ oxed{ } { {} \frac \frac12 \frac{1}{2} \sqrt \sqrt3 \sqrt{ ^ _ ^\circ ^{\circ} \text{ \left \right
\infty ∞ π \pi $ \$ % \% , . ; ! ? ' " `` ( ) [ ] 1 2 0.5 .5 1,234 1e9 -3 +4 3/4 1/0 9^9 99! x red Rating:
rating:|3 dog dogs teddy bear bow tie baby hot men's can't e.g. Mr. -- ... <CONCLUSION> </CONCLUSION> inf nan
٣ é İ ẞ cm m^3 units km Options: ,A: 1_0 \\ \! \, #
""".split()
ODD = ["\n", " ", "", "\x00", "\ud800", "\u2003", "\t", "\r"]
SYNONYMS = read_synonyms()


def soup(rng):
    pieces = [
        rng.choice(PIECES).replace("|", " ") if rng.random() < 0.85 else rng.choice(ODD)
        for _ in range(rng.randrange(14))
    ]
    text = rng.choice(["", " ", " "]).join(pieces)
    return text * rng.choice([50, 200]) if rng.random() < 0.01 else text


PARSERS = {
    "pope": lambda text: pope_answer(text) in ("yes", "no"),
    "mme": lambda text: mme_answer(text) in ("yes", "no", "other"),
    "mmmu": lambda text: choice(text, OPTIONS) in (None, *OPTIONS),
    "mmmu_pro": lambda text: choice(text, OPTIONS, pro=True) in (None, *OPTIONS),
    "mmmu_open": lambda text: bool(open_candidates(text)) and open_right(text, text[:20]) in (True, False),
    "letters": lambda text: read_letter(text, OPTIONS) in (None, *OPTIONS) and isinstance(inline_options(text), dict),
    "first_letter": lambda text: first_letter(text) in (None, *"ABCDEFGH"),
    "mathvision": lambda text: same_text(mathvision_answer(text), "\\frac{1}{2}") in (True, False, None),
    "mmhal": lambda text: rating(text) in (None, *range(7)),
    "chair": lambda text: set(mentions(text, SYNONYMS)) <= set(SYNONYMS.object_of.values()),
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """What is loaded at the first call, such as CHAIR's lemmas, is no answer's doing."""
    for parser in PARSERS.values():
        parser("a dog")


@pytest.mark.parametrize("name", PARSERS)
def test_random_answers(name):
    rng = random.Random(f"{SEED} {name}")
    print(f"QWENLA_FUZZ_SEED={SEED}")
    for _ in range(CASES):
        text = soup(rng)
        assert PARSERS[name](text), text
        assert seconds(PARSERS[name], text, limit=1) <= 1, text[:200]


@pytest.mark.parametrize(
    "part",
    "is |so so |1,|1,234|oxed{|{|=|A |(A)|' |\n|\\frac1|a. |--|toilet |answer is *|1|0.|1.1|.|?!|.)| |\t ".split("|"),
)
@pytest.mark.parametrize(("start", "end"), [("", ""), ("mr.", "a")])
def test_long_answers(part, start, end):
    text = start + part * (20_000 // len(part)) + end
    for name, parser in PARSERS.items():
        assert parser(text) or name == "mmmu_open", (name, part)
        if seconds(parser, text, limit=1) > 1:  # CHAIR's sentences and lemmas are a library's
            assert takes_linear_time(parser, text[: len(text) // 4], text), (name, part)


def test_values_of_random_latex():
    pytest.importorskip("latex2sympy2_extended")
    rng = random.Random(SEED)
    print(f"QWENLA_FUZZ_SEED={SEED}")
    pairs = [(mathvision_answer(soup(rng)), "\\frac{1}{2}") for _ in range(CASES // 20)]
    pairs = [(got, want) for got, want in pairs if same_text(got, want) is None]
    start = time.monotonic()
    result = same_values([("1/2", "0.5"), *pairs, ("1/2", "0.5")])
    assert result[0] and result[-1] and set(result) <= {True, False, None}
    assert time.monotonic() - start < 20 + 3 * DEADLINE_S * len(pairs)
