"""Oracle: sums worked out by hand."""

import dataclasses
import math

import pytest
from rewards.records import record

from qwenla_jax.config.schema import leaves
from qwenla_jax.rewards import RewardSettings, score
from qwenla_jax.rewards.built_in import BUILT_IN, BuiltInOptions

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
    response, form, accuracy, balance, total, count, tokens = CASES[name]
    scores = score(record(response), SETTINGS)
    assert (scores.format, scores.accuracy, scores.overlong) == (form, accuracy, 0.0)
    assert (scores.balance, scores.total) == pytest.approx((balance, total), abs=1e-12)
    assert (scores.num_reflections, scores.reflection_tokens, scores.extra) == (count, tokens, {})


def test_defaults_are_the_papers():
    settings = RewardSettings()
    defaults = {
        "format": 1.0, "accuracy": 1.0, "balance": 1.0, "target_length": 100.0, "balance_floor": None,
        "balance_only_if_correct": False, "overlong": 0.0, "overlong_buffer": 0, "max_tokens": 0, "extra": (),
        "match": "normalized", "math": False,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in defaults} == defaults
    # What the paper does not have has no weight.
    assert settings.weights() == dict.fromkeys(BUILT_IN, 0.0) | {"format": 1.0, "accuracy": 1.0, "balance": 1.0}
    scores = score(record(HEAD + reflection(100) + THREE), settings)
    assert (scores.format, scores.accuracy, scores.balance, scores.overlong, scores.total) == (1.0, 1.0, 1.0, 0.0, 3.0)
    assert (scores.num_reflections, scores.reflection_tokens, scores.extra) == (1, 100, {})


def test_built_in_rewards_are_listed_in_the_order_of_the_sum():
    assert list(BUILT_IN)[:4] == ["format", "accuracy", "balance", "overlong"]  # sums of floats depend on it
    assert list(score(record(THREE), SETTINGS).components) == list(SETTINGS.weights()) == list(BUILT_IN)


def test_built_in_rewards_have_a_weight_and_keys_of_their_own():
    own = {
        name: [key for key in reward.options.__annotations__ if key in vars(reward.options)]
        for name, reward in BUILT_IN.items()
    }
    assert all(name in keys for name, keys in own.items()), own
    others = {"max_tokens", "extra", "pool", "total", "num_reflections", "reflection_tokens", "components"}
    assert not others & set(sum(own.values(), []))
    assert sorted(sum(own.values(), [])) == sorted(leaf.key for leaf in leaves(BuiltInOptions))


def test_values_take_the_types_of_their_options():
    settings = RewardSettings(target_length=10, balance_floor=-math.inf)
    assert type(settings.target_length) is float and settings.balance_floor is None
    assert settings == RewardSettings(target_length=10.0)


def test_weights():
    settings = RewardSettings(format=0.5, accuracy=2.0, balance=0.25, target_length=10.0)
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
    settings = RewardSettings(overlong=0.5, overlong_buffer=4, max_tokens=10)
    scores = score(record(THREE, num_tokens=9), settings)
    assert scores.overlong == -0.75
    assert scores.total == 1.0 - 0.375


def test_users_rewards(users_module):
    users_module("first", "def size(r): return len(r.response)\ndef format(r): return True\ndef kind(r): return 0.5")
    users_module("second", "import numpy\ndef size(r): return numpy.array(2)")
    extra = (("first:size", 0.5), ("second:size", 1.0), ("first:format", 0.25), ("first:kind", 0.0))
    settings = RewardSettings(format=0.0, accuracy=2.0, balance=0.0, extra=extra)
    names = {"first:size": 0.5, "second:size": 1.0, "first:format": 0.25, "kind": 0.0}
    assert settings.weights() == dict.fromkeys(BUILT_IN, 0.0) | {"accuracy": 2.0} | names
    scores = score(record(THREE), settings)
    assert scores.extra == {"first:size": 26.0, "second:size": 2.0, "first:format": 1.0, "kind": 0.5}
    rules = {"format": 0.0, "accuracy": 1.0, "balance": 0.0, "overlong": 0.0}
    assert scores.components.items() >= (rules | scores.extra).items()
    assert scores.total == 2.0 + 13.0 + 2.0 + 0.25


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("format", -1.0),
        ("accuracy", float("nan")),
        ("balance", float("inf")),
        ("target_length", 0.0),
        ("balance_floor", 2.0),
        ("match", "regex"),
        ("math", "yes"),
        ("overlong", -1.0),
        ("overlong", 1.0),
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
