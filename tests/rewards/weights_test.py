"""Oracle: sums worked out by hand."""

import dataclasses

import pytest
from rewards.records import record

from qwenla_jax.rewards import RewardScores, RewardSettings, score

HEAD = "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>"
THREE = "<CONCLUSION>3</CONCLUSION>"


def reflection(length: int) -> str:
    return f"<REFLECTION>{'reattention ' * length}</REFLECTION>"


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
    response, form, accuracy, balance, *rest = CASES[name]
    expected = RewardScores(form, accuracy, pytest.approx(balance, abs=1e-12), 0.0, *rest)
    assert dataclasses.replace(score(record(response), SETTINGS), total=expected.total) == expected
    assert score(record(response), SETTINGS).total == pytest.approx(expected.total, abs=1e-12)


def test_defaults_are_the_papers():
    settings = RewardSettings()
    assert dataclasses.astuple(settings) == (1.0, 1.0, 1.0, 100.0, None, False, 0.0, 0, 0, (), "normalized", False)
    assert settings.weights() == {"format": 1.0, "accuracy": 1.0, "balance": 1.0, "overlong": 0.0}
    assert score(record(HEAD + reflection(100) + THREE), settings) == RewardScores(1.0, 1.0, 1.0, 0.0, 3.0, 1, 100, {})


def test_weights():
    settings = RewardSettings(format_weight=0.5, accuracy_weight=2.0, balance_weight=0.25, target_length=10.0)
    scores = score(record(HEAD + reflection(4) + THREE), settings)
    assert scores.total == pytest.approx(0.5 + 2.0 + 0.25 * 0.4)
    assert (scores.format, scores.accuracy, scores.balance) == pytest.approx((1.0, 1.0, 0.4))


def test_floor():
    settings = dataclasses.replace(SETTINGS, balance_floor=-0.5)
    assert score(record(HEAD + reflection(35) + THREE), settings).total == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("answer", "length", "balance"), [("3", 5, 0.5), ("4", 5, 0.0), ("4", 35, 0.0), ("3", 35, -1.5)]
)
def test_balance_only_if_correct(answer, length, balance):
    settings = dataclasses.replace(SETTINGS, balance_only_if_correct=True)
    scores = score(record(HEAD + reflection(length) + THREE, answer), settings)
    assert scores.balance == pytest.approx(balance)
    assert scores.total == pytest.approx(1.0 + (answer == "3") + balance)
    assert scores.reflection_tokens == length


def test_match_reaches_accuracy_and_balance():
    settings = dataclasses.replace(SETTINGS, balance_only_if_correct=True)
    right = record(HEAD + reflection(5) + "<CONCLUSION>blue</CONCLUSION>", "B", options=("red", "blue"))
    assert [score(right, settings).accuracy, score(right, settings).balance] == [1.0, 0.5]
    exact = dataclasses.replace(settings, match="exact")
    assert [score(right, exact).accuracy, score(right, exact).balance] == [0.0, 0.0]


def test_math_reaches_accuracy_and_balance():
    pytest.importorskip("math_verify")
    settings = dataclasses.replace(SETTINGS, balance_only_if_correct=True, math=True)
    scores = score(record(HEAD + reflection(5) + r"<CONCLUSION>\sqrt{12}</CONCLUSION>", r"2\sqrt{3}"), settings)
    assert [scores.accuracy, scores.balance] == [1.0, 0.5]


def test_overlong():
    settings = RewardSettings(overlong_weight=0.5, overlong_buffer=4, max_tokens=10)
    scores = score(record(THREE, num_tokens=9), settings)
    assert scores.overlong == -0.75
    assert scores.total == 1.0 - 0.375


def test_users_rewards(users_module):
    users_module("first", "def size(r): return len(r.response)\ndef format(r): return True\ndef kind(r): return 0.5")
    users_module("second", "import numpy\ndef size(r): return numpy.array(2)")
    extra = (("first:size", 0.5), ("second:size", 1.0), ("first:format", 0.25), ("first:kind", 0.0))
    settings = RewardSettings(0.0, 2.0, 0.0, extra=extra)
    names = {"first:size": 0.5, "second:size": 1.0, "first:format": 0.25, "kind": 0.0}
    assert settings.weights() == {"format": 0.0, "accuracy": 2.0, "balance": 0.0, "overlong": 0.0} | names
    scores = score(record(THREE), settings)
    assert scores.extra == {"first:size": 26.0, "second:size": 2.0, "first:format": 1.0, "kind": 0.5}
    assert scores.components == {"format": 0.0, "accuracy": 1.0, "balance": 0.0, "overlong": 0.0} | scores.extra
    assert scores.total == 2.0 + 13.0 + 2.0 + 0.25


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("format_weight", -1.0),
        ("accuracy_weight", float("nan")),
        ("balance_weight", float("inf")),
        ("target_length", 0.0),
        ("balance_floor", 2.0),
        ("match", "regex"),
        ("math", "yes"),
        ("overlong_weight", -1.0),
        ("overlong_weight", 1.0),
        ("overlong_buffer", 1),
        ("max_tokens", -1),
        ("extra", (("first:size",),)),
        ("extra", (("first:size", -1.0),)),
        ("extra", (("first.size", 1.0),)),
        ("twice", (("first:size", 1.0), ("first:size", 2.0))),
        ("__main__", (("__main__:size", 1.0),)),
    ],
)
def test_refused(setting, value):
    with pytest.raises(ValueError, match=setting if setting != "extra" else r"extra|want module:function"):
        RewardSettings(**{"extra" if isinstance(value, tuple) else setting: value})
