"""The special tokens: Qwen's control tokens and the ten tags of the answer format, and nowhere else any ids."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VISION_PAD = "<|vision_pad|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

# Qwen2.5's added tokens in the order of their ids. The first fourteen are special (control) tokens, the rest are
# ordinary text to a decoder that skips special tokens.
_GROUNDING = tuple(f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad") for end in ("start", "end"))
_VISION = (VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD)
QWEN_CONTROL_TOKENS: tuple[str, ...] = (ENDOFTEXT, IM_START, IM_END, *_GROUNDING, *_VISION)
_CODE = tuple(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"))
QWEN_TEXT_TOKENS: tuple[str, ...] = ("<tool_call>", "</tool_call>", *_CODE)

# Paper, the answer format: four sections in this order, and reflections anywhere between or after them.
SECTION_NAMES: tuple[str, ...] = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
REFLECTION_NAME = "REFLECTION"
SECTION_TAGS: tuple[str, ...] = tuple(tag for name in SECTION_NAMES for tag in (f"<{name}>", f"</{name}>"))
REFLECTION_OPEN = f"<{REFLECTION_NAME}>"
REFLECTION_CLOSE = f"</{REFLECTION_NAME}>"
TAGS: tuple[str, ...] = (*SECTION_TAGS, REFLECTION_OPEN, REFLECTION_CLOSE)


class TokenLookup(Protocol):
    """Anything that maps a token's string to its id."""

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None where there is no such token."""


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens in one tokenizer.

    Attributes:
      endoftext, im_start, im_end: end of a document, start and end of a chat turn.
      vision_start, vision_end, vision_pad, image_pad, video_pad: the vision tokens; `image_pad` is the placeholder
        which the visual embeddings replace.
      tags: each of the ten tag strings of the answer format -> its id.
    """

    endoftext: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    vision_pad: int
    image_pad: int
    video_pad: int
    tags: Mapping[str, int] = field(hash=False)

    @classmethod
    def from_tokenizer(cls, tok: TokenLookup) -> "TokenIds":
        """Reads the ids from a tokenizer.

        Raises:
          ValueError: tokens are missing; the message names each of them.
        """
        control = (ENDOFTEXT, IM_START, IM_END, *_VISION)
        ids = {token: tok.token_to_id(token) for token in (*control, *TAGS)}
        if missing := [token for token, index in ids.items() if index is None]:
            hint = "; Tokenizer.with_tags() adds the tags" if set(missing) <= set(TAGS) else ""
            raise ValueError(f"the tokenizer lacks {', '.join(missing)} as single tokens{hint}")
        known = {token: index for token, index in ids.items() if index is not None}
        return cls(*(known[token] for token in control), tags={tag: known[tag] for tag in TAGS})

    @property
    def reflection_open(self) -> int:
        """The id of `<REFLECTION>`."""
        return self.tags[REFLECTION_OPEN]

    @property
    def reflection_close(self) -> int:
        """The id of `</REFLECTION>`."""
        return self.tags[REFLECTION_CLOSE]

    def suppressed(self) -> tuple[int, ...]:
        """The vision tokens, which can never be sampled: a sampled placeholder would have no image behind it."""
        return (self.vision_start, self.vision_end, self.vision_pad, self.image_pad, self.video_pad)

    def stop(self) -> tuple[int, int]:
        """The tokens which end a response: (im_end, endoftext)."""
        return (self.im_end, self.endoftext)
