"""Leaving records of a dataset out, with a count for every reason, by what its text tells: no image is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from qwenla_jax.data.datasets.raw_record import Dataset, RawRecord
from qwenla_jax.data.record import Record

Filter = Callable[[RawRecord], str | None]  # why an entry is left out, or None


def no_image(raw_record: RawRecord) -> str | None:
    """Leaves out what has no image."""
    return None if raw_record.images else "no_image"


def several_images(raw_record: RawRecord) -> str | None:
    """Leaves out what has more than one image."""
    return "several_images" if len(raw_record.images) > 1 else None


def many_options(most: int) -> Filter:
    """Leaves out what has more options than that."""

    def keep(raw_record: RawRecord) -> str | None:
        return "many_options" if len(raw_record.options) > most else None

    return keep


def other_kinds(kinds: Iterable[str]) -> Filter:
    """Leaves out every kind but these."""
    wanted = frozenset(kinds)

    def keep(raw_record: RawRecord) -> str | None:
        return None if raw_record.kind in wanted else "other_kind"

    return keep


class Filtered:
    """A dataset without the entries that a filter leaves out.

    Entries that cannot be read are not filtered, since their fields mean nothing: they stay, to be refused by name or
    skipped and counted.

    Args:
      dataset: the dataset.
      filters: asked in order; the first reason counts.
      size: only the first so many of what is left.

    Attributes:
      left_out: entries left out, by reason.

    Raises:
      ValueError: nothing is left.
    """

    def __init__(self, dataset: Dataset, filters: Iterable[Filter], size: int | None = None) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.left_out: Counter[str] = Counter()
        filters, kept = tuple(filters), []
        for index in range(len(dataset)):
            raw_record = dataset.raw_record(index)
            reasons = (each(raw_record) for each in filters) if raw_record.fault is None else ()
            reason = next((each for each in reasons if each is not None), None)
            if reason is None:
                kept.append(index)
            else:
                self.left_out[reason] += 1
        self._kept = tuple(kept[:size])
        if not self._kept:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))
            raise ValueError(f"{dataset.name}: the filters leave nothing of its {len(dataset)} records ({counts})")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        """The record, as in `Corpus`."""
        return self._dataset[self._kept[index]]

    def raw_record(self, index: int) -> RawRecord:
        """The row, as in `Corpus`."""
        return self._dataset.raw_record(self._kept[index])
