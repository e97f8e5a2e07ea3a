"""LLaVA-CoT-100k, its own files: `train.jsonl` and the unzipped images beside it.

Confirmed against the dataset's card (Xkev/LLaVA-CoT-100k): an object a line with `id`, `image` (a path relative to the
file, such as "coco/train2017/000000000009.jpg") and `conversations`, a list of `{from: human|gpt, value}`; answers are
`<SUMMARY>..</SUMMARY><CAPTION>..</CAPTION><REASONING>..</REASONING><CONCLUSION>..</CONCLUSION>`. Not confirmed: whether
ids are unique: a repeated id gets its line number appended; a line that repeats image and question too is a duplicate.

Several turns (paper silent, our choice): every turn whose question can be understood with the image alone is a record.
The first always is. A later one is unless it refers to earlier turns: a pronoun, "the other", "else", "also", "why?"
and the like, listed in `_POINTS_BACK`. The list refuses too many rather than too few, because a question without its
context teaches guessing. Refused turns are counted in `refused` as "turn_points_back".
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from qwenla_jax.data.datasets.raw_record import Dataset, RawRecord, RecordError, invalid
from qwenla_jax.data.datasets.rows import image_at, read_jsonl, text_of
from qwenla_jax.text.answers.match import extract_conclusion
from qwenla_jax.text.response_format import parse

_POINTS_BACK = re.compile(
    r"\b(it|its|itself|they|them|their|theirs|he|him|his|she|her|hers|this|that|these|those|one|ones|other|others|another"
    r"|else|also|too|more|instead|same|previous|previously|earlier|above|before|again|mentioned|described|said|answer"
    r"|such|both|former|latter|then|so|therefore|besides|apart)\b"
    r"|^\W*(and|or|but|because|what about|how about|explain|elaborate|continue|are you sure|really)\b"
    r"|^\W*(why|how|what|who|where|when|which)(\s+not)?\W*$",
    re.IGNORECASE,
)
# "this" and "that" in these phrases refer to the image.
_THE_IMAGE = re.compile(r"\b(?:this|that) (?:image|picture|photo|photograph|figure|diagram|chart|graph|scene)\b", re.I)


def stands_alone(question: str) -> bool:
    """Whether a later turn's question can be understood with the image alone, judged by its words."""
    return bool(question.strip()) and _POINTS_BACK.search(_THE_IMAGE.sub("the image", question)) is None


def llava_cot(path: str | Path, later_turns: bool = True) -> Dataset:
    """LLaVA-CoT-100k of a JSONL file, or of a folder that holds `train.jsonl`.

    Args:
      path: as above; paths of images are relative to the file.
      later_turns: False takes the first turn of each conversation only.

    Returns:
      A record for each turn: `response` is the turn's answer unchanged, `answer` the text of its conclusion, `id` the
      row's, with "#1", "#2", ... appended for later turns.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file holds no line.
    """
    path = Path(path)
    path = path / "train.jsonl" if path.is_dir() else path
    raw_records: list[RawRecord] = []
    refused: Counter[str] = Counter()
    seen: dict[str, tuple[object, object]] = {}
    for where, row in read_jsonl(path):
        if isinstance(row, RecordError):
            raw_records.append(invalid(where, row.reason, row.message))
            continue
        try:
            name = text_of(row, "id", where)
            turns = _turns(row, where)
            message = (row.get("image"), turns[0][0])
            if seen.setdefault(name, message) != message:
                name = f"{name}@{where.rsplit(':', 1)[1]}"
            image = image_at(path.parent, text_of(row, "image", where), where)
        except RecordError as error:
            raw_records.append(invalid(where, error.reason, error.message))
            continue
        kind = Path(str(row["image"])).parts[0]
        for number, (question, response) in enumerate(turns):
            if number and not later_turns:
                refused["later_turn"] += 1
            elif number and not stands_alone(question):
                refused["turn_points_back"] += 1
            else:
                turn = f"{name}#{number}" if number else name
                raw_records.append(_raw_record(where, turn, question, response, kind, image, number))
    return Dataset("llava_cot", raw_records, refused)


def _turns(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(question, answer) of each turn.

    Raises:
      RecordError: they do not alternate, or hold something else.
    """
    said = row.get("conversations")
    message = None
    if not isinstance(said, list) or not said:
        message = f"conversations is {str(said)[:60]!r}"
    else:
        for number, part in enumerate(said):
            if not isinstance(part, dict) or not isinstance(part.get("value"), str):
                message = message or f"conversations[{number}] is {str(part)[:60]!r}"
            elif part.get("from") != ("gpt" if number % 2 else "human"):
                message = message or f"conversations[{number}] is from {part.get('from')!r}"
        message = message or ("conversations ends with a question" if len(said) % 2 else None)
    if message is not None:
        right = "a list of {from: human, value: text} and {from: gpt, value: text} in turns"
        raise RecordError(where, "conversations", f"{message}; expected {right}")
    assert isinstance(said, list)
    return [(said[i]["value"], said[i + 1]["value"].strip()) for i in range(0, len(said), 2)]


def _raw_record(where: str, name: str, question: str, response: str, kind: str, image: Any, number: int) -> RawRecord:
    parsed = parse(response)
    if parsed.fault is not None:
        what = f"{parsed.fault} at {parsed.fault_at}"
        message = f"the answer of turn {number} is not in the format ({what}): {response[:60]!r}"
        return invalid(where, "response_format", message)
    answer = extract_conclusion(response) or ""
    return RawRecord(where, name, question, (), answer, response, kind, (image,))
