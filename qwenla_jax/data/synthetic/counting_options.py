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
      asks: "scene": any question of `scene_questions`; "total": how many objects there are, which the caption says, so
        that the image is not read after the countdown; nothing reflects there.
      reflect: share of the responses that hold a reflection.

    Raises:
      ValueError: a value out of range.
    """

    low: int = 0
    high: int = 10
    asks: str = "scene"
    reflect: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 <= self.low <= self.high <= MOST:
            raise ValueError(f"numbers={self.low}-{self.high}: expected LOW-HIGH, from 0 to {MOST}")

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> CountingOptions:
        """From the keys of a source's name, `numbers=LOW-HIGH` or `numbers=N`, `asks=total`, `reflect=SHARE`.

        Raises:
          ValueError: an unknown key or value; the message names it.
        """
        forms = {"numbers": r"\d+(-\d+)?", "asks": "scene|total", "reflect": r"0?\.\d+|[01]"}
        for key, value in keys.items():
            if key not in forms or not re.fullmatch(forms[key], value):
                raise ValueError(f"{key}={value}: expected numbers=LOW-HIGH, asks=total or reflect=SHARE")
        low, _, high = keys.get("numbers", f"{cls.low}-{cls.high}").partition("-")
        return cls(int(low), int(high or low), keys.get("asks", cls.asks), float(keys.get("reflect", cls.reflect)))
