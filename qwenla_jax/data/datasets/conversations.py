"""Records in the forms of conversations: OpenAI's `messages`, and `conversations` of ShareGPT and LLaVA.

`messages` is a list of `{role, content}` with the roles system, user and assistant; content is a text, or a list of
`{type: text, text}` and `{type: image_url, image_url: {url}}` (OpenAI), `{type: image, image}` or `{type: image}` with
the image in a column (TRL, Qwen). `conversations` is a list of `{from, value}` with system, human and gpt, whose texts
hold `<image>` for each image of the column (LLaVA). Both spellings are read in either column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from qwenla_jax.data.datasets.columns import FIELDS, VIDEOS, value_of
from qwenla_jax.data.datasets.multiple_choice import letter_of, lettered
from qwenla_jax.data.datasets.raw_record import RawImage, RawRecord, RecordError
from qwenla_jax.data.datasets.rows import answer_of, image_of_text, text_of
from qwenla_jax.text.answers.gold import unwrap_gold
from qwenla_jax.text.answers.match import extract_conclusion

_ROLES = MappingProxyType(
    {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
)
_FORM = "expected a list of {role, content} or {from, value}"


class Conversation(NamedTuple):
    """A question with what stands around it.

    Attributes:
      question: text of the user's turn, with `<image>` for each image.
      response: text of the assistant's turn; None where there is none.
      system: text of the system message; None where there is none.
      images: of each `<image>` that a content part holds, a path, base64 or data URL; None where a column holds it.
    """

    question: str
    response: str | None
    system: str | None
    images: tuple[str | None, ...]


def read_conversation(given: Any, column: str, where: str, first_turn: bool = False) -> Conversation:
    """The question of a conversation, and its answer.

    Args:
      given: the column's value.
      column, where: for errors.
      first_turn: use only the first question and its answer.

    Raises:
      RecordError: another form, other roles or another order of them, a video, or (unless `first_turn`) a second
        question.
    """
    if isinstance(given, dict) and given and all(isinstance(values, list) for values in given.values()):
        # `datasets` may store a list of objects as an object of lists.
        given = [dict(zip(given, values, strict=False)) for values in zip(*given.values(), strict=False)]
    if not isinstance(given, list) or not given:
        raise RecordError(where, "conversation", f"{column} is {repr(given)[:60]}; {_FORM}")
    turns: list[tuple[str, str]] = []
    images: list[str | None] = []
    system = None
    for number, turn in enumerate(given):
        if first_turn and len(turns) == 2:
            break
        place = f"{column}[{number}]"
        if not isinstance(turn, dict):
            raise RecordError(where, "conversation", f"{place} is {repr(turn)[:60]}; {_FORM}")
        name = turn.get("role") or turn.get("from")
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RecordError(where, "conversation", f"{place} is from {name!r}; expected one of {', '.join(_ROLES)}")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        text, found = _content(content, place, where)
        if role == "system" and not number:
            system = text
        elif role != ("assistant" if len(turns) % 2 else "user"):
            raise RecordError(
                where, "conversation", f"{place} is from {name!r}; expected a user and an assistant in turn"
            )
        else:
            turns.append((role, text))
        if found and role != "user":
            raise RecordError(
                where, "conversation", f"{place}, from {name!r}, holds an image; expected it in a user's turn"
            )
        images += found
    if not turns:
        raise RecordError(where, "conversation", f"{column} holds no question; expected a user's turn")
    if len(turns) > 2:
        asked = sum(role == "user" for role, _ in turns)
        message = f"{column} holds {asked} questions and a record has one; make a record of each, or take the first"
        raise RecordError(where, "several_turns", f"{message} (#turns=first)")
    return Conversation(turns[0][1], turns[1][1] if len(turns) == 2 else None, system, tuple(images))


def _content(content: Any, place: str, where: str) -> tuple[str, list[str | None]]:
    """Text with `<image>` for each image part, joined as the chat template joins it; and what the image parts hold."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RecordError(
            where, "conversation", f"{place} holds {repr(content)[:60]}; expected text or a list of parts"
        )
    texts: list[str] = []
    images: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind.removesuffix("_url") == "video":
            raise RecordError(where, "video", f"{place} holds a video; records for training have images only")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append("<image>")
            value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            images.append(None if value is None else image_text(value, place, where))
        else:
            message = f"{place} holds {repr(part)[:60]}; expected parts of type text, image or image_url"
            raise RecordError(where, "conversation", message)
    return "".join(texts), images


def image_text(value: Any, place: str, where: str) -> str:
    """The path, base64 or data URL of an image: a text, or an object that has it as url, path or bytes.

    Raises:
      RecordError: it is of another form.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "url", "path") if value.get(key)), None)
    if not isinstance(value, str) or not value.strip():
        message = f"{place} holds {repr(value)[:60]} for an image; expected a path, base64 or a data URL"
        raise RecordError(where, "image_absent", message)
    return value


def read_question(
    where: str,
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    images: Sequence[RawImage],
    folder: Path,
    name: str,
    written: bool = False,
    first_turn: bool = False,
) -> RawRecord:
    """The record of a row with named columns.

    Args:
      where: for errors.
      row: its values.
      columns: the column of a field, where a setting names it; see `columns.FIELDS`.
      images: of its column of images.
      folder: what paths in the messages are relative to.
      name: the id, where it has none.
      written, first_turn: as in `RawRecord` and `read_conversation`.

    Raises:
      RecordError: a field is missing or has another form.
      ValueError: options of another form.
    """
    for column in VIDEOS:
        if row.get(column):
            raise RecordError(where, "video", f"{column}: records for training have images only; leave it out")
    question_column, question = value_of(row, "question", columns)
    message_column, messages = value_of(row, "messages", columns)
    if "question" in columns and "messages" not in columns:
        messages = None
    if messages is None and isinstance(question, list):  # TRL's prompts
        message_column, messages = question_column, question
    system, response, answer = (value_of(row, field, columns) for field in ("system", "response", "answer"))
    texts = {each[0]: text_of(row, each[0], where) for each in (system, response) if each[1] is not None}
    system, response = texts.get(system[0]), texts.get(response[0])
    if messages is None:
        question = text_of(row, question_column, where)
    else:
        read = read_conversation(messages, message_column, where, first_turn)
        question, response = read.question, read.response if response is None else response
        system = read.system if read.system is not None else system
        inline = [each for each in read.images if each is not None]
        if inline and (images or len(inline) < len(read.images)):
            message = f"images are both in {message_column} and in a column; expected all of them in one place"
            raise RecordError(where, "image_absent", message)
        if inline:
            images = [image_of_text(text, folder, f"{where}, image {n}") for n, text in enumerate(inline)]
    if answer[1] is None and messages is not None:
        if response is None:
            message = f"no answer: neither a column ({', '.join(FIELDS['answer'])}) nor an assistant's turn"
            raise RecordError(where, "field", message)
        gold = unwrap_gold(extract_conclusion(response) or response)
    else:
        gold = answer_of(row, answer[0], where)
    options = lettered(value_of(row, "options", columns)[1])
    number = value_of(row, "id", columns)[1]
    return RawRecord(
        where,
        name if number is None else str(number),
        question,
        options,
        letter_of(gold, options) if options and not written else gold,
        response,
        str(value_of(row, "kind", columns)[1] or "question"),
        tuple(images),
        written=written,
        system=system,
    )
