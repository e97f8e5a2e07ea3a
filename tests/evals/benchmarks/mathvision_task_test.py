r"""MathVision. Oracles: what the official scorer stored for 6,080 real answers (text read, right or wrong); by hand.

The stored verdicts come of latex2sympy2, a library that no longer installs beside today's antlr4. Its successor reads
four more of Qwen-VL-Max's expressions, all rightly: 42% for $42 \%$, 2π, 80-2π, and -2 for $-\!2$.
"""

import json

import pytest

from qwenla_jax.evals.benchmarks.latex_values import same_values
from qwenla_jax.evals.benchmarks.mathvision_task import mathvision_answer
from qwenla_jax.evals.registry import questions_of, score_files
from qwenla_jax.evals.task import Settings

MORE = {"LLaVA-v1.5-7B": set(), "Qwen-VL-Max": {"1324", "1485", "2392", "2454"}}
STORED = {"LLaVA-v1.5-7B": 259, "Qwen-VL-Max": 474}


@pytest.mark.parametrize("model", STORED)
def test_real_outputs(shared_data, model):
    pytest.importorskip("latex2sympy2_extended")
    folder = shared_data / "mathvision" / "outputs"
    stored = {row["id"]: row for row in map(json.loads, (folder / f"{model}.jsonl").read_text().splitlines())}
    result = score_files("mathvision", [folder / f"{model}.jsonl"], [folder / "gold_full_test.jsonl"])
    assert len(result.rows) == 3040 and sum(row["correct"] for row in stored.values()) == STORED[model]
    assert all(row["read"] == stored[row["id"]]["model_answer"] for row in result.rows)
    other = {row["id"] for row in result.rows if row["right"] != stored[row["id"]]["correct"]}
    assert other == MORE[model]
    assert result.counts["right"] == STORED[model] + len(MORE[model]) and result.counts["values_given_up"] == 0


def test_without_algebra_fewer_are_right(shared_data):
    folder = shared_data / "mathvision" / "outputs"
    paths = [folder / "Qwen-VL-Max.jsonl"], [folder / "gold_full_test.jsonl"]
    result = score_files("mathvision", *paths, Settings(algebra=False))
    assert result.counts["right"] < 474 and "right_by_value_of_latex" not in result.counts


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("C\nbecause", "c"),
        ("so it is (B).", "b"),
        ("The length is 12.", "12"),
        ("The answer is A. It is big", "a"),
        (r"\boxed{3} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed{60^\circ}$", "60"),
        (r"x = 3 \approx 4", "4"),
        ("0.5", r"\frac{1}{2}"),
        ("3/4", r"\frac{3}{4}"),
        ("03/4", "03/4"),
        (r"\boxed{12 km}", "12"),
        (r"\boxed{\text{B}}", "b"),
        (r"\boxed{.5}", r"\frac{1}{2}"),
        (r"\boxed{2\sqrt3}", r"2\sqrt{3}"),
        ("", ""),
        ("}", ""),
    ],
)
def test_reading_by_hand(text, read):
    assert mathvision_answer(text) == read


def test_values_by_hand():
    pytest.importorskip("latex2sympy2_extended")
    pairs = [
        (r"\frac{1}{55}", r"\frac{1}{60}", True),  # both 0.02
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\frac{1}{2}", "0.6", False),
        ("(1/2,2)", "(0.5,2.0)", True),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("x+1", "1+x", False),  # no numbers
        ("[0,\\infty)", "[0,\\infty)", True),
        (r"\frac{1}{0}", "1", False),
        (r"\sqrt{-1}", "1", False),
        ("9^{9^{9^{9}}}", "1", False),
        ("", "1", False),
    ]
    assert same_values([(got, want) for got, want, _ in pairs]) == [same for _, _, same in pairs]


def test_hanging_values_are_killed_and_counted():
    pytest.importorskip("latex2sympy2_extended")
    # The time of the library's parser doubles with every bracket.
    slow = "(" * 60 + "1" + ")" * 60
    result = same_values([(r"\frac{1}{2}", r"\frac{2}{4}"), (slow, "3"), ("2^{2}", "4")])
    assert (result[0], result[2]) == (True, True) and not result[1]


def test_values_end_where_the_expression_ends():
    r"""Oracle: what latex2sympy2 1.9.1 makes of these texts, which models wrote, and which end behind their box."""
    pytest.importorskip("latex2sympy2_extended")
    read = {
        r"\frac{1}{4}}.theansweris:\frac{1}{4": "0.25",
        r"\frac{55}{4}}squarecm.theansweris:\frac{55}{4": "13.75",
        r"\frac{1}{2}.theansweris\boxed{d": "0.5",
        r"2\sqrt{3}}.so,theansweris\fbox{a": "3.46",
        r"\frac{10}{3}}{0.}\end{aligned": "3.33",
        r"\frac{4}{9}}.\end{align*": "0.44",
        r"\frac{3\pi}{2}}{cm": "4.71",
        r"6\sqrt{3}}\]therefore,theshortestpathis6\sqrt{3": "10.39",
        "5.so,evenwithoutthediagram,wecantell": "5",
        "(1+2))": "3",
        "{4}": "4",
        "3.5": "3.5",
        r"\frac{1.5}{3}": "0.5",
    }
    # An error there, for all that they begin with.
    none = {"16√3": "16", r"13\)": "13", "2squarecm": "2", "10,10,10": "10", r"\frac{1.the}{4}": "0.25", "}": "0"}
    pairs = [*read.items(), *none.items()]
    assert same_values(pairs) == [True] * len(read) + [False] * len(none)


def test_boxes_with_text_behind(tmp_path):
    pytest.importorskip("latex2sympy2_extended")
    said = [
        "So\n$$ A=\\boxed{\\frac{1}{4}}$$.\nThe answer is: \\frac{1}{4}",
        r"\boxed{\frac{1}{4}}\text{ cm}",
        "\\begin{align*}x&=\\boxed{\\frac{1}{4}}.\n\\end{align*}",
        r"\boxed{\frac{1}{3}}\text{ cm}",
    ]
    row = {"question": "q", "options": [], "answer": "0.25"}
    rows = [row | {"id": str(n), "response": text} for n, text in enumerate(said)]
    (tmp_path / "said.json").write_text(json.dumps(rows))
    result = score_files("mathvision", [tmp_path / "said.json"])
    assert [row["right"] for row in result.rows] == [True, True, True, False]


@pytest.mark.parametrize(
    "cell", ["['3','4','5','6','7']", '["3", "4", "5", "6", "7"]', "{'A': '3', 'B': '4', 'C': '5'}"]
)
def test_choices_of_vlmevalkit_are_options(tmp_path, cell):
    lines = ["index\tquestion\tchoices\tanswer\tprediction", f"1\thow many?\t{cell}\tC\t5", "2\thow many?\t[]\t5\t5"]
    path = tmp_path / "model_MathVision.tsv"
    path.write_text("\n".join(lines) + "\n")
    assert score_files("mathvision", [path], settings=Settings(algebra=False)).counts["right"] == 2
    first, second = questions_of("mathvision", [path]).items
    assert first.question.startswith("how many?\n(A) 3\n(B) 4\n(C) 5") and first.options["C"] == "5"
    assert second.question == "how many?" and not second.options


def test_gold_with_a_letter_that_is_no_option(tmp_path):
    row = {"id": "1", "question": "q", "options": ["a", "b"], "answer": "C", "response": "A"}
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps(row))
    counts = score_files("mathvision", [path]).counts
    assert counts["right"] == 0 and counts["whose_right_letter_is_no_option"] == 1
    path.write_text(json.dumps(row | {"answer": "a"}))
    with pytest.raises(ValueError, match="'a'; expected a letter, as A, B"):
        score_files("mathvision", [path])
