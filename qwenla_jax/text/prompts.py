"""Questions and responses as token ids in Qwen2.5-VL's chat layout."""

from collections.abc import Sequence

from qwenla_jax.text.tokenizer import Tokenizer


def build_prompt(question: str, num_visual_tokens: Sequence[int], tok: Tokenizer, system: str | None) -> list[int]:
    """Ids of everything before the response: system turn, user turn with the pictures first, start of the answer.

    Args:
      question: the user's text; strings of special tokens in it stay ordinary text.
      num_visual_tokens: for each picture its visual tokens M after the merger, in the order of the pictures.
      tok: the tokenizer, with all special tokens.
      system: text of the system turn; None leaves the turn out (Qwen's own template would make one up).

    Returns:
      Ids; each picture is `<|vision_start|>`, M times `<|image_pad|>`, `<|vision_end|>`.

    Raises:
      ValueError: a picture has no visual token, or the tokenizer lacks a special token.
    """
    ids = tok.ids
    out: list[int] = []
    if system is not None:
        out += [ids.im_start, *tok.encode_plain(f"system\n{system}"), ids.im_end, *tok.encode_plain("\n")]
    out.append(ids.im_start)
    pictures: list[int] = []
    for i, num in enumerate(num_visual_tokens):
        if num < 1:
            raise ValueError(f"num_visual_tokens[{i}]={num}: expected at least 1 visual token a picture")
        pictures += [ids.vision_start, *[ids.image_pad] * num, ids.vision_end]
    if pictures:
        out += [*tok.encode_plain("user\n"), *pictures, *tok.encode_plain(question)]
    else:
        # One piece, because blanks at the start of the question would join the line break.
        out += tok.encode_plain(f"user\n{question}")
    out += [ids.im_end, *tok.encode_plain("\n"), ids.im_start, *tok.encode_plain("assistant\n")]
    return out


def encode_response(response: str, tok: Tokenizer) -> list[int]:
    """Ids of a response for training: its text, with the tags as single ids, and `<|im_end|>`.

    Raises:
      ValueError: the response has a vision token or a chat token in it, which no response may have.
    """
    ids = tok.ids
    out = tok.encode(response)
    banned = {*ids.forbidden(), *ids.stop(), ids.im_start}
    found = sorted({tok.decode([index]) for index in out if index in banned})
    if found:
        raise ValueError(f"a response may not contain {', '.join(found)}: {response[:80]!r}")
    return [*out, ids.im_end]
