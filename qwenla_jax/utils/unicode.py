"""Text that no encoding can write: halves of characters, which JSON's escapes and command lines can hold."""

from __future__ import annotations


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds a lone surrogate; None where it is text.

    Args:
      text: any string.

    Returns:
      A clause that names the first one and what would be right.
    """
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        result = ascii(text[error.start])
        return f"holds half of a character ({result} at {error.start}); expected UTF-8 text"
    return None
