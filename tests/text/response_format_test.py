"""Oracles: hand-written cases; a regular expression of the whole format, written from the paper, on random tag soup."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from measure import seconds

from qwenla_jax.text.response_format import Fault, Section, parse

S, C, R, A = "<SUMMARY>s</SUMMARY>", "<CAPTION>c</CAPTION>", "<REASONING>r</REASONING>", "<CONCLUSION>a</CONCLUSION>"
F = "<REFLECTION>f</REFLECTION>"
EMPTY = "<REFLECTION></REFLECTION>"

GOOD = {
    "plain": S + C + R + A,
    "spaced": f"\n {S}\n\n{C} \t{R}\n{A}\n",
    "reflection_between": S + C + R + F + A,
    "reflection_last": S + C + R + A + F,
    "reflection_everywhere": S + F + C + F + F + R + F + A + F,
    "empty_reflection": S + C + R + EMPTY + A,
    "blank_reflection": S + C + R + "<REFLECTION> \n</REFLECTION>" + A,
    "angle_brackets_in_text": S + C + "<REASONING>1 < 2 > 0 </b> <summary> <SUMMARY ></REASONING>" + A,
}

BAD = {
    "empty": ("", Fault.NO_TAGS, 0),
    "plain_text": ("The answer is 3.", Fault.NO_TAGS, 0),
    "lower_case_tags": ((S + C + R + A).lower(), Fault.NO_TAGS, 0),
    "text_before": ("Well. " + S + C + R + A, Fault.STRAY_TEXT, 0),
    "text_between": (S + "\n and " + C + R + A, Fault.STRAY_TEXT, len(S) + 2),
    "text_after": (S + C + R + A + " Bye", Fault.STRAY_TEXT, len(S + C + R + A) + 1),
    "control_token_after": (S + C + R + A + "<|im_end|>", Fault.STRAY_TEXT, len(S + C + R + A)),
    "text_beside_reflection": (S + C + R + "x" + F + A, Fault.STRAY_TEXT, len(S + C + R)),
    "cut_off": (S + C + "<REASONING>and so", Fault.UNCLOSED, len(S + C)),
    "cut_off_reflection": (S + C + R + A + "<REFLECTION>", Fault.UNCLOSED, len(S + C + R + A)),
    "unopened": (S + "</CAPTION>" + R + A, Fault.UNOPENED, len(S)),
    "closed_twice": (S + C + R + A + "</CONCLUSION>", Fault.UNOPENED, len(S + C + R + A)),
    "reflection_inside": (S + C + f"<REASONING>{F}</REASONING>" + A, Fault.NESTED, len(S + C + "<REASONING>")),
    "reflection_in_reflection": (S + f"<REFLECTION>{F}</REFLECTION>" + C + R + A, Fault.NESTED, len(S) + 12),
    "opened_twice": ("<SUMMARY>" + S + C + R + A, Fault.NESTED, len("<SUMMARY>")),
    "overlap": (S + C + "<REASONING>r</CAPTION>" + A, Fault.OVERLAP, len(S + C + "<REASONING>r")),
    "crossed": (
        S + C + "<REASONING>r<REFLECTION>f</REASONING></REFLECTION>" + A,
        Fault.NESTED,
        len(S + C + "<REASONING>r"),
    ),
    "repeated": (S + C + R + R + A, Fault.REPEATED, len(S + C + R)),
    "repeated_last": (S + C + R + A + A, Fault.REPEATED, len(S + C + R + A)),
    "swapped": (S + R + C + A, Fault.WRONG_ORDER, len(S)),
    "conclusion_first": (A + S + C + R, Fault.WRONG_ORDER, 0),
    "no_summary": (C + R + A, Fault.MISSING, 0),
    "no_conclusion": (S + C + R, Fault.MISSING, len(S + C + R)),
    "only_reflection": (F, Fault.EARLY_REFLECTION, 0),
    "reflection_first": (F + S + C + R + A, Fault.EARLY_REFLECTION, 0),
    "empty_conclusion": (S + C + R + "<CONCLUSION> </CONCLUSION>", Fault.EMPTY_SECTION, len(S + C + R)),
}

# The format as one expression: a section's body is anything without a tag, with at least one character to see.
_TAG = r"</?(?:SUMMARY|CAPTION|REASONING|CONCLUSION|REFLECTION)>"
_BODY = rf"(?:(?!{_TAG})[\s\S])*"
_FILLED = rf"(?:(?!{_TAG})\s)*(?!{_TAG})\S{_BODY}"
_REFLECTIONS = rf"\s*(?:<REFLECTION>{_BODY}</REFLECTION>\s*)*"
FORMAT = re.compile(
    r"\s*" + "".join(f"<{n}>{_FILLED}</{n}>{_REFLECTIONS}" for n in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION"))
)

names = st.sampled_from(["SUMMARY", "CAPTION", "REASONING", "CONCLUSION", "REFLECTION"])
pieces = st.one_of(
    names.map(lambda name: f"<{name}>"),
    names.map(lambda name: f"</{name}>"),
    st.sampled_from(["", " ", "\n", "x", "<", "<summary>", "<|im_end|>"]),
)
right_pieces = re.findall(r"</?\w+>|\w", S + F + C + R + EMPTY + A)


@st.composite
def nearly_right(draw):
    """A right response with a few pieces dropped, added or swapped."""
    parts = list(right_pieces)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        kind = draw(st.sampled_from(["drop", "add", "swap"]))
        if kind == "drop":
            parts.pop(at)
        elif kind == "add":
            parts.insert(at, draw(pieces))
        else:
            other = draw(st.integers(0, len(parts) - 1))
            parts[at], parts[other] = parts[other], parts[at]
    return "".join(parts)


@pytest.mark.parametrize("name", GOOD)
def test_right_format(name):
    parsed = parse(GOOD[name])
    assert (parsed.ok, parsed.fault, parsed.fault_at) == (True, None, None)
    assert [s.name for s in parsed.sections if s.name != "REFLECTION"] == [
        "SUMMARY",
        "CAPTION",
        "REASONING",
        "CONCLUSION",
    ]
    assert len(parsed.reflections) == GOOD[name].count("<REFLECTION>")


@pytest.mark.parametrize("name", BAD)
def test_wrong_format(name):
    response, fault, at = BAD[name]
    parsed = parse(response)
    assert (parsed.ok, parsed.fault, parsed.fault_at) == (False, fault, at)


def test_every_fault_has_a_case():
    assert {fault for _, fault, _ in BAD.values()} == set(Fault)


def test_spans_and_text():
    response = "<SUMMARY> one </SUMMARY>\n<REFLECTION>two</REFLECTION>"
    assert parse(response).sections == (
        Section("SUMMARY", " one ", 0, 24),
        Section("REFLECTION", "two", 25, 53),
    )


@pytest.mark.parametrize(
    ("response", "texts"),
    [
        ("<REFLECTION>a<REFLECTION>b</REFLECTION></REFLECTION>", ["b"]),
        ("<REASONING>r<REFLECTION>f</REFLECTION></REASONING>", ["f"]),
        ("<REFLECTION>a<SUMMARY>s</SUMMARY></REFLECTION>", []),
        ("<REFLECTION>a</REFLECTION></REFLECTION><REFLECTION>b", ["a"]),
        ("x<REFLECTION></REFLECTION>y<REFLECTION>b</REFLECTION>", ["", "b"]),
        ("<REFLECTION>a</SUMMARY></REFLECTION>", []),
    ],
)
def test_reflections_of_a_broken_response(response, texts):
    parsed = parse(response)
    assert not parsed.ok
    assert [reflection.text for reflection in parsed.reflections] == texts


@settings(deadline=None)
@given(st.one_of(nearly_right(), st.lists(pieces, max_size=30).map("".join), st.text()))
@example(S + C + R + A)
def test_agrees_with_the_format_as_one_expression(response):
    parsed = parse(response)
    assert parsed.ok == (FORMAT.fullmatch(response) is not None)
    assert parsed.ok == (parsed.fault is None) == (parsed.fault_at is None)
    end = 0
    for section in parsed.sections:
        assert end <= section.start
        end = section.end
        assert response[section.start : end] == f"<{section.name}>{section.text}</{section.name}>"


@pytest.mark.parametrize("piece", ["<", "<SUMMARY>", "</SUMMARY>", F, "<REFLECTION>", " ", "<SUMMARY></CAPTION>", "x"])
def test_time_is_linear(piece):
    # 2 million characters; quadratic time would be minutes.
    response = S + piece * (2_000_000 // len(piece))
    assert seconds(parse, response, limit=5) <= 5
