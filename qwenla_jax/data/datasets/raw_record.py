"""What all corpora share: an entry is one question as its file tells it, a corpus a random-access source of entries."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from qwenla_jax.data.datasets.multiple_choice import LETTERS, Option, from_lines
from qwenla_jax.data.datasets.placeholders import (
    count_unnumbered,
    named_images,
    placeholder_fault,
    without_placeholders,
)
from qwenla_jax.data.images.decode import PictureError, open_picture, read_picture
from qwenla_jax.data.record import Record
from qwenla_jax.text.answers.gold import unmatchable
from qwenla_jax.text.answers.match import right_option, same
from qwenla_jax.text.answers.normalize import plain
from qwenla_jax.utils.unicode import half_character

MAX_CHARACTERS = 1_000_000  # of one text; the longest prompt that a model takes has a few hundred thousand


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
          PictureError: there are none, or too many, to be a picture.
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
          PictureError: it is empty, or too large to be a picture.
        """
        try:
            return read_picture(self.path)
        except PictureError as error:
            if error.reason != "absent":
                raise
            raise RecordError(self.name, "picture_absent", f"{error.message}; put it there") from error


@dataclass(frozen=True)
class Entry:
    """One question as its file tells it, pictures unopened.

    Attributes:
      where: file and line or row, for errors.
      id: unique within the corpus.
      question: the text without its options; placeholders of pictures are left out of the prompt.
      options: letter and text of each; empty where the answer is free.
      answer: the option's letter, or the free answer.
      response: a response in the answer format; None where there is none.
      kind: type of the question.
      pictures: in their order.
      fault: (reason, message) where the row could not be read; the other fields are then of no meaning.
      written: the question's text holds its options already, and the answer may be the text of one.
      parts: numbered placeholders name parts of one picture.
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
    parts: bool = False

    def prompt(self) -> str:
        """The question with its options written out below it, one a line, unless it holds them already."""
        if self.written:
            return without_placeholders(self.question) if "<image" in self.question else self.question
        question = without_placeholders(self.question)
        options = tuple(zip((letter for letter, _ in self.options), self._option_texts(), strict=True))
        if options and from_lines(question)[1] == options:
            return question
        return "\n".join([question, *(f"{letter}. {text}" for letter, text in options)])

    def option_texts(self) -> tuple[str, ...]:
        """The texts of options A, B, C, ...; empty where their letters are others."""
        letters = "".join(letter for letter, _ in self.options)
        return self._option_texts() if LETTERS.startswith(letters) else ()

    def _option_texts(self) -> tuple[str, ...]:
        return named_images([text for _, text in self.options], count_unnumbered(self.question))

    def faults(self) -> list[tuple[str, str]]:
        """(reason, message) of everything that is wrong with the text and the number of pictures."""
        if self.fault is not None:
            return [self.fault]
        options = [text for _, text in self.options]
        texts = {"id": self.id, "question": self.question, "answer": self.answer, "kind": self.kind}
        texts |= {"response": self.response or "", **{f"option {letter}": text for letter, text in self.options}}
        for name, text in texts.items():
            if len(text) > MAX_CHARACTERS:
                told = f"{name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read"
                return [("too_long", told)]
            if (told := half_character(text)) is not None:
                return [("half_character", f"{name} {told}")]
        found = []
        question = without_placeholders(self.question) if "<" in self.question else self.question
        if not question.strip():
            found.append(("empty_question", "the question is empty; expected text"))
        if not self.answer.strip():
            found.append(("empty_answer", "the answer is empty; expected text"))
        elif (told := self._wrong_answer(options)) is not None:
            found.append(("answer_not_among_options", told))
        elif (told := unmatchable(self.answer)) is not None:
            found.append(("answer_unmatchable", told))
        written = [self.question] if self.written else [self.question, *options]
        if (told := placeholder_fault(written, len(self.pictures), self.parts)) is not None:
            found.append(("picture_absent", told))
        return found

    def _wrong_answer(self, options: Sequence[str]) -> str | None:
        """What is wrong with an answer that names no option."""
        letters = [letter for letter, _ in self.options]
        if not letters or self.answer in letters:
            return None
        if self.written:  # the answer may be the text of one
            want = plain(self.answer)
            if right_option(want, options) is not None or any(same(want, plain(text)) for text in options):
                return None
        return f"the answer {self.answer!r} is none of the options {', '.join(letters)}; expected one of these"


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
