"""Everything that is wrong with a dataset, told before a training runs into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qwenla_jax.data.datasets.raw_record import Dataset, RecordError
from qwenla_jax.data.datasets.readers import READERS
from qwenla_jax.data.images.decode import ImageError, open_image


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
      where: file and line or row.
      id: of the record, as far as it has one.
      reason: the kind of fault, for counting.
      message: what is wrong and what would be right.
    """

    where: str
    id: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
      name: of the dataset.
      size: its number of records, invalid ones included.
      invalid: the number of records with at least one problem.
      problems: all of them, in the dataset's order.
      refused: what the reader left out on purpose, by reason.
    """

    name: str
    size: int
    invalid: int
    problems: tuple[Problem, ...]
    refused: Counter[str]

    def counts(self) -> Counter[str]:
        """Problems by reason."""
        return Counter(problem.reason for problem in self.problems)

    def text(self, most: int | None = None) -> str:
        """The report.

        Args:
          most: problems that are written out; None for all.
        """
        lines = [f"{self.name}: {self.size} records, {self.invalid} of them invalid"]
        lines += [f"  {reason}: {count}" for reason, count in sorted(self.counts().items())]
        lines += [f"  left out, {reason}: {count}" for reason, count in sorted(self.refused.items())]
        lines += [str(problem) for problem in self.problems[:most]]
        if most is not None and len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most} more")
        return "\n".join(lines)


def check(dataset: Dataset | str, images: bool = True) -> Checked:
    """Goes over every record of a dataset.

    Args:
      dataset: the dataset, or its name as in `open_dataset`.
      images: decode each image too; an image of several records is decoded once and told of with each.

    Returns:
      All problems: rows that could not be read, duplicate ids, empty questions and answers, answers that are none of
      the options, images that are missing, empty or cannot be decoded.

    Raises:
      FileNotFoundError, ValueError: a dataset that cannot be opened at all.
    """
    dataset = open_dataset(dataset) if isinstance(dataset, str) else dataset
    problems: list[Problem] = []
    opened: dict[str, tuple[str, str] | None] = {}
    bad = 0
    for index in range(len(dataset)):
        raw_record = dataset.raw_record(index)
        result = raw_record.faults()
        for image in raw_record.images if images else ():
            if image.name not in opened:
                opened[image.name] = None
                try:
                    open_image(image.read(), image.name)
                except ImageError as error:
                    opened[image.name] = f"image_{error.reason}", f"image {error}"
                except RecordError as error:
                    opened[image.name] = error.reason, f"image {error}"
            fault = opened[image.name]
            if fault is not None:
                result.append(fault)
        problems += [Problem(raw_record.where, raw_record.id, reason, message) for reason, message in result]
        bad += bool(result)
    return Checked(dataset.name, len(dataset), bad, tuple(problems), dataset.refused)


def open_dataset(spec: str) -> Dataset:
    """The dataset of "NAME:PATH", with a name of `READERS`.

    Raises:
      ValueError: no such name, or no path.
      Others: as the readers raise them.
    """
    name, colon, path = spec.partition(":")
    if name not in READERS or not colon or not path:
        raise ValueError(f"{spec!r}: expected NAME:PATH with a name of {', '.join(READERS)}")
    return READERS[name](Path(path).expanduser())
