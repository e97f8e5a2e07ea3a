"""Oracle: decided by hand which functions are rewards and which values are numbers."""

import datetime
import decimal
import fractions
import re

import jax.numpy as jnp
import numpy as np
import pytest

from qwenla_jax.rewards.pool.plugins import as_number, describe, load_reward, names_of

SOURCE = """
import functools
def one(record): return 1
def many(record, *rest, factor=2): return 1
def none(): return 1
def two(a, b): return 1
async def later(record): return 1
class Method:
    def __call__(self, record): return 2
method = Method()
part = functools.partial(two, b=1)
number = 3
"""


@pytest.mark.parametrize("name", ["one", "many", "method", "part"])
def test_loads(users_module, name):
    users_module("users", SOURCE)
    assert load_reward(f"users:{name}")(None) in (1, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("users:none", "none"),
        ("users:two", "'b'"),
        ("users:later", "coroutine"),
        ("users:number", "int; want a function number"),
        ("users:absent", "users has no absent"),
        ("nowhere:one", "No module named 'nowhere'"),
        ("invalid:one", "ZeroDivisionError"),
        ("leaving:one", "SystemExit"),
        ("users.one", "want module:function"),
        ("users:", "want module:function"),
        ("", "want module:function"),
        ("../users:one", "want module:function"),
        (3, "want module:function"),
        ("__main__:one", "__main__"),
    ],
)
def test_refused(users_module, spec, message):
    users_module("users", SOURCE)
    users_module("invalid", "1 / 0")
    users_module("leaving", "raise SystemExit(3)")
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(spec)
    assert repr(spec) in str(caught.value)


def test_names():
    assert names_of(["a:x", "b.c:y"]) == ("x", "y")
    assert names_of(["a:x", "b:x", "b:total", "b:balance", "b:y"]) == ("a:x", "b:x", "b:total", "b:balance", "y")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        (True, 1.0),
        (fractions.Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (jnp.float32(1.5), 1.5),
        (jnp.zeros((), jnp.bfloat16), 0.0),
    ],
)
def test_numbers(value, expected):
    number = as_number(value)
    assert number == expected and type(number) is float


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        b"1",
        "x",
        [1],
        (1,),
        {},
        1j,
        float("nan"),
        float("inf"),
        -float("inf"),
        10**400,
        np.array([1.0]),
        np.array([1, 2]),
        np.zeros((1, 1)),
        np.float32("nan"),
        np.array("1"),
        np.array(1j),
        np.datetime64("2025-01-01"),
        datetime.timedelta(1),
        object(),
        int,
        decimal.Decimal("nan"),
    ],
    ids=lambda value: re.sub(" at 0x.*>", ">", repr(value)),  # the same in every process
)
def test_no_numbers(value):
    with pytest.raises(ValueError, match="want (a|one) finite number"):
        as_number(value)


def test_description_is_short():
    assert describe(KeyError("a")) == "KeyError: 'a'"
    assert describe(ValueError()) == "ValueError"
    assert len(describe(ValueError("x" * 10**6))) == 300

    class Silent(Exception):
        def __str__(self):
            raise RuntimeError

    assert describe(Silent()) == "Silent: (its text cannot be read)"
