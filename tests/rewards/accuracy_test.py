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
