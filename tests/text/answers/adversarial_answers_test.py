r"""What a policy may try, and what only looks odd. Oracle: each case decided by hand, with the reason in its group."""

import pytest
from measure import takes_linear_time

from qwenla_jax.text.answers.match import exact_matches, matches

OPTIONS = ("red", "blue", "3 or 4", "10 cm", r"$\frac{1}{2}$")

# fmt: off
# (conclusion, right answer, options, whether it is right)
CASES = [
    # More than one answer is none.
    ("A or B", "A", (), False), ("A, B, C, D", "A", (), False), ("A/B/C/D", "C", (), False),
    ("A B C D E", "B", (), False), ("(A) (B) (C)", "A", (), False), ("A. B. C.", "A", (), False),
    ("A and B are both right", "A", (), False), ("Either A or B", "B", (), False),
    ("A; B", "A", (), False), ("A\nB\nC\nD", "D", (), False), ("A or B", "A", OPTIONS, False),
    ("red or blue", "A", OPTIONS, False), ("red, blue", "B", OPTIONS, False), ("A. red, B. blue", "A", OPTIONS, False),
    ("A. red or blue", "A", OPTIONS, False), ("red (or B)", "A", OPTIONS, False),
    ("3 or 4", "3", (), False), ("3, 4", "3", (), False), ("3 and 4", "4", (), False), ("3/4", "3", (), False),
    ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "7", (), False), ("0 1 2 3 4 5 6 7 8 9", "3", (), False),
    ("1 2 3 4 5", "12345", (), False), ("3 ± 1", "4", (), False), ("between 2 and 4", "3", (), False),
    ("yes or no", "yes", (), False), ("Yes. No.", "no", (), False), ("yes, but perhaps no", "yes", (), False),
    (r"\boxed{3} or \boxed{4}", "4", (), False), (r"\boxed{3}, \boxed{4}", "4", (), False),
    (r"\boxed{3}\boxed{4}", "4", (), False), (r"$\boxed{A}$ and $\boxed{B}$", "B", (), False),
    (r"\boxed{3 or 4}", "4", (), False), ("1 = 2 = 3", "3", (), False), ("x = 3, x = 4", "3", (), False),
    # A label that contradicts its text; a letter that the question does not have.
    ("A. blue", "A", OPTIONS, False), ("A. blue", "B", OPTIONS, False), ("B. blue", "B", OPTIONS, True),
    ("G. red", "A", OPTIONS, False), ("G", "A", OPTIONS, False),
    # Denials, and answers inside sentences.
    ("not 3", "3", (), False), ("The answer is not 3", "3", (), False), ("anything but B", "B", (), False),
    ("It is not A, so B", "B", (), False), ("I think it may be 3, but I am not sure", "3", (), False),
    ("The answer is 3 because there are 3 circles", "3", (), False), ("not red", "A", OPTIONS, False),
    ("≠3", "3", (), False), (r"\neq 3", "3", (), False), ("~3", "3", (), True), (r"\sim 3", "3", (), False),
    (">3", "3", (), False), ("3+", "3", (), False), ("<3>", "3", (), False),
    # Exact option text, also where it looks like two answers.
    ("red", "A", OPTIONS, True), ("Red.", "A", OPTIONS, True), ("The answer is blue.", "B", OPTIONS, True),
    ("3 or 4", "C", OPTIONS, True), ("C. 3 or 4", "C", OPTIONS, True), ("3", "C", OPTIONS, False),
    ("10", "D", OPTIONS, True), ("0.5", "E", OPTIONS, True), ("100 mm", "D", OPTIONS, False),
    ("infrared", "A", OPTIONS, False), ("r", "A", OPTIONS, False), ("red", "B", OPTIONS, False),
    ("B", "blue", OPTIONS, True), ("blue", "blue", OPTIONS, True), ("A", "blue", OPTIONS, False),
    ("50", "A", ("50", "50%"), True), ("50%", "A", ("50", "50%"), False), ("5", "A", ("5 cm", "5 m"), False),
    ("red", "A", ("red", "Red"), True), ("RED", "A", ("red", "Red"), False), ("Aa", "B", ("AA", "Aa"), True),
    ("B", "A", ("B", "A"), False), ("A", "A", ("B", "A"), True), ("red", "A", ("A. red", "B. blue"), True),
    ("", "A", ("", "b"), False), ("", "A", OPTIONS, False), ("B) ", "B", OPTIONS, True),
    # Boxes.
    (r"\boxed{3", "3", (), False), (r"boxed{3}", "3", (), False), (r"\boxed3", "3", (), False),
    (r"\boxed{}", "3", (), False), (r"\boxed{3} \boxed{}", "3", (), False), (r"\boxed{ }", "", (), False),
    (r"\boxed{\boxed{3}}", "3", (), True), (r"\boxed{\boxed{3}", "3", (), True), (r"\boxed{{3}}", "3", (), True),
    (r"3} \boxed{4", "3", (), False), (r"\boxed{\text{(B)}}", "B", (), True), (r"\boxed{\frac{1}{2}}", "1/2", (), True),
    (r"first \boxed{3}, then \boxed{4}", "4", (), True), (r"first \boxed{3}, then \boxed{4}", "3", (), False),
    # Writings of numbers.
    ("1e5", "100000", (), True), ("1E+05", "100,000", (), True), (r"10^5", "100000", (), True),
    ("1e5", "10000", (), False),
    (r"3 \times 10^{-2}", "0.03", (), True), ("3 x 10^8", "3e8", (), True), ("1e999", "1", (), False),
    ("10^10^10", "10", (), False), (r"10^{10^{10}}", "10", (), False), ("9**9**9", "9", (), False),
    ("9" * 300, "9", (), False),
    ("1 1/2", "1.5", (), True), (r"1\frac{1}{2}", "3/2", (), True), (r"1 \frac12", "1.5", (), True),
    ("11/2", "1.5", (), False),
    ("-1 1/2", "-1.5", (), True), (r"\frac{-1}{2}", "-0.5", (), True), (r"\frac{360}7", "360/7", (), True),
    ("1/0", "0", (), False), (r"\frac{0}{0}", "0", (), False), ("0x10", "16", (), False), ("1_000", "1000", (), False),
    ("1{,}000", "1000", (), True), (r"1\,000", "1000", (), True), ("1 000", "1000", (), False),
    ("3,5", "3.5", (), False),
    ("0.333", "1/3", (), False), ("3.0000001", "3", (), False), ("--3", "3", (), False), ("nan", "nan3", (), False),
    ("x = 3", "3", (), True), ("AB = 3", "3", (), True), ("x = 3", "y = 3", (), False), ("x_1 = 3", "3", (), True),
    ("1:2", "1: 2", (), True), ("1:2", "0.5", (), False), ("12:00", "12", (), False),
    # Other scripts: full-width forms of ASCII are ASCII, other digits are not; marks without width are nothing.
    ("\uff22", "B", (), True), ("\uff13\uff0e\uff10", "3", (), True), ("\u0663", "3", (), False),
    ("\u00b3", "3", (), False),
    ("\u0392", "B", (), False), ("\u2462", "3", (), False), ("\u2167", "8", (), False), ("\U0001d7d1", "3", (), False),
    ("\u200f3\u200e", "3", (), True), ("3\u200b", "3", (), True), ("\u202e31\u202c", "13", (), False),
    ("\u202e31\u202c", "31", (), False), ("3\u0335", "3", (), False), ("3\u2044" "4", "3/4", (), False),
    ("B\ufeff", "B", (), True),
    # Percent and units: one may be left out, two must be the same, nothing is converted.
    ("50%", "0.5", (), False), ("0.5", "50%", (), False), ("50", "50%", (), True), (r"50\%", "50 percent", (), True),
    ("1 m", "100 cm", (), False), ("1 m", "1 cm", (), False), ("100", "100 cm", (), True),
    ("100 centimeters", "100cm", (), True),
    (r"5\text{ cm}^2", "5 square centimeters", (), True), ("5 cm^2", "5 cm", (), False),
    ("5 sq. cm", "5 cm²", (), True),
    (r"12 $\mathrm{m}$", "12", (), True), ("3 m/s^2", "3 m/s", (), False), ("3 meters per second", "3 m/s", (), True),
    (r"39^\circ", "39", (), True), (r"\angle ABC = 39^{\circ}", "39 degrees", (), True), ("39°", "39%", (), False),
    ("$5", "5 dollars", (), True), ("$5", "€5", (), False), (r"\$5", "5", (), True), ("5 cats", "5", (), False),
    ("2m", "2m", (), True), ("2", "2m", (), False), ("2m", "2", (), True), ("69", "69{degrees}", (), True),
    ("5 cm or 6 cm", "5 cm", (), False), ("5 cm 6 cm", "5", (), False), ("five meters", "5 m", (), True),
    # Tuples, intervals, sets, lists.
    ("(1, 2)", "(1,2)", (), True), ("(2, 1)", "(1, 2)", (), False), ("1, 2", "(1, 2)", (), True),
    ("(1, 2]", "(1, 2)", (), False),
    ("[1, 2]", "(1, 2)", (), False), ("[1, 2.0]", "[1, 2]", (), True), (r"\left(1,\, 2\right)", "(1,2)", (), True),
    (r"\{2, 1\}", r"\{1, 2\}", (), True), ("{1, 2, 3}", "{1, 2}", (), False), ("{1}", "{1, 2}", (), False),
    ("2, 1", r"\{1, 2\}", (), True), ("2, 1", "1, 2", (), False), ("(1, 2)", r"\{1, 2\}", (), False),
    ("{1, 1, 2}", "{1, 2}", (), True), ("1 and 2", "1, 2", (), True), ("(1, 2), (3, 4)", "(1, 2), (3, 4)", (), True),
    ("(3, 4), (1, 2)", "(1, 2), (3, 4)", (), False), ("(1, 2), (3, 4)", "(1, 2)", (), False),
    ("1, 2,", "1, 2", (), True),
    # A left side that only names the value, in the ways of geometry; check marks and headings.
    (r"m\angle ABC = 60^\circ", "60", (), True), ("m∠1 = 60°", "60", (), True), ("m\\angle{1} = 60°", "60", (), True),
    (r"m\widehat{JK} = 60", "60", (), True), (r"\overset{\frown}{AB} = 60°", "60", (), True),
    (r"\sin A = 0.8", "0.8", (), True), (r"\tan \theta = 3/4", "0.75", (), True), ("sin(A) = 0.8", "0.8", (), True),
    (r"\text{Area} = 60", "60", (), True), (r"\text{Surface area} = 60 \text{ cm}^2", "60", (), True),
    (r"S_{\triangle ABC} = 12", "12", (), True), (r"\text{m}\angle 2 = 30°", "30", (), True),
    (r"\boxed{m\angle 1 = 60^\circ}", "60", (), True), ("∠ABC = 60", r"m\angle ABC = 60°", (), True),
    (r"\overline{AB} = 3", "AB = 3", (), True), ("sin A = 0.8", r"\sin A = 0.8", (), True),
    ("The area = 60", r"\text{Area} = 60", (), True), (r"\angle{ABC} = 60", r"\angle ABC = 60", (), True),
    ("✅ Final Answer: **73**", "73", (), True), ("**✅ 73**", "73", (), True),
    ("### Final Answer: 73", "73", (), True),
    # A left side that is another quantity, or a part or a multiple of the value; a cross; two answers.
    (r"\text{Area} = 60", r"\text{Perimeter} = 60", (), False), (r"\sin A = 0.8", r"\cos A = 0.8", (), False),
    (r"\sin A = 0.8", r"\sin B = 0.8", (), False), (r"m\angle ABC = 60", r"m\angle DEF = 60", (), False),
    (r"m\angle ABC = 60", r"m\widehat{ABC} = 60", (), False), (r"\triangle ABC = 6", r"\angle ABC = 6", (), False),
    ("m∠1 = 60", "m∠2 = 60", (), False), ("2x = 60", "60", (), False), ("2x = 60", "30", (), False),
    ("-x = 3", "3", (), False), ("x^2 = 9", "9", (), False), (r"\frac{x}{2} = 3", "3", (), False),
    ("1/x = 3", "3", (), False), ("|x| = 3", "3", (), False), ("n! = 6", "6", (), False), ("x + 1 = 6", "6", (), False),
    (r"\sin 2A = 0.8", "0.8", (), False), (r"2\sin A = 0.8", "0.8", (), False), (r"\sin^2 A = 0.6", "0.6", (), False),
    (r"\arcsin A = 1", "1", (), False), (r"\log x = 3", "3", (), False), (r"2m\angle A = 30", "30", (), False),
    (r"\frac12 m\angle A = 30", "30", (), False), (r"\angle A + \angle B = 90", "90", (), False),
    ("180 - m∠1 = 60", "60", (), False), ("half the area = 60", "60", (), False), ("Area/2 = 60", "60", (), False),
    ("2 Area = 60", "60", (), False), ("not area = 60", "60", (), False), ("Area > 60", "60", (), False),
    ("Area ≠ 60", "60", (), False), ("Area squared = 9", "9", (), False), ("Area = 60 or 61", "60", (), False),
    ("Area = 60, Perimeter = 60", "60", (), False), ("angle sum = 180", "angle = 180", (), False),
    ("❌ 73", "73", (), False), ("✅ 72", "73", (), False), ("✅ 73 ✅ 74", "73", (), False),
    ("✅ A or B", "A", (), False),
    # LaTeX writings.
    (r"4 \pi", r"$4\pi$", (), True), (r"\sqrt{2} : 1", r"$\sqrt{2}: 1$", (), True),
    (r"\dfrac{a}{b}", r"\frac{a}{b}", (), True),
    (r"\left( x + 1 \right)", "(x+1)", (), True), (r"\Delta", r"\delta", (), False),
    ("\x0crac{36}{13}", r"\frac{36}{13}", (), True),
    (r"2\sqrt{3}", r"2\sqrt{5}", (), False), (r"\text{east}", "East", (), True), (r"\;3\;", "3", (), True),
]
# fmt: on


@pytest.mark.parametrize(("conclusion", "answer", "options", "right"), CASES)
def test_decided_by_hand(conclusion, answer, options, right):
    assert matches(conclusion, answer, options) is right


@pytest.mark.parametrize("pair", ["()", "{}", "[]", r"\boxed{ }", r"\frac{ }", "$ $"])
def test_deep_nesting_is_wrong_in_linear_time(pair):
    opening, closing = pair.split() if " " in pair else pair

    def work(depth):
        text = opening * depth + "3" + closing * depth
        for conclusion in (text, opening * depth, closing * depth, text[:-1] + ", 4"):
            # The innermost of boxes inside boxes counts, so that 3 is right there.
            assert not matches(conclusion, "3" if pair != r"\boxed{ }" else "4")
            assert not matches(conclusion, "(1, 2)") and not matches(conclusion, "B", ("red", "blue"))

    work(100)
    assert takes_linear_time(work, 25_000, 100_000)


@pytest.mark.parametrize(
    ("conclusion", "answer", "right"),
    [
        ("B", "B", True), (" B\n", "B", True), ("B", " B ", True), ("(1, 2)", "(1, 2)", True), ("B*", "B*", True),
        ("b", "B", False), ("B.", "B", False), ("(B)", "B", False), ("3.0", "3", False), ("A or B", "A", False),
        ("BB", "B+", False), ("B", ".", False), ("", "", False), (" ", "", False), ("\n", " ", False),
    ],
)  # fmt: skip
def test_bare_is_letter_by_letter(conclusion, answer, right):
    assert exact_matches(conclusion, answer) is right
