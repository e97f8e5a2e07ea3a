"""Text that no encoding can write: halves of characters, which JSON's escapes and command lines can hold."""

from __future__ import annotations


def half_character(text: str) -> str | None:
    """A clause on the first lone surrogate in a text and on what would be right; None where it holds none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        result = ascii(text[error.start])
        return f"holds half of a character ({result} at {error.start}); expected UTF-8 text"
    return None
