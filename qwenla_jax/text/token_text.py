"""The text of tokens as they come, and where it first contains a stop string. Each token is decoded once."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence


class TokenText:
    """Decodes tokens that come part by part: the parts, joined, are what `Tokenizer.decode` gives for all of them.

    Args:
      token_bytes: the bytes of a token, see `Tokenizer.token_bytes`.
      left_out: tokens that add nothing to the text, as stop tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], left_out: Collection[int] = ()) -> None:
        self._bytes, self._left_out = token_bytes, left_out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int], ended: bool = False) -> str:
        """What the tokens add. A character that is cut in two comes with its last byte; U+FFFD if the text `ended`."""
        return self._decoder.decode(b"".join(self._bytes(i) for i in ids if i not in self._left_out), ended)


class StopSearch:
    """Finds the first token after which a text contains one of some stop strings.

    Args:
      stops: the strings, none empty.
      text: of the tokens; nothing has been added to it.
    """

    def __init__(self, stops: Sequence[str], text: TokenText) -> None:
        self._stops, self._text, self._tail = stops, text, ""
        self._overlap = max(map(len, stops)) - 1  # characters before a token that may begin a string that it completes

    def end(self, ids: Sequence[int]) -> int | None:
        """Adds tokens; the number of those up to the end of a stop string, None where there is none."""
        for number, token in enumerate(ids, 1):
            text = self._tail + self._text.add([token])
            if any(stop in text for stop in self._stops):
                return number
            self._tail = text[max(len(text) - self._overlap, 0) :]
        return None
