"""Questions and responses as token ids in Qwen2.5-VL's chat layout."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from qwenla_jax.text.tag_pieces import split_tags
from qwenla_jax.text.tokenizer import Tokenizer


def build_prompt(question: str, num_visual_tokens: Sequence[int], tok: Tokenizer, system: str | None) -> list[int]:
    """Ids of everything before the response: system turn, user turn with the images first, start of the answer.

    Args:
      question: the user's text; strings of special tokens in it stay ordinary text.
      num_visual_tokens: for each image its visual tokens M after the merger, in the order of the images.
      tok: the tokenizer, with all special tokens.
      system: text of the system turn; None leaves the turn out (Qwen's own template would make one up).

    Returns:
      Ids; each image is `<|vision_start|>`, M times `<|image_pad|>`, `<|vision_end|>`.

    Raises:
      ValueError: an image has no visual token, or the tokenizer lacks a special token.
    """
    for i, num in enumerate(num_visual_tokens):
        if num < 1:
            raise ValueError(f"num_visual_tokens[{i}]={num}: expected at least 1 visual token an image")
    turns = [] if system is None else [Turn("system", system)]
    return build_conversation([*turns, Turn("user", [*map(Visual, num_visual_tokens), question])], tok).ids


def encode_response(response: str, tok: Tokenizer, complete: bool = True) -> list[int]:
    """Ids of a response for training: its text, with the tags as single ids, and `<|im_end|>` if it is complete.

    Raises:
      ValueError: the response has a vision token or a chat token in it, which no response may have.
    """
    ids = tok.ids
    out = tok.encode(response)
    banned = {*ids.suppressed(), *ids.stop(), ids.im_start}
    result = sorted({tok.decode([index]) for index in out if index in banned})
    if result:
        raise ValueError(f"a response may not contain {', '.join(result)}: {response[:80]!r}")
    return [*out, ids.im_end] if complete else out


@dataclass(frozen=True)
class Visual:
    """An image or a video at its place in a turn: its visual tokens after the merger, a video's those of all steps."""

    num_tokens: int
    video: bool = False


@dataclass(frozen=True)
class Turn:
    """What "system", "user" or "assistant" says: a text, or texts, images and videos in their order."""

    role: str
    content: str | Sequence[str | Visual]


@dataclass(frozen=True)
class Conversation:
    """Turns as ids.

    Attributes:
      ids: all of them.
      responses: (start, end) in `ids` of what each assistant turn says, its `<|im_end|>` included: what may be trained
        on. A line break at the very start of a response that the tokenizer joins with the layout's stays outside.
    """

    ids: list[int]
    responses: list[tuple[int, int]]


def build_conversation(
    turns: Sequence[Turn],
    tok: Tokenizer,
    *,
    open_answer: bool = True,
    number_visuals: bool = False,
    control_as_text: bool = False,
) -> Conversation:
    """Ids of several turns, equal to those of the text that Qwen2.5-VL's chat template renders.

    Only two things differ from the template. It makes up a system turn ("You are a helpful assistant.") where the
    first turn is none; here a conversation has the system turn it is given. And strings of special tokens in system
    and user turns stay ordinary text.

    Args:
      turns: the turns, oldest first.
      tok: the tokenizer, with all special tokens.
      open_answer: end with the start of an assistant turn (the template's `add_generation_prompt`).
      number_visuals: write "Picture 1: ", "Video 1: " before each (the template's `add_vision_id`).
      control_as_text: strings of control tokens in assistant turns stay ordinary text too; only the ten tags are tokens
        there.

    Raises:
      ValueError: no turn, an unknown role, a system turn that is not the first, a visual without a token, or
        (unless `control_as_text`) an assistant turn with a control token in it; the message names the turn.
    """
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    ids, out = tok.ids, []
    responses: list[tuple[int, int]] = []
    seen = {False: 0, True: 0}
    for number, turn in enumerate(turns):
        where = f"turns[{number}]"
        if turn.role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: role is {turn.role!r}; expected 'system', 'user' or 'assistant'")
        if turn.role == "system" and number:
            raise ValueError(f"{where}: a system turn can only be the first")
        say = functools.partial(_say, turn.role, tok=tok, control_as_text=control_as_text)
        out.append(ids.im_start)
        start = len(out) + len(tok.encode_plain(f"{turn.role}\n"))
        # Adjacent texts are one piece to the tokenizer, since blanks at the start of one join the role's line break.
        text = f"{turn.role}\n"
        for part in [turn.content] if isinstance(turn.content, str) else turn.content:
            if isinstance(part, str):
                text += part
                continue
            if part.num_tokens < 1:
                raise ValueError(f"{where}: a visual has {part.num_tokens} tokens; expected at least 1")
            seen[part.video] += 1
            if number_visuals:
                text += f"{'Video' if part.video else 'Picture'} {seen[part.video]}: "
            pad = ids.video_pad if part.video else ids.image_pad
            out += [*say(text, where), ids.vision_start, *[pad] * part.num_tokens, ids.vision_end]
            text = ""
        out += [*say(text, where), ids.im_end]
        if turn.role == "assistant":
            responses.append((start, len(out)))
        out += tok.encode_plain("\n")
    if open_answer:
        out += [ids.im_start, *tok.encode_plain("assistant\n")]
    return Conversation(out, responses)


def _say(role: str, text: str, where: str, tok: Tokenizer, control_as_text: bool) -> list[int]:
    """Ids of a piece of a turn's text; only the assistant's tags are tokens of their own."""
    if role != "assistant":
        return tok.encode_plain(text)
    if control_as_text:
        pieces, tags = split_tags(text), tok.ids.tags
        return [i for n, piece in enumerate(pieces) for i in ([tags[piece]] if n % 2 else tok.encode_plain(piece))]
    try:
        return encode_response(text, tok)[:-1]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
