"""Oracle: cases decided by hand; `tests/text/answers_test.py` compares the matching with an official scorer."""

import pytest

from qwenla_jax.rewards import accuracy_reward


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("<CONCLUSION>3</CONCLUSION>", "3", 1.0),
        ("<CONCLUSION> (B). </CONCLUSION>", "B", 1.0),
        ("<REASONING>4</REASONING><CONCLUSION>three</CONCLUSION>", "3", 1.0),
        ("<CONCLUSION>4</CONCLUSION><CONCLUSION>3</CONCLUSION>", "3", 1.0),
        ("<CONCLUSION>3</CONCLUSION><CONCLUSION>4</CONCLUSION>", "3", 0.0),
        ("<REASONING>3</REASONING><CONCLUSION>4</CONCLUSION>", "3", 0.0),
        ("<CONCLUSION>3 or 4</CONCLUSION>", "3", 0.0),
        ("<CONCLUSION></CONCLUSION>", "3", 0.0),
        ("<CONCLUSION>3", "3", 0.0),
        ("3", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_accuracy_reward(response, answer, expected):
    reward = accuracy_reward(response, answer)
    assert reward == expected and isinstance(reward, float)


@pytest.mark.parametrize(
    ("conclusion", "answer", "options", "usual", "exact"),
    [
        ("3", "3", (), 1.0, 1.0),
        (" 3 ", "3", (), 1.0, 1.0),
        ("3.0", "3", (), 1.0, 0.0),
        ("b", "B", (), 1.0, 0.0),
        ("red", "B", ("blue", "red"), 1.0, 0.0),
        ("blue", "B", ("blue", "red"), 0.0, 0.0),
        ("3 or 4", "3", (), 0.0, 0.0),
        (r"\sqrt{12}", r"2\sqrt{3}", (), 0.0, 0.0),
        ("", "", (), 0.0, 0.0),
    ],
)
def test_ways_to_match(conclusion, answer, options, usual, exact):
    response = f"<CONCLUSION>{conclusion}</CONCLUSION>"
    assert accuracy_reward(response, answer, options) == usual
    assert accuracy_reward(response, answer, options, match="exact") == exact
    assert accuracy_reward(conclusion, answer, options, match="exact") == 0.0


def test_math():
    pytest.importorskip("math_verify")
    response = r"<CONCLUSION>\boxed{\sqrt{12}}</CONCLUSION>"
    assert accuracy_reward(response, r"2\sqrt{3}", math=True) == 1.0
    assert accuracy_reward(response, "B", ("1", r"2\sqrt{3}"), math=True) == 1.0
    assert accuracy_reward(response, r"2\sqrt{5}", math=True) == 0.0
    assert accuracy_reward("", "3", math=True) == 0.0


@pytest.mark.parametrize("ways", [{"match": "fuzzy"}, {"math": 1}, {"match": "exact", "math": True}])
def test_refused(ways):
    with pytest.raises(ValueError, match="match|math"):
        accuracy_reward("<CONCLUSION>3</CONCLUSION>", "3", **ways)
