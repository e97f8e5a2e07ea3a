"""Random and hostile responses: nothing raises, nothing takes a second, and the format is what a slow checker says.

Oracles: `slow_format`, which reads the paper's words one character after the other; an own count of the reflections and
an own search for the conclusion by `str.find`; the clock.

`QWENLA_FUZZ=1000000 pytest tests/rewards/fuzz_test.py` is the long form, and `QWENLA_FUZZ_SEED` repeats a seed.
"""

import os
import random
import sys
import time

import pytest
from measure import seconds, slower_than
from rewards.records import record

from qwenla_jax.rewards import RewardSettings, format_reward, score
from qwenla_jax.text.answers.match import extract_conclusion, matches
from qwenla_jax.text.response_format import parse

CASES = int(os.environ.get("QWENLA_FUZZ", "20000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
PARTS = 10  # tests that share the cases

ORDER = ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]
NAMES = [*ORDER, "REFLECTION"]
TAGS = [f"<{name}>" for name in NAMES] + [f"</{name}>" for name in NAMES]
RIGHT = "<SUMMARY>|s|</SUMMARY>|<CAPTION>|c|</CAPTION>|<REASONING>|r|</REASONING>|<CONCLUSION>|3|</CONCLUSION>".split(
    "|"
)
LOOK = ["<REFLECTION>", "look", "</REFLECTION>"]

BROKEN = [
    "<SUMMARY",
    "SUMMARY>",
    "< SUMMARY>",
    "</ SUMMARY>",
    "<SUMMARY/>",
    "<//CAPTION>",
    "<<REASONING>>",
    "<reflection>",
]
BROKEN += [
    "<REFLECTIONS>",
    "</REFLECT>",
    "<CONCLUSIO",
    "N>",
    "<",
    ">",
    "</",
    "&lt;SUMMARY&gt;",
    "＜SUMMARY＞",
    "<SUMMARY\x00>",
]
CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|im_end|",
    "|>",
    "</s>",
]
ANSWERS = [
    "3",
    "3.0",
    "-3",
    "three",
    "B",
    "(B)",
    "B) red",
    "yes",
    "No.",
    "yes, not",
    "1/2",
    r"\frac{1}{2}",
    "50%",
    "90°",
]
ANSWERS += [
    r"\boxed{3}",
    r"\boxed{\text{B}}",
    r"\boxed{",
    "$3$",
    r"\(3\)",
    r"\[3\]",
    "**3**",
    "'3'",
    '"3"',
    "`3`",
    "{3}",
]
ANSWERS += [
    "Answer: 3",
    "The final answer is option (B).",
    "1,000",
    "1e5",
    "1e999",
    "9" * 300,
    "1/0",
    "0.",
    ".5",
    "5!",
    "\u00b2",
]
ANSWERS += [
    "\\",
    "{",
    "}",
    "$",
    "^{\\circ}",
    "\u0663",
    "\uff13",
    "\u2160",
    "½",
    "∞",
    "nan",
    "inf",
    "1_000",
    "0x1F",
    "³√3",
]
SPACES = [
    " ",
    "\n",
    "\t",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2003",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\u3000",
]
PLANES = [0x0, 0x80, 0x300, 0x590, 0x3040, 0x4E00, 0xD800, 0xE000, 0xFE00, 0x1F600, 0x20000, 0xE0000, 0xF0000, 0x10FF00]


def slow_tags(response):
    """The ten tags in the order in which they stand, and the text before each and after the last."""
    tags, texts, text, at = [], [], "", 0
    while at < len(response):
        tag = None
        if response[at] == "<":
            for candidate in TAGS:
                if response[at : at + len(candidate)] == candidate:
                    tag = candidate
        if tag is None:
            text += response[at]
            at += 1
        else:
            tags.append(tag)
            texts.append(text)
            text, at = "", at + len(tag)
    return tags, [*texts, text]


def blank(text):
    return all(character.isspace() for character in text)


def slow_format(response):
    """The answer format, in the paper's order of words.

    The rules that the paper leaves open: only whitespace outside of sections, and only a reflection may be blank.
    """
    tags, texts = slow_tags(response)
    seen, inside = [], None
    for tag, text in zip(tags, texts[:-1], strict=True):
        if inside is None:
            if not blank(text) or tag.startswith("</"):
                return False  # outside of everything, or closed before it was opened
            inside = tag[1:-1]
        else:
            if tag != f"</{inside}>":
                return False  # nesting or overlap
            if inside != "REFLECTION" and blank(text):
                return False
            seen.append(inside)
            inside = None
    if inside is not None or not blank(texts[-1]):
        return False
    # In this order, once each; reflections anywhere between or after sections, so not before the first.
    return [name for name in seen if name != "REFLECTION"] == ORDER and seen[0] == "SUMMARY"


def slow_reflections(response):
    tags, texts = slow_tags(response)
    pairs = list(zip(tags[:-1], tags[1:], strict=True))
    return [texts[i + 1] for i, pair in enumerate(pairs) if pair == ("<REFLECTION>", "</REFLECTION>")]


def slow_conclusion(response):
    """Between the last opening tag that has a closing one behind it, and the first of those."""
    end = response.rfind("</CONCLUSION>")
    start = response.rfind("<CONCLUSION>", 0, max(end, 0))
    if start < 0:
        return None
    start += len("<CONCLUSION>")
    return response[start : response.find("</CONCLUSION>", start)].strip()


def piece(rng):
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(TAGS)
    if kind < 0.55:
        return rng.choice(BROKEN)
    if kind < 0.62:
        return rng.choice(CONTROL)
    if kind < 0.74:
        return rng.choice(ANSWERS)
    if kind < 0.86:
        return rng.choice(SPACES)
    if kind < 0.93:
        return "".join(
            chr(min(rng.choice(PLANES) + rng.randrange(256), sys.maxunicode)) for _ in range(rng.randrange(6))
        )
    if kind < 0.97:
        return chr(rng.randrange(sys.maxunicode + 1))
    return rng.choice(["a", "so ", "look", "\x00", "\x1b[31m", "\x7f", "'", '"', "(", ")", "[", "]"]) * rng.randrange(
        1, 40
    )


def response_of(rng):
    """Soup, or a right response in which a few pieces are dropped, doubled, swapped, put in or written over."""
    if rng.random() < 0.35:
        return "".join(piece(rng) for _ in range(rng.randrange(25)))
    parts = list(RIGHT)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        at = rng.choice([3, 6, 9, 12, rng.randrange(len(parts) + 1)])
        parts[at:at] = [LOOK[0], rng.choice(["", " ", "look", piece(rng)]), LOOK[2]]
    parts = [piece(rng) if part in ("s", "c", "r", "3") and rng.random() < 0.3 else part for part in parts]
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        change = rng.randrange(7)
        if change == 0:
            parts[at] = ""
        elif change == 1:
            parts[at] *= 2
        elif change == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif change == 3:
            parts.insert(at + rng.randrange(2), rng.choice(SPACES))
        elif change == 4:
            tags = [i for i, part in enumerate(parts) if part in TAGS] or [0]
            parts[rng.choice(tags)] = rng.choice(LOOK if rng.random() < 0.5 else TAGS)
        else:
            parts.insert(at + rng.randrange(2), piece(rng))
    return "".join(parts)


SETTINGS = RewardSettings(target_length=4.0, overlong=1.0, overlong_buffer=4, max_tokens=8)


def check(response, answer):
    """All that a reward does to one response. Raises where it is wrong; returns whether the format is right."""
    parsed = parse(response)
    form = slow_format(response)
    assert parsed.ok == form == (format_reward(response) == 1.0)
    assert [section.text for section in parsed.reflections] == slow_reflections(response)
    for section in parsed.sections:
        shown = f"<{section.name}>{section.text}</{section.name}>"
        assert response[section.start : section.end] == shown
    conclusion = extract_conclusion(response)
    assert conclusion == slow_conclusion(response)
    right = conclusion is not None and matches(conclusion, answer)
    scores = score(record(response, answer), SETTINGS)
    assert (scores.format, scores.accuracy) == (form, right)
    assert scores.num_reflections == len(parsed.reflections)
    assert scores.total == pytest.approx(form + right + scores.balance + scores.overlong)
    return form, right


@pytest.mark.parametrize("part", range(PARTS))
def test_soup(part):
    seed = SEED + part
    print(f"QWENLA_FUZZ_SEED={SEED}: seed {seed}")  # pytest shows it where the test fails
    rng = random.Random(seed)
    formed = accurate = 0
    for case in range(CASES // PARTS):
        response, answer = response_of(rng), rng.choice([rng.choice(ANSWERS), piece(rng), "3"])
        start = time.thread_time()
        try:
            form, right = check(response, answer)
            matches(answer, response)
            matches(response, answer)
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {response!r}, answer {answer!r}: {error!r}") from error
        assert not slower_than(1, start, check, response, answer), (seed, case, response, answer)
        formed += form
        accurate += right
    # The soup is worth something only where both verdicts are common.
    assert CASES < 5000 or 0.1 < formed / (CASES // PARTS) < 0.9 and accurate / (CASES // PARTS) > 0.05


# For each regular expression of text/answers/match.py and text/response_format.py what makes it go back and forth.
HOSTILE = {
    "tags": [
        "<",
        "</",
        "<SUMMARY",
        "<SUMMARY>",
        "</SUMMARY>",
        "<REFLECTION>",
        "<REFLECTION></REFLECTION>",
        "<SUMMARY><",
    ],
    "conclusion": ["<CONCLUSION>", "</CONCLUSION>", "<CONCLUSION></CONCLUSION>", "<CONCLUSION", "</"],
    "box": ["\\boxed", "\\boxed ", "\\boxed{", "\\fboxed{}", "\\boxed{{}", "{", "}", "{}", "\\boxed\n"],
    "emphasis": ["*", "**", "**a", " **a", "**a**", "**a**a", "a** ", "***", "** "],
    "math text": ["\\text", "\\text{", "\\text{a}", "\\text {", "\\mathrm{\\text{", "\\textbf "],
    "wrapped": [
        "$",
        "$a",
        "\\(",
        "\\)",
        "\\(a\\)",
        "\\[",
        "\\]",
        '"',
        "'",
        "'a",
        "“",
        "”",
        "“a”",
        "`",
        "(",
        ")",
        "((",
        "(a",
        "{(",
    ],
    "lead-in": [
        "so ",
        "so, ",
        "the ",
        "the final ",
        "answer ",
        "answer: ",
        "answer is ",
        "the answer is : ",
        "option ",
        "so the ",
    ],
    "exclamation": ["!", "a!", "ab!", "ab! ", "!!a"],
    "option": ["(", "A)", "B. ", "A: ", "B) a ", "A or ", "a.", "and/or ", "A ", "'A", "A B"],
    "yes and no": ["yes, ", "no. ", "not ", "n't", "n'", "never ", "yes"],
    "number": ["1", "1,000", ",000", "1.", ".", "1e", "1e9", "-", "+ ", "- 1", "0"],
    "ratio": ["1/", "/", "1 / ", "\\frac{", "\\frac{1}", "\\dfrac{1}{2}", "\\frac ", "{ 1 }"],
    "unit": ["%", " %", "\\%", "°", "^\\circ", "^ {", "\\$", " dollars", " degrees", "percent", "$ "],
    "whitespace": [" ", "\n", "\t\n ", "\u2003", " a", "\u200b", "\x00"],
    "punctuation": [".", ",", ";", ":", "?", " .", ", ", ".,;:? "],
    "unicode": ["\ud800", "\U0001f600", "\u0301", "\u0130", "\u1e9e", "\ufdfa", "\uff21", "\u2212", "\u2019"],
}
ENDS = [
    ("", ""),
    ("A. ", "q"),
    ("yes, ", "no"),
    ("\\(", "\\)"),
    ("**", "**"),
    ("\\boxed{", "}"),
    ("Answer: ", "!"),
    ("$", "$"),
]
ENDS += [("(", ")"), ("1", "%"), ("'", "'"), ("The final answer is ", ".")]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_take_no_second(name):
    # Quadratic time shows at 10,000 characters too. A microsecond a character is a second for a megabyte.
    slow = []
    for part in HOSTILE[name]:
        for start, end in ENDS:
            for length in (10_000, 10**6) if CASES >= 10**6 else (10_000,):
                limit = max(0.05, length / 10**6)
                text = start + part * (length // len(part)) + end
                for answer in ("A", "yes", "3", text[:-1] + "q"):
                    if (took := seconds(matches, text, answer, limit=limit)) > limit:
                        slow.append((took, part, start, end, length, answer[:9]))
                if not start:
                    for function in (parse, extract_conclusion):
                        if (took := seconds(function, "<CONCLUSION>" + text, limit=limit)) > limit:
                            slow.append((took, part, function.__name__, length))
    assert not slow


@pytest.mark.parametrize("part", range(4))
def test_megabyte_of_soup(part):
    rng = random.Random(SEED + part)
    print(f"QWENLA_FUZZ_SEED={SEED}")
    pieces = [piece(rng) for _ in range(100)]
    body = "".join(rng.choice(pieces) for _ in range(2 * 10**5))[: 10**6]
    for response in (body, "<CONCLUSION>" + body.replace("CONCLUSION", "conclusion") + "</CONCLUSION>"):
        assert seconds(parse, response, limit=1) < 1
        assert seconds(extract_conclusion, response, limit=1) < 1
        assert seconds(score, record(response, "B"), SETTINGS, limit=1) < 1
        assert parse(response).ok == slow_format(response)
