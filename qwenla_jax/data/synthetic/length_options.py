"""What a source of questions with reasoning of a chosen length holds; nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

LENGTH_SCENES = "length_scenes"  # the name of such sources
WORKINGS, ORDERS = ("chain", "filler"), ("after", "paper")
SHORT_TOKENS, LONG_TOKENS = (11, 32), (11, 330)  # lowest and highest length that trainings use
STEP_TOKENS, LAST_TOKENS = 7, 4  # of a step of a reasoning, and of what ends it
FEWEST, MOST = 1, 80  # steps; the numbers counted down have two digits


@dataclasses.dataclass(frozen=True)
class LengthOptions:
    """What a source of these questions holds; each question is drawn evenly among what is allowed.

    Attributes:
      low, high: tokens of the reasoning, in the embedded tokenizer; `steps_of` rounds them to steps.
      workings: out of WORKINGS.
      orders: out of ORDERS. "after": summary, reasoning, reflection, caption with marks, conclusion, so that all that
        is seen is told after the reflection. "paper": summary, caption without marks, reasoning, reflection with the
        marks, conclusion.
      words: whether reflections have words; without, they are empty, and in order "paper" no mark is told.
      cut: whether the response breaks off behind its reasoning, so that only its working is learned.
      told: whether the question tells in words a scene that is not the image's, and asks about that one.

    Raises:
      ValueError: a value that is none of these.
    """

    low: int = 16
    high: int = 16
    workings: tuple[str, ...] = ("chain",)
    orders: tuple[str, ...] = ("after",)
    words: bool = True
    told: bool = False
    cut: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        if not FEWEST <= steps_of(self.low) <= steps_of(self.high) <= MOST:
            most = MOST * STEP_TOKENS + LAST_TOKENS
            raise ValueError(f"tokens={self.low}-{self.high}: expected LOW-HIGH, from {STEP_TOKENS} to {most}")
        for name, known in (("workings", WORKINGS), ("orders", ORDERS)):
            if not set(getattr(self, name)) <= set(known) or not getattr(self, name):
                raise ValueError(
                    f"{name.removesuffix('s')}={'|'.join(getattr(self, name))}: expected {'|'.join(known)}"
                )

    @classmethod
    def of(cls, keys: Mapping[str, str]) -> LengthOptions:
        """From the keys of a source's name, such as `tokens=16-32`, `working=chain|filler`, `order=paper`, `words=no`,
        `told=yes`, `cut=yes`.

        Raises:
          ValueError: an unknown key or value; the message names it.
        """
        fields: dict[str, object] = {}
        for key, value in keys.items():
            if key == "tokens" and all(part.isdigit() for part in value.split("-", 1)):
                fields["low"], fields["high"] = int(value.split("-")[0]), int(value.split("-")[-1])
            elif key in ("working", "order"):
                fields[f"{key}s"] = tuple(value.split("|"))
            elif key in ("words", "told", "cut") and value in ("yes", "no"):
                fields[key] = value == "yes"
            else:
                raise ValueError(
                    f"{key}={value}: expected tokens=LOW-HIGH, working={'|'.join(WORKINGS)}, "
                    f"order={'|'.join(ORDERS)}, words=yes, told=yes or cut=yes"
                )
        return cls(**fields)  # pyright: ignore[reportArgumentType]

    def setting(self) -> str:
        """The setting that names such a source, see `data.sources.spec`; keys with their defaults are left out."""

        def values(one: LengthOptions) -> dict[str, str]:
            marks = {name: "yes" if getattr(one, name) else "no" for name in ("words", "told", "cut")}
            return {"working": "|".join(one.workings), "order": "|".join(one.orders), **marks}

        usual = values(LengthOptions())
        keys = [f"{key}={value}" for key, value in values(self).items() if value != usual[key]]
        return f"{LENGTH_SCENES}#{'&'.join([f'tokens={self.low}-{self.high}', *keys])}"


def steps_of(tokens: int) -> int:
    """Steps of a reasoning of about so many tokens."""
    return round((tokens - LAST_TOKENS) / STEP_TOKENS)
