"""Leaving records of a corpus out, with a count for every reason, by what its text tells: no picture is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from qwenla_jax.data.datasets.raw_record import Corpus, Entry
from qwenla_jax.data.record import Record

Filter = Callable[[Entry], str | None]  # why an entry is left out, or None


def no_picture(entry: Entry) -> str | None:
    """Leaves out what has no picture."""
    return None if entry.pictures else "no_picture"


def several_pictures(entry: Entry) -> str | None:
    """Leaves out what has more than one picture."""
    return "several_pictures" if len(entry.pictures) > 1 else None


def many_options(most: int) -> Filter:
    """Leaves out what has more options than that."""

    def keep(entry: Entry) -> str | None:
        return "many_options" if len(entry.options) > most else None

    return keep


def other_kinds(kinds: Iterable[str]) -> Filter:
    """Leaves out every kind but these."""
    wanted = frozenset(kinds)

    def keep(entry: Entry) -> str | None:
        return None if entry.kind in wanted else "other_kind"

    return keep


class Filtered:
    """A corpus without the entries that a filter leaves out.

    Entries that cannot be read are not filtered, since their fields mean nothing: they stay, to be refused by name or
    skipped and counted.

    Args:
      corpus: the corpus.
      filters: asked in order; the first reason counts.
      size: only the first so many of what is left.

    Attributes:
      left_out: entries left out, by reason.

    Raises:
      ValueError: nothing is left.
    """

    def __init__(self, corpus: Corpus, filters: Iterable[Filter], size: int | None = None) -> None:
        self._corpus = corpus
        self.name = corpus.name
        self.left_out: Counter[str] = Counter()
        filters, kept = tuple(filters), []
        for index in range(len(corpus)):
            entry = corpus.entry(index)
            reasons = (each(entry) for each in filters) if entry.fault is None else ()
            reason = next((each for each in reasons if each is not None), None)
            if reason is None:
                kept.append(index)
            else:
                self.left_out[reason] += 1
        self._kept = tuple(kept[:size])
        if not self._kept:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))
            raise ValueError(f"{corpus.name}: the filters leave nothing of its {len(corpus)} records ({counts})")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        """The record, as in `Corpus`."""
        return self._corpus[self._kept[index]]

    def entry(self, index: int) -> Entry:
        """The row, as in `Corpus`."""
        return self._corpus.entry(self._kept[index])
