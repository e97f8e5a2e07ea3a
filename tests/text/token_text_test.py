"""Text of tokens that come part by part, and stop strings in it.

Oracle: `Tokenizer.decode` of all tokens so far, again and again.
"""

import random

import pytest

from qwenla_jax.text.token_text import StopSearch, TokenText
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.weights.hub import EMBEDDED

HALF = "\N{REPLACEMENT CHARACTER}"
PIECES = ("a red circle", "\u6c49\u5b57", "\U0001f642\U0001f469", "e\u0301\n", "<REFLECTION>", " </CAPTION>", HALF)


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_folder(EMBEDDED)


def random_tokens(rng, tok):
    """Of texts, some with tokens missing, so that bytes are no UTF-8; and tokens of all kinds by chance."""
    ids = [i for _ in range(rng.randrange(12)) for i in tok.encode(rng.choice(PIECES))]
    some_left = [i for i in ids if rng.random() > 0.1]
    some = [rng.randrange(tok.vocab_size + 3) for _ in range(rng.randrange(6))]
    return rng.choice((ids, some_left, some_left + some, some + ids))


def in_parts(rng, ids):
    while ids:
        size = rng.randrange(9)
        yield ids[:size], size >= len(ids)
        ids = ids[size:]


def test_parts_are_the_text_of_all_tokens(tok):
    rng, halves = random.Random(0), 0
    for _ in range(1000):
        ids, so_far, seen = random_tokens(rng, tok), "", []
        text = TokenText(tok.token_bytes, tok.ids.stop())
        for part, ended in in_parts(rng, ids):
            seen += [i for i in part if i not in tok.ids.stop()]
            so_far += text.add(part, ended)
            whole = tok.decode(seen)
            assert whole == so_far or (whole == so_far + HALF and not ended)
            halves += whole != so_far
    assert halves > 30


def test_the_first_stop_string_is_found_at_its_token(tok):
    """Some begin and end within tokens, some are a part of another, most cross the borders of tokens and parts."""
    rng, ended = random.Random(1), 0
    for _ in range(700):
        ids = [i for i in random_tokens(rng, tok) if i not in tok.ids.stop()]
        text, stops = tok.decode(ids), ["never"]
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(text) + 1)
            stops += [stop for stop in (text[start : start + rng.randrange(1, 9)],) if stop and HALF not in stop]
        has = lambda n: any(stop in tok.decode(ids[:n]) for stop in stops)  # noqa: B023, E731
        search, end, before = StopSearch(stops, TokenText(tok.token_bytes)), None, 0
        for part, _ in in_parts(rng, ids):
            if (end := search.end(part)) is not None:
                end += before
                break
            before += len(part)
        assert end == next((n for n in range(1, len(ids) + 1) if has(n)), None)
        ended += end is not None
    assert ended > 300
