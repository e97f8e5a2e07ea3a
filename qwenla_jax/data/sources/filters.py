"""Filters on the text of a dataset's records, with a count for every reason; no image is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from qwenla_jax.data.datasets.raw_record import Dataset, RawRecord
from qwenla_jax.data.record import Record

Filter = Callable[[RawRecord], str | None]  # why a raw record is left out, or None


def no_image(raw_record: RawRecord) -> str | None:
    """Leaves out what has no image."""
    return None if raw_record.images else "no_image"


def several_images(raw_record: RawRecord) -> str | None:
    """Leaves out what has more than one image."""
    return "several_images" if len(raw_record.images) > 1 else None


def many_options(most: int) -> Filter:
    """Leaves out what has more options than that."""

    def reason(raw_record: RawRecord) -> str | None:
        return "many_options" if len(raw_record.options) > most else None

    return reason


def other_kinds(kinds: Iterable[str]) -> Filter:
    """Leaves out every kind but these."""
    wanted = frozenset(kinds)

    def reason(raw_record: RawRecord) -> str | None:
        return None if raw_record.kind in wanted else "other_kind"

    return reason


class Filtered:
    """A dataset without the records that a filter leaves out.

    Raw records that cannot be read are not filtered, since their fields have no meaning: they stay, to be reported or
    skipped and counted.

    Args:
      dataset: the dataset.
      filters: applied in order; the first reason counts.
      size: only the first so many of what is left.

    Attributes:
      left_out: number of records left out, by reason.

    Raises:
      ValueError: nothing is left.
    """

    def __init__(self, dataset: Dataset, filters: Iterable[Filter], size: int | None = None) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.left_out: Counter[str] = Counter()
        filters, indices = tuple(filters), []
        for index in range(len(dataset)):
            raw_record = dataset.raw_record(index)
            reasons = (each(raw_record) for each in filters) if raw_record.fault is None else ()
            reason = next((each for each in reasons if each is not None), None)
            if reason is None:
                indices.append(index)
            else:
                self.left_out[reason] += 1
        self._indices = tuple(indices[:size])
        if not self._indices:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))
            raise ValueError(f"{dataset.name}: the filters leave nothing of its {len(dataset)} records ({counts})")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        """The record, as in `Dataset`."""
        return self._dataset[self._indices[index]]

    def raw_record(self, index: int) -> RawRecord:
        """The raw record, as in `Dataset`."""
        return self._dataset.raw_record(self._indices[index])
