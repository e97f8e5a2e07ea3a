"""Replaces invalid records of a source by valid ones."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from qwenla_jax.data.batching.loader import Sized

Item = TypeVar("Item")


class TooManyInvalid(ValueError):
    """More records of a source are invalid than are allowed."""


class SkipInvalid(Generic[Item]):
    """A source that replaces an invalid record with the next valid one.

    The record at an index is a function of the index and the data alone, so a resumed run sees the same ones. The
    replacement comes once more than the others in an epoch. Counting starts anew with each object: a resumed run meets
    its invalid records again.

    Args:
      source: the records, or examples of them; it raises ValueError for an invalid one.
      most: so many different records may be invalid.
      note: called with the error of each invalid record when it is met for the first time; in any thread.
      advice: appended to the message of `TooManyInvalid`.

    Raises:
      ValueError: a negative number, or no record.
    """

    def __init__(self, source: Sized, most: int, note: Callable[[str], None] | None = None, advice: str = "") -> None:
        if most < 0:
            raise ValueError(f"most must not be negative, got {most}")
        if len(source) < 1:
            raise ValueError("the source holds no record")
        self._source, self._most = source, most
        self._report, self._advice = note, advice
        self._invalid: dict[int, tuple[str, str]] = {}
        self._lock = threading.Lock()  # a pipeline reads in several threads

    def __len__(self) -> int:
        return len(self._source)

    def skipped(self) -> Counter[str]:
        """Invalid records met so far, by reason, each counted once."""
        with self._lock:
            return Counter(reason for reason, _ in self._invalid.values())

    def __getitem__(self, index: int) -> Item:
        """The record at an index, or the first valid one after it, cyclically; raises as `read`."""
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Item, int]:
        """The record of an index as above, and how many invalid ones were skipped.

        Raises:
          TooManyInvalid: more than `most` different records have turned out invalid; the message counts them by reason
            and shows the first five.
        """
        for step in range(len(self)):
            at = (index + step) % len(self)
            with self._lock:
                if at in self._invalid:
                    continue
            try:
                return self._source[at], step
            except TooManyInvalid:
                raise
            except ValueError as error:
                self._note(at, error)
        raise TooManyInvalid(f"all {len(self)} records are invalid: {self._summary()}")

    def _note(self, at: int, error: ValueError) -> None:
        with self._lock:
            new = at not in self._invalid
            self._invalid[at] = str(getattr(error, "reason", "unusable")), str(error)
            count = len(self._invalid)
        if count > self._most:
            message = f"{count} records are invalid, at most {self._most} may be{self._advice}: {self._summary()}"
            raise TooManyInvalid(message) from error
        if new and self._report is not None:
            self._report(str(error))

    def _summary(self) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.skipped().items()))
        with self._lock:
            first = [message for _, (_, message) in sorted(self._invalid.items())[:5]]
        return "\n".join([counts, *first])
