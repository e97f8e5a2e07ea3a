"""Parses the options of a question in the forms of datasets: a string, lines after the question, a list, an object."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qwenla_jax.text.answers.match import right_option
from qwenla_jax.text.answers.normalize import plain

Option = tuple[str, str]  # its letter and its text
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_EMPTY = r"(?!\s*(?:[;；]|$))"  # what follows a marker is more than the next semicolon
# "(A) text", "A. text", "A) text", and SceMQA's "(A} text"; a backspace replaces one of its line breaks.
_AT_LINE = re.compile(r"(?m)(?:^|\x08)[^\S\n\x08]*(?:\(([A-H])[)}]|([A-H])\s?[.．:：)])[^\S\n]*")
# Not "A.M." and "B.C.", nor the ratio "A:B".
_LABEL = re.compile(r"\s{0,9}(?:\(([A-Za-z])\)|([A-Za-z])\s?(?:[.．)](?!\S\.)|[:：](?!\S)))(.*)", re.DOTALL)
# Keys of objects that hold a letter and a text, such as CommonsenseQA's {label: [A, B], text: [red, blue]}.
_LETTER_KEYS, _TEXT_KEYS = ("label", "letter", "key", "id"), ("text", "value", "content", "option")
_MAX_WRITTEN = 100_000  # characters of a list that is written as text


def numbered(texts: Sequence[str]) -> tuple[Option, ...]:
    """Options of a list, lettered in its order, or by their own letters if all have one ("A. red", "B. blue").

    Raises:
      ValueError: there are more than 26.
    """
    if len(texts) > len(LETTERS):
        raise ValueError(f"there are {len(texts)} options; at most {len(LETTERS)} can be lettered")
    labels = [match for text in texts if (match := _LABEL.fullmatch(text)) and match[3].strip()]
    letters = [(match[1] or match[2]).upper() for match in labels]
    if len(texts) > 1 and len(labels) == len(texts) and sorted(letters) == list(LETTERS[: len(texts)]):
        by_letter = dict(zip(letters, (match[3] for match in labels), strict=True))
        texts = [by_letter[letter] for letter in sorted(letters)]
    return tuple(zip(LETTERS, (" ".join(text.split()) for text in texts), strict=False))


def lettered(given: Any) -> tuple[Option, ...]:
    """Options in any of the forms that datasets have.

    Args:
      given: a list of texts, of (letter, text) or of objects with a letter and a text; an object letter -> text, or
        one of two lists; a string as We-Math writes it, of lines "A. red", or of a list as Python writes it. Missing
        values at a list's end and in objects are no options, since tables are padded with them.

    Returns:
      Letters in rising order with their texts; no option where there is none.

    Raises:
      ValueError: it is of another form.
    """
    if isinstance(given, str):
        value = literal(given)
        return (from_lines(given)[1] or from_string(given)) if value is None else lettered(value)
    if isinstance(given, Mapping):
        lists = [next((given[key] for key in keys if isinstance(given.get(key), list)), None)
                 for keys in (_LETTER_KEYS, _TEXT_KEYS)]  # fmt: skip
        if lists[0] is not None and lists[1] is not None:
            return _by_letter([*zip(*lists, strict=True)]) if len(lists[0]) == len(lists[1]) else _refuse(given)
        return _by_letter([item for item in given.items() if not _missing(item[1])])
    if not isinstance(given, list | tuple):
        return () if _missing(given) else _refuse(given)
    items = list(given)
    while items and _missing(items[-1]):
        items.pop()
    if items and all(isinstance(item, Mapping) for item in items):
        return _by_letter([pair for item in items for pair in _pairs(item)])
    if items and all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
        return _by_letter([tuple(item) for item in items])
    return numbered([_text(item, given) for item in items])


def literal(text: str) -> list[Any] | tuple[Any, ...] | dict[Any, Any] | None:
    """The list, tuple or object that a text holds as Python writes it; None where it holds something else."""
    if not text.lstrip().startswith(("[", "{", "(")) or len(text) > _MAX_WRITTEN:
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list | tuple | dict) else None


def _pairs(item: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The (letter, text) of an object: {label: A, text: red} or {A: red}."""
    letter, text = (next((item[key] for key in keys if key in item), None) for keys in (_LETTER_KEYS, _TEXT_KEYS))
    return [(letter, text)] if None not in (letter, text) else [pair for pair in item.items() if not _missing(pair[1])]


def _by_letter(pairs: Sequence[tuple[Any, Any]]) -> tuple[Option, ...]:
    """Options whose letters are given, "A" or "(A)" or "option_a"; numbers from 0 or 1 count as letters in order."""
    names = [str(name).strip() for name, _ in pairs]
    numbers = [int(name) for name in names if re.fullmatch("[0-9]{1,2}", name)]
    first = min(numbers, default=0)
    if len(numbers) == len(pairs) <= len(LETTERS) and sorted(numbers) == list(range(first, first + len(pairs))):
        letters = [LETTERS[number - first] for number in numbers]
    else:
        matches = [re.fullmatch(r"(?:option|choice)?[_ ]?\(?([A-Za-z])\)?[.:]?", name, re.IGNORECASE) for name in names]
        letters = [match[1].upper() for match in matches if match]
    if len(letters) != len(pairs) or len(set(letters)) != len(letters):
        _refuse(names)
    texts = [" ".join(_text(text, pairs).split()) for _, text in pairs]
    return tuple(sorted(zip(letters, texts, strict=True)))


def _text(item: Any, given: Any) -> str:
    if _missing(item) or not isinstance(item, str | int | float):
        _refuse(given)
    return str(item)


def _missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)


def _refuse(given: Any) -> NoReturn:
    raise ValueError(f"the options are {repr(given)[:80]}; expected a list of texts, or letters with their texts")


def from_string(text: str) -> tuple[Option, ...]:
    """Options of We-Math's one string, such as "A. 3, 5;B. 5, 3; E. No correct answer".

    A semicolon ends an option only where the next letter in order follows it with a text of its own: options hold
    semicolons ("A. ①; ③;B. ②; ③"), and the dataset's own cleaning put one before letters that are part of an option
    ("angle ∠AB;C.; C. There is no obtuse angle."). Where a letter has no semicolon before it ("A. 45° B. 60° ;C. 9°"),
    a blank does. Letters may be left out only where a semicolon comes before the next one.

    Returns:
      Letters in rising order; semicolons and blanks at an option's ends are dropped.

    Raises:
      ValueError: the string does not start with "A.", or holds a single option.
    """
    start = re.match(r"\s*A\s*[.．]", text)
    if start is None:
        raise ValueError(f"the options {text[:80]!r} do not start with 'A.'")
    marks = [("A", start.start(), start.end())]
    while True:
        letter, _, at = marks[-1]
        mark = _next_mark(text, LETTERS[LETTERS.index(letter) + 1 : 8], at)
        if mark is None:
            break
        marks.append(mark)
    if len(marks) < 2:
        raise ValueError(f"the options {text[:80]!r} hold nothing but A; expected 'A. ...; B. ...'")
    ends = [mark[1] for mark in marks[1:]] + [len(text)]
    return tuple(
        (letter, text[after:end].strip(" \t\r\n;；")) for (letter, _, after), end in zip(marks, ends, strict=True)
    )


def _next_mark(text: str, letters: str, at: int) -> tuple[str, int, int] | None:
    """The next option's letter, where its marker starts and where it ends."""
    for number, letter in enumerate(letters):
        match = re.compile(rf"[;；]\s*{letter}\s*[.．]{_EMPTY}").search(text, at)
        if match is None and number == 0:
            # Without a semicolon, and therefore only up to the semicolon of a later letter.
            later = re.compile(rf"[;；]\s*[{letters[1:] or '#'}]\s*[.．]{_EMPTY}").search(text, at)
            match = re.compile(rf"\s{letter}\s*[.．]{_EMPTY}").search(text, at, later.start() if later else len(text))
        if match is not None:
            return letter, match.start(), match.end()
    return None


def from_lines(text: str) -> tuple[str, tuple[Option, ...]]:
    """Question and options where each option starts a line, as "A. text", "(A) text" or "A) text".

    The options begin with a line that starts with A where the next one with a letter, A or B, starts with B; letters
    continue in order, and lines without the next letter belong to the option above them. Time linear in the text.

    Returns:
      The text above the options, and the options; no option where the text has none.
    """
    labels = [(match, match[1] or match[2]) for match in _AT_LINE.finditer(text)]
    starts = [number for number, (_, letter) in enumerate(labels) if letter in ("A", "B")]
    first = next(
        (one for one, two in zip(starts, starts[1:], strict=False) if (labels[one][1], labels[two][1]) == ("A", "B")),
        None,
    )
    if first is None:
        return text, ()
    marks = []
    for match, letter in labels[first:]:
        if len(marks) < 8 and letter == LETTERS[len(marks)]:
            marks.append(match)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    spans = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    options = tuple(zip(LETTERS, (" ".join(span.split()) for span in spans), strict=False))
    return text[: marks[0].start()].rstrip(), options


def letter_of(answer: str, options: Sequence[Option]) -> str:
    """The letter that an answer names, itself or by the text of exactly one option; else the answer unchanged."""
    answer = answer.strip()
    letters = [letter for letter, _ in options]
    bare = answer.strip("().")
    if bare in letters:
        return bare
    same = [letter for letter, text in options if text == answer]
    if len(same) == 1:
        return same[0]
    if not same and len(answer) > 1 and LETTERS.startswith("".join(letters)):  # "B. red", "\\boxed{B}"
        index = right_option(plain(answer), [text for _, text in options])
        return answer if index is None else letters[index]
    return answer
