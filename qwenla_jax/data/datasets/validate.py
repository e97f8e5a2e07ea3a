"""Everything that is wrong with a corpus, told before a training runs into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qwenla_jax.data.datasets.raw_record import Corpus, RecordError
from qwenla_jax.data.datasets.readers import open_corpus
from qwenla_jax.data.images.decode import PictureError, open_picture


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
      name: of the corpus.
      size: its number of records, broken ones included.
      broken: the number of records with at least one problem.
      problems: all of them, in the corpus's order.
      refused: what the reader left out on purpose, by reason.
    """

    name: str
    size: int
    broken: int
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
        lines = [f"{self.name}: {self.size} records, {self.broken} of them broken"]
        lines += [f"  {reason}: {count}" for reason, count in sorted(self.counts().items())]
        lines += [f"  left out, {reason}: {count}" for reason, count in sorted(self.refused.items())]
        lines += [str(problem) for problem in self.problems[:most]]
        if most is not None and len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most} more")
        return "\n".join(lines)


def check(corpus: Corpus | str, pictures: bool = True) -> Checked:
    """Goes over every record of a corpus.

    Args:
      corpus: the corpus, or its name as in `open_corpus`.
      pictures: decode each picture too; a picture of several records is decoded once and told of with each.

    Returns:
      All problems: rows that could not be read, duplicate ids, empty questions and answers, answers that are none of
      the options, pictures that are missing, empty or cannot be decoded.

    Raises:
      FileNotFoundError, ValueError: a corpus that cannot be opened at all.
    """
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    problems: list[Problem] = []
    opened: dict[str, tuple[str, str] | None] = {}
    bad = 0
    for index in range(len(corpus)):
        entry = corpus.entry(index)
        found = entry.faults()
        for picture in entry.pictures if pictures else ():
            if picture.name not in opened:
                opened[picture.name] = None
                try:
                    open_picture(picture.read(), picture.name)
                except PictureError as error:
                    opened[picture.name] = f"picture_{error.reason}", f"picture {error}"
                except RecordError as error:
                    opened[picture.name] = error.reason, f"picture {error}"
            fault = opened[picture.name]
            if fault is not None:
                found.append(fault)
        problems += [Problem(entry.where, entry.id, reason, message) for reason, message in found]
        bad += bool(found)
    return Checked(corpus.name, len(corpus), bad, tuple(problems), corpus.refused)
