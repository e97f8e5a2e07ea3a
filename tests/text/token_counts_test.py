"""Tokens of reflections, against lists of tokens that stand between the tags' own."""

import numpy as np
import pytest

from qwenla_jax.text.response_format import parse
from qwenla_jax.text.token_counts import reflection_tokens, token_ends
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.weights.hub import EMBEDDED


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_folder(EMBEDDED).with_tags()


def test_generated_tokens_are_counted_and_not_those_of_the_text(tok):
    """Any tokens, whole characters or not: their number is what was put between the tags."""
    rng = np.random.default_rng(0)
    own = [index for index in range(tok.vocab_size) if "<" not in tok.decode([index])]
    again = 0
    for _ in range(117):
        ids, want = [], []
        for _ in range(rng.integers(0, 4)):
            inside = rng.choice(own, rng.integers(0, 20)).tolist()
            ids += [*rng.choice(own, 3).tolist(), tok.ids.reflection_open, *inside, tok.ids.reflection_close]
            want.append(len(inside))
        assert reflection_tokens(ids, tok) == tuple(want)
        again += [len(tok.encode_plain(s.text)) for s in parse(tok.decode(ids)).reflections] != want
    assert again > 50  # encoding the text again gives another number


def test_characters_of_several_tokens(tok):
    text = "é€😀 a"
    ids = tok.encode_plain(text)
    assert len(ids) > len(text) - 1  # bytes
    ends = token_ends(ids, tok)
    assert ends == sorted(ends) and ends[-1] == len(text)
    inside = [tok.ids.reflection_open, *ids, tok.ids.reflection_close]
    assert reflection_tokens(inside, tok) == (len(ids),)
    # Cut off within a character, before a tag.
    assert reflection_tokens([*inside[:3], tok.ids.reflection_close], tok) == (2,)


def test_tags_that_are_spelled_out(tok):
    opened, closed = tok.encode_plain("<REFLECTION>"), tok.encode_plain("</REFLECTION>")
    assert len(opened) > 1 and len(closed) > 1
    ids = [*opened, *tok.encode_plain("a"), *tok.encode_plain(" b"), *closed, *tok.encode_plain("c")]
    assert reflection_tokens(ids, tok) == (len(tok.encode_plain("a")) + len(tok.encode_plain(" b")),)
    assert reflection_tokens(ids[:-3], tok) == () == reflection_tokens([], tok)
