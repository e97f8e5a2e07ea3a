r"""Answers of several parts: tuples, intervals, sets and lists.

Paper silent. The order of the parts counts, except where the right answer is a set in braces. Brackets count: (1, 2],
[1, 2) and [1, 2] are three different things, and a set is no pair. Parts without brackets are taken for a pair or for
a set, and the other way round. Texts are those of `normalize.plain`.
"""

import re
from collections.abc import Callable

_MAX_PARTS = 64
_OPEN, _CLOSE = "([{", ")]}"
_AND = re.compile(r",? and ")


def parts(text: str) -> tuple[str, tuple[str, ...]] | None:
    """The brackets and the parts of a text: "(1, 2]" is ("(]", ("1", "2")), "1, 2" is ("", ("1", "2")).

    None where it has one part only, is no list, or has more than 64 parts.
    """
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    brackets = ""
    if len(text) > 2 and text[0] in _OPEN and text[-1] in _CLOSE and _closing(text) == len(text) - 1:
        brackets, text = text[0] + text[-1], text[1:-1]
    result = _split(_AND.sub(", ", text))
    if result is None or not 1 < len(result) <= _MAX_PARTS or not all(result):
        return None
    return brackets, result


def same_parts(got: str, want: str, same: Callable[[str, str], bool]) -> bool:
    """Whether both are lists of the same parts; `want` is the right answer, and `same` compares two parts."""
    first, second = parts(got), parts(want)
    if first is None or second is None:
        return False
    if first[0] != second[0] and (first[0] + second[0] not in ("()", "{}") or first[0] and second[0]):
        return False
    if second[0] == "{}":
        table = [[same(part, other) for other in second[1]] for part in first[1]]
        return all(map(any, table)) and all(map(any, zip(*table, strict=True)))
    return len(first[1]) == len(second[1]) and all(map(same, first[1], second[1]))


def _split(text: str) -> tuple[str, ...] | None:
    """The text cut at its commas, or its semicolons, outside brackets; None where the brackets do not match."""
    mark = ";" if ";" in text else ","
    result, start, depth = [], 0, 0
    for position, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            if depth < 0:
                return None
        elif character == mark and depth == 0:
            result.append(text[start:position].strip())
            start = position + 1
    return None if depth else (*result, text[start:].strip())


def _closing(text: str) -> int:
    """Where the bracket that the text begins with is closed; -1 where it is not. Kinds may differ: (1, 2]."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return position
    return -1
