"""SceMQA (1,040 questions: 840 with options, 200 free), its own files.

Confirmed against the repository SceMQA/SceMQA: `Multiple_Choice/multiple_choice.json` and
`Free_Response/free_response.json`, each an object of lists, subject -> questions, with `Question`, `ImagePath`
(relative to the file's folder, without suffix) and `Answer (final answer highlighted)`. Options are lines of the
question. The gold answer contains prose: with options it starts with the letter ("D: because ..."), a free one with
`\\answer{...}` (once `\\anser{...}`); of several the first counts, the others are roundings of it. Gold with two
letters ("(C, D) ...") is rejected, since a record has one answer. No id is given: subject and number, from 0.

Not read: the copy on Hugging Face (Haozy/SceMQA-main), whose inner layout could not be confirmed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.multiple_choice import from_lines
from qwenla_jax.data.datasets.raw_record import Dataset, RawRecord, RecordError, records_of
from qwenla_jax.data.datasets.rows import image_at, text_of
from qwenla_jax.utils.json_files import read_json

_ANSWER = "Answer (final answer highlighted)"
_FILES = ("Multiple_Choice/multiple_choice.json", "Free_Response/free_response.json")
_TWO = re.compile(r"\s*\(?\s*[A-H]\s*(?:,|and|&)\s*[A-H]\b")
# The letter alone, or before punctuation or wide space, or before what does not continue a sentence that begins with
# "A".
_LETTER = re.compile(r"\s*\(?([A-H])\)?(?=\s*$|\s*[.:：;；,)-]|\s{2}|\s[^\sa-z])")
_ONE_VARIABLE = re.compile(r"\s*\(?([A-H])\)?\s+[a-z]\s*=")  # "E z = 0.70"
_BOX = re.compile(r"\\an(?:sw|s)er\s*\{")


def scemqa(path: str | Path) -> Dataset:
    """SceMQA of the folder that holds `Multiple_Choice` and `Free_Response`, of one of the two, or of one of its files.

    Raises:
      FileNotFoundError: neither file is there.
      ValueError: a file is not of the layout above.
    """
    path = Path(path)
    places = [path / each for each in _FILES] + [path / Path(each).name for each in _FILES]
    files = [each for each in places if each.is_file()] if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: holds neither {' nor '.join(_FILES)}")
    raw_records = []
    for file in files:
        subjects = read_json(file)
        if not isinstance(subjects, dict) or not all(isinstance(rows, list) for rows in subjects.values()):
            raise ValueError(f"{file}: expected an object of lists, subject -> questions")
        for subject, rows in subjects.items():
            questions = (
                (f"{file}: {subject} {number}", (file, subject, number, row)) for number, row in enumerate(rows)
            )
            raw_records += records_of(questions, _raw_record)
    return Dataset("scemqa", raw_records)


def _raw_record(where: str, given: tuple[Path, str, int, Any]) -> RawRecord:
    file, subject, number, row = given
    if not isinstance(row, dict):
        raise RecordError(where, "not_an_object", f"holds a {type(row).__name__}; expected an object")
    gold = text_of(row, _ANSWER, where)
    question = text_of(row, "Question", where)
    options: tuple[tuple[str, str], ...] = ()
    if subject.endswith("Free_Response"):
        answer = boxed_answer(gold, where)
    else:
        question, options = from_lines(question)
        if not options:
            message = f"no options in the lines of the question {question[-80:]!r}; expected 'A. ...' and 'B. ...'"
            raise RecordError(where, "options", message)
        answer = option_answer(gold, where)
    image = image_at(file.parent, text_of(row, "ImagePath", where), where, add_suffix=True)
    return RawRecord(where, f"{subject}/{number}", question, options, answer, None, subject, (image,))


def option_answer(gold: str, where: str) -> str:
    """The letter that gold starts with.

    Raises:
      RecordError: it names two options, or starts with no letter.
    """
    if not gold.strip():
        return ""
    if _TWO.match(gold):
        raise RecordError(where, "several_answers", f"the answer {gold[:40]!r} names several options; one is expected")
    match = _LETTER.match(gold) or _ONE_VARIABLE.match(gold)
    if match is None:
        raise RecordError(
            where, "answer_unreadable", f"the answer {gold[:40]!r} does not start with an option's letter, as 'D: ...'"
        )
    return match[1]


def boxed_answer(gold: str, where: str) -> str:
    """The content of the first `\\answer{...}`, with the braces in it.

    Raises:
      RecordError: there is none, or it is never closed.
    """
    match = _BOX.search(gold)
    if match is None:
        if not gold.strip():
            return ""
        raise RecordError(where, "answer_unreadable", f"the answer {gold[:40]!r} holds no \\answer{{...}}")
    depth = 1
    for at in range(match.end(), len(gold)):
        depth += {"{": 1, "}": -1}.get(gold[at], 0)
        if depth == 0:
            return gold[match.end() : at].strip()
    raise RecordError(where, "answer_unreadable", f"the answer {gold[:40]!r} never closes its \\answer{{")
