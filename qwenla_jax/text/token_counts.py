"""Tokens of the parts of a generated text: those that were generated, which encoding the text again need not give."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from qwenla_jax.text.response_format import parse
from qwenla_jax.text.tokenizer import Tokenizer


def token_ends(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """How many characters the text of `ids` has up to and with each token.

    Tokens that are no whole characters, next to each other, all end where the last of them does.
    """
    ends: list[int] = []
    at, invalid = 0, []
    for index in ids:
        piece = tokenizer.decode([index])
        if "\ufffd" in piece:
            invalid.append(index)
            continue
        if invalid:  # a whole character cannot complete them
            at += len(tokenizer.decode(invalid))
            ends += [at] * len(invalid)
            invalid = []
        at += len(piece)
        ends.append(at)
    return ends + [at + len(tokenizer.decode(invalid))] * len(invalid)


def reflection_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Number of tokens in each reflection of a response without its stop token; the reflection's tags are excluded.

    In the order of `response_format.parse(text).reflections`. A tag may be spelled by several tokens; one that holds a
    part of the closing tag is not counted.
    """
    reflections = parse(tokenizer.decode(ids)).reflections
    if not reflections:
        return ()
    ends, counts = token_ends(ids, tokenizer), []
    for section in reflections:
        last = section.end - len(f"</{section.name}>")
        counts.append(bisect_right(ends, last) - bisect_right(ends, last - len(section.text)))
    return tuple(counts)
