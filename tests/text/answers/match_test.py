"""Oracle: hand-written cases. `official_answers_test.py` compares with official scorers on real answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import seconds

from qwenla_jax.text.answers.match import extract_conclusion, matches

# fmt: off
SAME = [
    # options
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B)", "B"), ("(b).", "B"), (" B\n", "B"), ("**B**", "B"),
    ("Answer: B", "B"), ("**Answer:** B", "B"), ("Answer B", "B"), ("The answer is B.", "B"),
    ("So, the correct answer is option (B).", "B"), ("Option B", "B"), ("The correct option is B", "B"),
    ("B) red", "B"), ("(B) red", "B"), ("B. A cat", "B"), ("B: 3 and 5", "B"), ("Option B: red", "B"),
    ("D", "(D)"), ("D", "D."), ("C", "the answer: c"),
    # boxes
    (r"\boxed{B}", "B"), (r"$\boxed{\text{B}}$", "B"), (r"We get \boxed{3} at last.", "3"), ("3", r"$\boxed{3}$"),
    (r"\boxed{3}, no, \boxed{4}", "4"), (r"\boxed{\frac{1}{2}}", "0.5"), (r"\boxed {3}", "3"),
    (r"The final answer is: $\boxed{4}$.", "4"),
    # numbers
    ("3", "3"), ("3.0", "3"), ("3.", "3"), ("+3", "3"), ("03", "3"), ("three", "3"), ("Three.", "3"), ("3", "three"),
    ("1,000", "1000"), ("1,234,567.50", "1234567.5"), ("$3$", "3"), (r"\(3\)", "3"), (r"\frac{1}{2}", "0.5"),
    (r"-\dfrac{1}{2}", "-0.5"), ("1/2", "0.5"), ("2 / 4", "1/2"), (".5", "0.5"), ("1e3", "1000"), ("\u22123", "-3"),
    ("50%", "50"), ("50 %", "50%"), (r"50\%", "50"), ("50", "50 percent"), ("90°", "90"), (r"$90^{\circ}$", "90"),
    ("90 degrees", "90°"), ("$5", "5"), ("5 dollars", "$5"), ("Answer: three", "3"), ("The result is 4", "4"),
    ("0", "-0"),
    # yes and no
    ("yes", "Yes"), ("Yes.", "yes"), ("Yes!", "yes"), ("The answer is no.", "no"),
    ("Yes, there is a red circle.", "yes"),
    ("No, there is not.", "no"), ("No. There is no circle.", "no"),
    # text
    ("red", "Red"), ("**red**.", "red"), ('"red"', "red"), ("\u201cred\u201d", "red"),
    ("a  red\ncircle", "A red circle"),
    ("Red!", "red"), ("it's red", "it\u2019s red"), ("5!", "5!"), ("(1, 2)", "(1, 2)"), ("A or B", "A or B"),
]

DIFFERENT = [
    ("", ""), ("", "A"), ("  \n", "3"), (".", "3"), ("the answer", ""), ("3", " "), (r"\boxed{}", "3"), ("()", "3"),
    # more than one answer, or none
    ("A or B", "A"), ("A or B", "B"), ("A, B", "A"), ("A, B", "B"), ("A/B", "A"), ("A and B", "A"), ("A) or B)", "A"),
    ("A. or B.", "A"), ("(A) (B)", "A"), ("(A) B", "A"), ("A. B", "A"), ("a. or b.", "A"), ("A: A or B", "A"),
    ("(A)(B)", "A"), ("B.C.", "B"), ("A B C D E", "A"), ("ABCDE", "A"), ("Option A or B", "A"),
    ("3 or 4", "3"), ("3, 4", "3"), ("3 4", "34"),
    ("yes and no", "yes"), ("yes, no", "yes"), ("yes, no", "no"), ("no, yes", "no"), ("Yes, or maybe not", "yes"),
    ("yes/no", "yes"), ("Yes, there isn't one", "yes"), (r"\boxed{3} or \boxed{4}", "3"), (r"\boxed{3 or 4}", "4"),
    ("not B", "B"), ("the answer is not B", "B"), ("not 3", "3"),
    # a part of something longer
    ("13", "3"), ("3", "13"), ("30", "3"), ("3 circles and 4 squares", "3"), ("yesterday", "yes"), ("now", "no"),
    ("Cat", "C"), ("a cat", "A"), ("C", "Cat"), ("red circle", "red"), ("infrared", "red"),
    # other values
    ("-3", "3"), ("5!", "5"), ("3\u00b2", "32"), ("2**3**4", "234"), ("50%", "0.5"), ("50%", "50°"), ("$50", "50%"),
    ("(1,2)", "[1,2]"), ("1/0", "0"), ("0.33", "1/3"), ("3.01", "3"), ("1,00", "100"), ("I", "1"), ("B'", "B"),
    ("A", "B"),
    ("yes", "no"), ("three", "4"), ("thirty", "3"), ("nan", "0"), ("1e999999999", "1"), ("9" * 5000, "9"),
]
# fmt: on


@pytest.mark.parametrize(("conclusion", "answer"), SAME)
def test_usual_writings_match(conclusion, answer):
    assert matches(conclusion, answer)


@pytest.mark.parametrize(("conclusion", "answer"), DIFFERENT)
def test_anything_else_does_not(conclusion, answer):
    assert not matches(conclusion, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("B", None),
        ("<CONCLUSION>B", None),
        ("B</CONCLUSION>", None),
        ("</CONCLUSION>B<CONCLUSION>", None),
        ("<CONCLUSION>B</CONCLUSION>", "B"),
        ("<CONCLUSION>\n B \n</CONCLUSION>", "B"),
        ("<CONCLUSION></CONCLUSION>", ""),
        ("<CONCLUSION>A</CONCLUSION><CONCLUSION>B</CONCLUSION> C", "B"),
        ("<CONCLUSION>A<CONCLUSION>B</CONCLUSION></CONCLUSION>", "B"),
        ("<CONCLUSION>A</CONCLUSION><CONCLUSION>B", "A"),
        ("<CONCLUSION>A<REFLECTION>f</REFLECTION></CONCLUSION>", "A<REFLECTION>f</REFLECTION>"),
    ],
)
def test_extract_conclusion(text, expected):
    assert extract_conclusion(text) == expected


@settings(deadline=None)
@given(st.text(), st.text(), st.lists(st.text(), max_size=4))
def test_any_text_is_taken(conclusion, answer, options):
    assert matches(conclusion, answer) in (True, False)
    assert matches(conclusion, answer, options) in (True, False)
    assert matches(conclusion, answer) == matches(f"  {conclusion}\n", answer)
    extract_conclusion(conclusion)


@settings(deadline=None)
@given(st.text(alphabet="AaB31.,%$\\{}()[]*'\"!?-/ :oryesn\n", max_size=30))
def test_an_answer_equals_itself_or_is_blank(text):
    assert matches(text, text) or not any(character.isalnum() for character in text) or "boxed" in text


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_match_by_value(first, second):
    assert matches(str(first), str(second)) == (first == second)
    assert matches(f"{first:,}", f"{first}.0")


@pytest.mark.parametrize("prefix", ["", "A. ", "yes, ", "\\("])
@pytest.mark.parametrize(
    "piece",
    ["(", "**a", " **a", "\\boxed{", "{", "$", '"', "'a", "! ", "!", "ab!", "1,000", "a. ", "answer: ", "\\frac{"],
)
def test_time_is_linear(prefix, piece):
    # 300,000 characters; quadratic time would be minutes.
    text = prefix + piece * (300_000 // len(piece))

    def work():
        for answer in ("A", "yes", "3", text[:-1] + "q"):
            matches(text, answer)
        extract_conclusion("<CONCLUSION>" + text)

    assert seconds(work, limit=5) <= 5
