"""Oracle: sums worked out by hand; a token is a word here."""

import dataclasses

import pytest

from qwenla_jax.rewards import RewardScores, RewardSettings, score

HEAD = "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>"
THREE = "<CONCLUSION>3</CONCLUSION>"


def words(text: str) -> int:
    return len(text.split())


def reflection(length: int) -> str:
    return f"<REFLECTION>{'look ' * length}</REFLECTION>"


SETTINGS = RewardSettings(target_length=10.0)

# name: response, format, accuracy, balance, total, N_r, L_r; the right answer is 3 and lambda is 10
CASES = {
    "all_right": (HEAD + reflection(10) + THREE, 1.0, 1.0, 1.0, 3.0, 1, 10),
    "short_reflection": (HEAD + reflection(4) + THREE, 1.0, 1.0, 0.4, 2.4, 1, 4),
    "long_reflection": (HEAD + reflection(35) + THREE, 1.0, 1.0, -1.5, 0.5, 1, 35),
    "two_reflections": (HEAD + reflection(0) + reflection(10) + THREE, 1.0, 1.0, 0.5, 2.5, 2, 10),
    "no_reflection": (HEAD + THREE, 1.0, 1.0, 0.0, 2.0, 0, 0),
    "wrong_answer": (HEAD + reflection(5) + "<CONCLUSION>4</CONCLUSION>", 1.0, 0.0, 0.5, 1.5, 1, 5),
    "wrong_format": (HEAD + "so " + reflection(5) + THREE, 0.0, 1.0, 0.5, 1.5, 1, 5),
    "nested": (f"<REASONING>r {reflection(10)}</REASONING>" + THREE, 0.0, 1.0, 1.0, 2.0, 1, 10),
    "cut_off": (HEAD + reflection(5) + "<REFLECTION>look look", 0.0, 0.0, 0.5, 0.5, 1, 5),
    "nothing": ("", 0.0, 0.0, 0.0, 0.0, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_sum_by_hand(name):
    response, *expected = CASES[name]
    assert dataclasses.astuple(score(response, "3", SETTINGS, words)) == pytest.approx(tuple(expected), abs=1e-12)


def test_defaults_are_the_papers():
    settings = RewardSettings()
    assert dataclasses.astuple(settings) == (1.0, 1.0, 1.0, 100.0, None, False)
    assert score(HEAD + reflection(100) + THREE, "3", settings, words) == RewardScores(1.0, 1.0, 1.0, 3.0, 1, 100)


def test_weights():
    settings = RewardSettings(format_weight=0.5, accuracy_weight=2.0, balance_weight=0.25, target_length=10.0)
    scores = score(HEAD + reflection(4) + THREE, "3", settings, words)
    assert scores.total == pytest.approx(0.5 + 2.0 + 0.25 * 0.4)
    assert (scores.format, scores.accuracy, scores.balance) == pytest.approx((1.0, 1.0, 0.4))


def test_floor():
    settings = dataclasses.replace(SETTINGS, balance_floor=-0.5)
    assert score(HEAD + reflection(35) + THREE, "3", settings, words).total == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("answer", "length", "balance"), [("3", 5, 0.5), ("4", 5, 0.0), ("4", 35, 0.0), ("3", 35, -1.5)]
)
def test_balance_only_if_correct(answer, length, balance):
    settings = dataclasses.replace(SETTINGS, balance_only_if_correct=True)
    scores = score(HEAD + reflection(length) + THREE, answer, settings, words)
    assert scores.balance == pytest.approx(balance)
    assert scores.total == pytest.approx(1.0 + (answer == "3") + balance)
    assert scores.reflection_tokens == length


def test_counts_the_text_as_it_stands():
    seen = []
    score("<REFLECTION> a\n</REFLECTION><REFLECTION></REFLECTION>", "3", SETTINGS, lambda text: seen.append(text) or 1)
    assert seen == [" a\n", ""]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("format_weight", -1.0),
        ("accuracy_weight", float("nan")),
        ("balance_weight", float("inf")),
        ("target_length", 0.0),
        ("balance_floor", 2.0),
    ],
)
def test_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        RewardSettings(**{setting: value})
