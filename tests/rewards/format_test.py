"""Oracle: cases decided by hand from the paper's format; `tests/text/sections_test.py` has the full list."""

import pytest

from qwenla_jax.rewards import format_reward

RIGHT = "<SUMMARY>s</SUMMARY>\n<CAPTION>c</CAPTION>\n<REASONING>r</REASONING>\n<CONCLUSION>3</CONCLUSION>"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (RIGHT, 1.0),
        (RIGHT + "<REFLECTION></REFLECTION>", 1.0),
        (RIGHT.replace("<CONCLUSION>", "<REFLECTION>look</REFLECTION><CONCLUSION>"), 1.0),
        (RIGHT + RIGHT, 0.0),
        (RIGHT + "3", 0.0),
        (RIGHT[:-1], 0.0),
        (RIGHT.replace("CAPTION", "Caption"), 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(response, expected):
    reward = format_reward(response)
    assert reward == expected and isinstance(reward, float)
