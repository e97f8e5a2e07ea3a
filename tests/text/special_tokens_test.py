"""Special tokens against the released tokenizer's ids and the ten tags written out by hand."""

import pickle

import pytest

from qwenla_jax.text import special_tokens as st
from qwenla_jax.text.special_tokens import TokenIds


class Lookup:
    """A tokenizer of nothing but special tokens, with ids by hand."""

    def __init__(self, tokens):
        self.tokens = tokens

    def token_to_id(self, token):
        return self.tokens.get(token)


CONTROL = {
    "<|endoftext|>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<|vision_start|>": 4,
    "<|vision_end|>": 5, "<|vision_pad|>": 6, "<|image_pad|>": 7, "<|video_pad|>": 8,
}  # fmt: skip
TAGS = {
    "<SUMMARY>": 20, "</SUMMARY>": 21, "<CAPTION>": 22, "</CAPTION>": 23, "<REASONING>": 24, "</REASONING>": 25,
    "<CONCLUSION>": 26, "</CONCLUSION>": 27, "<REFLECTION>": 28, "</REFLECTION>": 29,
}  # fmt: skip


def test_the_tags_are_the_papers():
    assert st.TAGS == tuple(TAGS) and st.TAGS == (*st.SECTION_TAGS, st.REFLECTION_OPEN, st.REFLECTION_CLOSE)


def test_ids_by_hand():
    ids = TokenIds.from_tokenizer(Lookup(CONTROL | TAGS))
    assert ids == TokenIds(1, 2, 3, 4, 5, 6, 7, 8, tags=TAGS)
    assert sorted(ids.suppressed()) == [4, 5, 6, 7, 8]
    assert ids.stop() == (3, 1)
    assert (ids.reflection_open, ids.reflection_close) == (28, 29)
    assert pickle.loads(pickle.dumps(ids)) == ids and hash(ids) == hash(pickle.loads(pickle.dumps(ids)))


@pytest.mark.parametrize("token", [*CONTROL, *TAGS])
def test_a_missing_token_is_named(token):
    tokens = CONTROL | TAGS
    del tokens[token]
    with pytest.raises(ValueError) as message:
        TokenIds.from_tokenizer(Lookup(tokens))
    named = [other for other in CONTROL | TAGS if f" {other} " in f" {str(message.value).replace(',', ' ')} "]
    assert named == [token]
    # Adding the tags helps only where nothing but tags is missing.
    assert ("with_tags" in str(message.value)) == (token in TAGS)


def test_id_zero_is_an_id():
    ids = TokenIds.from_tokenizer(Lookup(CONTROL | TAGS | {"<|endoftext|>": 0}))
    assert ids.endoftext == 0


def test_order_of_the_released_tokenizer(shared_data):
    import json

    added = json.loads((shared_data / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    added = sorted(added, key=lambda token: token["id"])
    assert tuple(token["content"] for token in added if token["special"]) == st.QWEN_CONTROL_TOKENS
    assert tuple(token["content"] for token in added if not token["special"]) == st.QWEN_TEXT_TOKENS
