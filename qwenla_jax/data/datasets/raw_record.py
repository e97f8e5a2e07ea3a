"""Raw records, questions as their files hold them, and datasets, which are sources of records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from qwenla_jax.data.datasets.multiple_choice import LETTERS, Option, from_lines
from qwenla_jax.data.datasets.placeholders import (
    count_unnumbered,
    named_images,
    placeholder_fault,
    without_placeholders,
)
from qwenla_jax.data.images.decode import ImageError, open_image, read_image
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


class RawImage(Protocol):
    """An image that has not been opened yet."""

    @property
    def name(self) -> str:
        """What errors call it, and the same for the same image of two entries."""
        ...

    def read(self) -> bytes:
        """The bytes of its file.

        Raises:
          RecordError: the file is missing or cannot be read.
          ImageError: it is empty, or too large to be an image.
        """
        ...


@dataclass(frozen=True)
class FileImage:
    """An image in a file of its own.

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
          ImageError: it is empty, or too large to be an image.
        """
        try:
            return read_image(self.path)
        except ImageError as error:
            if error.reason != "absent":
                raise
            raise RecordError(self.name, "image_absent", f"{error.message}; put it there") from error


@dataclass(frozen=True)
class RawRecord:
    """One question as in its file, with images unopened.

    Attributes:
      where: file and line or row, for errors.
      id: unique within the dataset.
      question: the text without its options; placeholders of images are left out of the prompt.
      options: letter and text of each; empty where the answer is free.
      answer: the option's letter, or the free answer.
      response: a response in the answer format; None where there is none.
      kind: type of the question.
      images: in their order.
      fault: (reason, message) where the row could not be read; the other fields then have no meaning.
      written: the question's text holds its options already, and the answer may be the text of one.
      parts: numbered placeholders name parts of one image.
      system: the record's own system message; None where there is none.
      columns: what else the row has, see `columns.further_columns`.
    """

    where: str
    id: str
    question: str
    options: tuple[Option, ...]
    answer: str
    response: str | None
    kind: str
    images: tuple[RawImage, ...]
    fault: tuple[str, str] | None = None
    written: bool = False
    parts: bool = False
    system: str | None = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        """(reason, message) of every fault of the text and the number of images."""
        if self.fault is not None:
            return [self.fault]
        options = [text for _, text in self.options]
        texts = {"id": self.id, "question": self.question, "answer": self.answer, "kind": self.kind}
        texts |= {"response": self.response or "", "system": self.system or ""}
        texts |= {f"option {letter}": text for letter, text in self.options}
        for name, text in texts.items():
            if len(text) > MAX_CHARACTERS:
                message = f"{name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read"
                return [("too_long", message)]
            if (message := half_character(text)) is not None:
                return [("half_character", f"{name} {message}")]
        faults = []
        question = without_placeholders(self.question) if "<" in self.question else self.question
        if not question.strip():
            faults.append(("empty_question", "the question is empty; expected text"))
        if not self.answer.strip():
            faults.append(("empty_answer", "the answer is empty; expected text"))
        elif (message := self._wrong_answer(options)) is not None:
            faults.append(("answer_not_among_options", message))
        elif (message := unmatchable(self.answer)) is not None:
            faults.append(("answer_unmatchable", message))
        written = [self.question] if self.written else [self.question, *options]
        if (message := placeholder_fault(written, len(self.images), self.parts)) is not None:
            faults.append(("image_absent", message))
        return faults

    def _wrong_answer(self, options: Sequence[str]) -> str | None:
        """The message for an answer that names no option, else None."""
        letters = [letter for letter, _ in self.options]
        if not letters or self.answer in letters:
            return None
        if self.written:  # the answer may be the text of one
            want = plain(self.answer)
            if right_option(want, options) is not None or any(same(want, plain(text)) for text in options):
                return None
        return f"the answer {self.answer!r} is none of the options {', '.join(letters)}; expected one of these"


def invalid(where: str, reason: str, message: str) -> RawRecord:
    """The raw record of a row that could not be read."""
    return RawRecord(where, where, "", (), "", None, "", (), (reason, message))


def records_of(rows: Iterable[tuple[str, Any]], read: Callable[[str, Any], RawRecord]) -> list[RawRecord]:
    """The raw record of every row; of a row that cannot be read, an invalid one.

    Args:
      rows: (where, row); the row may be the error that it was read with, as of `rows.read_jsonl`.
      read: raises RecordError; ValueError where the options have a form that cannot be read.
    """
    records = []
    for where, row in rows:
        try:
            if isinstance(row, RecordError):
                raise row
            records.append(read(where, row))
        except RecordError as error:
            records.append(invalid(where, error.reason, error.message))
        except ValueError as error:
            records.append(invalid(where, "options", str(error)))
    return records


class Dataset:
    """A random-access source of records; text is held in memory, images are opened when a record is read.

    Args:
      name: for reports.
      raw_records: all rows, invalid ones included, so that an index always means the same row.
      refused: number of records that the reader left out on purpose, by reason.

    Raises:
      ValueError: there is no raw record.
    """

    def __init__(self, name: str, raw_records: Sequence[RawRecord], refused: Mapping[str, int] | None = None) -> None:
        if not raw_records:
            raise ValueError(f"{name}: holds no question")
        self.name = name
        self.refused: Counter[str] = Counter(refused or {})
        first: dict[str, RawRecord] = {}
        checked = []
        for raw_record in raw_records:
            if raw_record.fault is None and first.setdefault(raw_record.id, raw_record) is not raw_record:
                message = f"id {raw_record.id!r} stands at {first[raw_record.id].where} already; ids must differ"
                raw_record = dataclasses.replace(raw_record, fault=("duplicate_id", message))
            checked.append(raw_record)
        self._raw_records = tuple(checked)

    def __len__(self) -> int:
        return len(self._raw_records)

    def raw_record(self, index: int) -> RawRecord:
        """The raw record at an index, without opening its images."""
        return self._raw_records[index]

    def __getitem__(self, index: int) -> Record:
        """The record at an index from 0.

        Raises:
          RecordError: the row is invalid.
          ImageError: an image cannot be decoded; both are ValueErrors with a `reason`.
        """
        raw_record = self._raw_records[index]
        for reason, message in raw_record.faults():
            raise RecordError(raw_record.where, reason, message)
        images: list[Image.Image] = []
        for image in raw_record.images:
            images.append(open_image(image.read(), f"{raw_record.where}: image {image.name}"))
        return Record(
            raw_record.id,
            tuple(images),
            raw_record.prompt(),
            raw_record.answer,
            raw_record.response,
            raw_record.kind,
            options=raw_record.option_texts(),
            system=raw_record.system,
            columns=raw_record.columns,
        )
