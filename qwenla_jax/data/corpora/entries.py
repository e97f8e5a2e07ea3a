"""What all corpora share: an entry is one question as its file tells it, a corpus a random-access source of entries."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from qwenla_jax.data.corpora.options import LETTERS, Option
from qwenla_jax.data.pictures import open_picture
from qwenla_jax.data.sources import Record

_PLACEHOLDER = re.compile(r"<image(\d*)>")


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
      where: file and line or row.
      reason: the kind of fault in one word, for counting.
    """

    def __init__(self, where: str, reason: str, message: str) -> None:
        super().__init__(where, reason, message)
        self.where, self.reason, self.message = where, reason, message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Picture(Protocol):
    """A picture that has not been opened yet."""

    @property
    def name(self) -> str:
        """What errors call it, and the same for the same picture of two entries."""

    def read(self) -> bytes:
        """The bytes of its file.

        Raises:
          RecordError: there are none.
        """


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file of its own.

    Attributes:
      path: the file; it need not exist.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self) -> bytes:
        """The file's content.

        Raises:
          RecordError: the file is missing or cannot be read.
        """
        try:
            return self.path.read_bytes()
        except (OSError, ValueError) as error:
            raise RecordError(self.name, "picture_absent", f"cannot be read ({error}); put it there") from error


@dataclass(frozen=True)
class Entry:
    """One question as its file tells it, pictures unopened.

    Attributes:
      where: file and line or row, for errors.
      id: unique within the corpus.
      question: the text without its options and without placeholders of pictures.
      options: letter and text of each; empty where the answer is free.
      answer: the option's letter, or the free answer.
      response: a response in the answer format; None where there is none.
      kind: type of the question.
      pictures: in their order.
      fault: (reason, message) where the row could not be read; the other fields are then of no meaning.
      written: the question's text holds its options already, and the answer may be the text of one.
    """

    where: str
    id: str
    question: str
    options: tuple[Option, ...]
    answer: str
    response: str | None
    kind: str
    pictures: tuple[Picture, ...]
    fault: tuple[str, str] | None = None
    written: bool = False

    def prompt(self) -> str:
        """The question with its options written out below it, one a line."""
        if self.written:
            return self.question
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in self.options)])

    def option_texts(self) -> tuple[str, ...]:
        """The texts of options A, B, C, ...; empty where their letters are others."""
        letters = "".join(letter for letter, _ in self.options)
        return tuple(text for _, text in self.options) if LETTERS.startswith(letters) else ()

    def faults(self) -> list[tuple[str, str]]:
        """(reason, message) of everything that is wrong with the text and the number of pictures."""
        if self.fault is not None:
            return [self.fault]
        found = []
        if not self.question.strip():
            found.append(("empty_question", "the question is empty; expected text"))
        if not self.answer.strip():
            found.append(("empty_answer", "the answer is empty; expected text"))
        letters = [letter for letter, _ in self.options]
        if letters and not self.written and self.answer.strip() and self.answer not in letters:
            told = f"the answer {self.answer!r} is none of the options {', '.join(letters)}; expected one of these"
            found.append(("answer_not_among_options", told))
        return found


def broken(where: str, reason: str, message: str) -> Entry:
    """The entry of a row that could not be read."""
    return Entry(where, where, "", (), "", None, "", (), (reason, message))


class Corpus:
    """A random-access source of records; text is held in memory, pictures are opened when a record is asked for.

    Args:
      name: what reports call it.
      entries: all rows, also those that cannot be used, so that an index always means the same row.
      refused: what the reader left out on purpose, counted by reason.

    Raises:
      ValueError: there is no entry.
    """

    def __init__(self, name: str, entries: Sequence[Entry], refused: Mapping[str, int] | None = None) -> None:
        if not entries:
            raise ValueError(f"{name}: holds no question")
        self.name = name
        self.refused: Counter[str] = Counter(refused or {})
        first: dict[str, Entry] = {}
        kept = []
        for entry in entries:
            if entry.fault is None and first.setdefault(entry.id, entry) is not entry:
                told = f"id {entry.id!r} stands at {first[entry.id].where} already; ids must differ"
                entry = dataclasses.replace(entry, fault=("duplicate_id", told))
            kept.append(entry)
        self._entries = tuple(kept)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, index: int) -> Entry:
        """The row at an index, without opening its pictures."""
        return self._entries[index]

    def __getitem__(self, index: int) -> Record:
        """The record at an index from 0.

        Raises:
          RecordError: the row cannot be used.
          PictureError: a picture cannot be decoded; both are ValueErrors with a `reason`.
        """
        entry = self._entries[index]
        for reason, message in entry.faults():
            raise RecordError(entry.where, reason, message)
        images: list[Image.Image] = []
        for picture in entry.pictures:
            images.append(open_picture(picture.read(), f"{entry.where}: picture {picture.name}"))
        return Record(
            entry.id,
            tuple(images),
            entry.prompt(),
            entry.answer,
            entry.response,
            entry.kind,
            options=entry.option_texts(),
        )


def without_placeholders(text: str) -> str:
    """Text without `<image>`; where numbered pictures are told apart amid the text, "(picture 2)" for each.

    The prompt puts a record's pictures before its text. MathVision numbers the parts of its one picture, and some
    questions refer to them amid a sentence, so that their numbers are kept.
    """
    several = len({match[1] for match in _PLACEHOLDER.finditer(text)}) > 1
    text = re.sub(r"(?m)^[ \t]*(?:<image\d*>[ \t]*)+\r?$\n?", "", text)
    if several:
        text = re.sub(r"<image(\d+)>", r"(picture \1)", text)
    text = re.sub(r"(?m)(^)?[ \t]*<image\d*>[ \t]*", lambda match: "" if match[1] is not None else " ", text)
    return "\n".join(line.rstrip(" \t\r") for line in text.split("\n")).strip()
