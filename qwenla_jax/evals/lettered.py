"""Options of a question by their letters, however a file has them: columns, lists, dicts, or inside the question."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwenla_jax.data.datasets.multiple_choice import LETTERS, literal
from qwenla_jax.evals.table_files import NOTHING, Row

_LISTS = ("options", "choices", "option")
_INLINE = re.compile(r"(?:^|[\s,])\(?([A-H])\s?[:.)]\s*")


def options_of(row: Row, answer: object = "") -> dict[str, str]:
    """Options of `index2ans`, of a list, a dict or the text of one, or of columns A, B, C, ...; empty without any.

    Empty cells are no options, nor are texts that a program wrote for one (`table_files.NOTHING`).

    Args:
      row: a question.
      answer: the right letter; a text that it points at is an option, whatever it says.

    Raises:
      ValueError: what should be a list is none.
    """
    result = row.values.get("index2ans")
    if not isinstance(result, dict):
        key = next((key for key in _LISTS if key in row.values), None)
        given = {letter: row.text(letter) for letter in LETTERS} if key is None else row.values[key]
        result = literal(given) if isinstance(given, str) else given
        if isinstance(result, list | tuple):
            if len(result) > len(LETTERS):
                raise ValueError(f"{row.where}: {key} holds {len(result)} texts; expected at most {len(LETTERS)}")
            result = dict(zip(LETTERS, result, strict=False))
        if not isinstance(result, dict):
            raise ValueError(f"{row.where}: {key} is {repr(given)[:60]}; expected a list of at most 26 texts")
    return _real({str(letter): str(text) for letter, text in result.items() if text is not None}, answer)


def _real(result: Mapping[str, str], answer: object) -> dict[str, str]:
    return {letter: text for letter, text in result.items() if text not in NOTHING or letter == answer}


def inline_options(question: str, answer: object = "") -> dict[str, str]:
    """Options at the end of a question, as "Options: A: red, B: blue" or "(A) red (B) blue"; empty where none are.

    Args:
      question: as the file has it.
      answer: the right letter, as in `options_of`.
    """
    tail = question.rpartition("Options:")[2] if "Options:" in question else question
    marks: list[re.Match[str]] = []
    for mark in _INLINE.finditer(tail):
        if mark[1] == LETTERS[len(marks)]:
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(tail)] * bool(marks)
    result = {mark[1]: tail[mark.end() : end].strip(" ,\n.") for mark, end in zip(marks, ends, strict=True)}
    return _real(result, answer) if len(result) > 1 else {}


def check_letter(row: Row, answer: str, options: Mapping[str, str]) -> None:
    """Refuses a right answer that is no letter. One that points at no option is a fault of the file, and is counted.

    Raises:
      ValueError: it is none of the options, and no capital letter.
    """
    if answer not in options and (len(answer) != 1 or answer not in LETTERS):
        raise ValueError(f"{row.where}: the right answer is {answer!r}; expected a letter, as {', '.join(options)}")
