"""Users' own rewards: functions named as `module:function`."""

import inspect
import numbers
import pkgutil
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from qwenla_jax.rewards.built_in import BUILT_IN
from qwenla_jax.rewards.reward_record import RewardRecord

Reward = Callable[[RewardRecord], Any]

_SPEC = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")
_MAX_MESSAGE = 300
_MAX_TRACEBACK = 4000
_MAX_FRAMES = 12


def names_of(specs: Sequence[str]) -> tuple[str, ...]:
    """The name of each reward's component: its function's, or `module:function` where that name is taken.

    Args:
      specs: texts `module:function`.

    Raises:
      ValueError: a text is no `module:function`, or is given twice.
    """
    for spec in specs:
        if not isinstance(spec, str) or not _SPEC.fullmatch(spec):
            raise ValueError(f"reward {spec!r}: want module:function, such as my_rewards:shortness")
        if specs.count(spec) > 1:
            raise ValueError(f"reward {spec!r} stands twice; want it once, with the sum of its weights")
        if spec.startswith("__main__:"):
            raise ValueError(f"reward {spec!r}: want a module of its own; a worker process cannot import __main__")
    functions = [spec.rpartition(":")[2] for spec in specs]
    taken = [*functions, *BUILT_IN, "total"]
    return tuple(spec if taken.count(name) > 1 else name for spec, name in zip(specs, functions, strict=True))


def load_reward(spec: str) -> Reward:
    """Imports a reward.

    Args:
      spec: `module:function`; the module is imported as in this process.

    Raises:
      ValueError: the module cannot be imported, has no such function, or the function cannot be called with one record.
    """
    names_of([spec])
    module_name, _, name = spec.partition(":")
    try:
        module = pkgutil.resolve_name(f"{module_name}:")
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward {spec!r}: importing {module_name} failed with {describe(error)}; want a module that can be "
            "imported from the working directory or PYTHONPATH"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"reward {spec!r}: {module_name} has no {name}; want a function {name}(record) in it")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"reward {spec!r} is a {type(function).__name__}; want a function {name}(record)")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {spec!r} is a coroutine; want a plain function {name}(record)")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return function  # written in C without a signature: nothing to check
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(f"reward {spec!r}: {name}{signature} is called with one record, but {error}") from error
    return function


def as_number(value: Any) -> float:
    """What a reward returned, as a float.

    Any finite real number will do: int, float, bool, Fraction, a NumPy scalar, an array without axes.

    Raises:
      ValueError: anything else, such as nan, None, text or an array with axes.
    """
    shape = getattr(value, "shape", None)
    if shape == ():
        value = value.item()
    if not isinstance(value, numbers.Real):
        of = f" of shape {tuple(shape)}" if shape else ""
        raise ValueError(f"returned {type(value).__name__}{of}; want a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not abs(number) < float("inf"):
        raise ValueError(f"returned {number}; want a finite number")
    return number


def describe(error: BaseException) -> str:
    """Type and text of an exception, cut to 300 characters."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text[:_MAX_MESSAGE]}"[:_MAX_MESSAGE] if text else type(error).__name__


def traceback_of(error: BaseException) -> str:
    """The traceback of an exception that a reward raised, without the frames of this package; at most 4,000 characters.

    A long one is cut at its start: its end has the exception and where it was raised.
    """
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(__package__):
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace, limit=-_MAX_FRAMES)
    except Exception:
        return ""  # its text cannot be read, or memory is short
    return "".join(line[-_MAX_TRACEBACK:] for line in lines)[-_MAX_TRACEBACK:]
