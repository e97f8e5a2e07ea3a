"""What a source of questions after a countdown holds; nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

MOST = 80  # numbers of a countdown; they have two digits


@dataclasses.dataclass(frozen=True)
class CountingOptions:
    """What a source of these questions holds.

    Attributes:
      low, high: numbers of a countdown, drawn evenly; 0 is a question without one. A number has 3 tokens in the
        embedded tokenizer.
      asks: whether anything is asked about the image; if not, the answer is the last number, and nothing reflects.

    Raises:
      ValueError: numbers out of range.
    """

    low: int = 0
    high: int = 10
    asks: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 <= self.low <= self.high <= MOST:
            raise ValueError(f"numbers={self.low}-{self.high}: expected LOW-HIGH, from 0 to {MOST}")
        if not self.asks and not self.low:
            raise ValueError(f"asks=no, numbers={self.low}-{self.high}: expected numbers=LOW-HIGH with LOW from 1")

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> CountingOptions:
        """From the keys of a source's name, `numbers=LOW-HIGH` or `numbers=N`, and `asks=no`.

        Raises:
          ValueError: an unknown key or value; the message names it.
        """
        for key, value in keys.items():
            if not re.fullmatch({"numbers": r"\d+(-\d+)?", "asks": "yes|no"}.get(key, "$^"), value):
                raise ValueError(f"{key}={value}: expected numbers=LOW-HIGH or asks=no")
        low, _, high = keys.get("numbers", f"{cls.low}-{cls.high}").partition("-")
        return cls(int(low), int(high or low), keys.get("asks") != "no")
