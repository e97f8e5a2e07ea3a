"""Typed values out of an object of a JSON file that others wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 200  # characters of a wrong value that an error repeats


class Section:
    """One object of a JSON file; every error names the file, the key, the value and what it must be.

    Attributes:
      content: the object.
      where: the file.
      prefix: what stands before the object's keys in errors, as "vision_config.".
      defaults: values of keys that the object lacks.
    """

    def __init__(
        self, content: Mapping[str, Any], where: str, prefix: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Holds an object; see the attributes."""
        self.content, self.where, self.prefix, self.defaults = content, where, prefix, defaults or {}

    def fail(self, name: str, problem: str) -> ValueError:
        """An error that names the key."""
        return ValueError(f"{self.where}: {self.prefix}{name} {problem}")

    def wrong(self, name: str, value: Any, wanted: str) -> ValueError:
        """An error that names the key and its value, and says what that must be."""
        text = repr(value)
        return self.fail(name, f"is {text if len(text) < _SHOWN else text[:_SHOWN] + '...'}; it must be {wanted}")

    def get(self, name: str) -> Any:
        """The value as it is; the default, or None, where the object lacks the key."""
        return self.content[name] if name in self.content else self.defaults.get(name)

    def section(self, name: str, defaults: Mapping[str, Any] | None = None) -> Section:
        """The object under a key, an empty one where that is null or absent. Raises ValueError at anything else."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return Section(value or {}, self.where, f"{self.prefix}{name}.", defaults)

    def whole(self, name: str) -> int:
        """A whole number; also one that is repeated in a list, as [14, 14]. Raises ValueError at anything else."""
        value = self.get(name)
        each: Sequence[Any] = value if isinstance(value, list | tuple) and value else [value]
        if any(type(number) is not int or number != each[0] for number in each):
            raise self.wrong(name, value, "a whole number")
        return each[0]

    def number(self, name: str) -> float:
        """A finite number. Raises ValueError at anything else."""
        value = self.get(name)
        # Python's JSON knows NaN, Infinity, and whole numbers that are too large for a float.
        if type(value) not in (int, float) or not (abs(value) < 1e300 and math.isfinite(value)):
            raise self.wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Whether a key is true; null is false. Raises ValueError at anything else."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers. Raises ValueError at anything else."""
        value = self.get(name)
        if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
            raise self.wrong(name, value, "a list of whole numbers")
        return tuple(value)


def plain_name(value: Any, suffix: str, where: str | os.PathLike[str]) -> str:
    """A file name out of the file `where`: of no other folder, so that it cannot lead out of the one it is in.

    Raises:
      ValueError: it is none, or does not end in `suffix`.
    """
    plain = isinstance(value, str) and value.isprintable() and len(value) <= _SHOWN and value.endswith(suffix)
    if not plain or value.startswith(".") or "/" in value or "\\" in value:
        raise ValueError(f"{where}: {repr(value)[:_SHOWN]} is no file name; expected a plain one that ends in {suffix}")
    return value
