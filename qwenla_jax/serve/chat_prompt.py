"""The messages of a request as a prompt."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from qwenla_jax.config.shared_options import MOST_TOKENS
from qwenla_jax.data.batching.example import Example, to_chat_example
from qwenla_jax.data.datasets.rows import from_base64
from qwenla_jax.data.images.decode import open_image
from qwenla_jax.data.images.preprocess import FramePatches, ImageLayout, ProcessorSettings, image_to_patches
from qwenla_jax.serve.protocol import invalid
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.utils.unicode import half_character

MAX_PIXELS = 50_000_000  # of an image as it arrives: about 0.15 GB as RGB
_COMPOSED = 4  # most characters that are one in NFC, which the tokenizer converts texts to
_ROLES = MappingProxyType({"system": "system", "developer": "system", "user": "user", "assistant": "assistant"})
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")  # PNG, JPEG, WebP
_EXPECTED = "a data URL (data:image/png;base64,...) of a PNG, JPEG or WebP"


def to_example(
    messages: list[Any],
    tok: Tokenizer,
    processor: ProcessorSettings,
    layout: ImageLayout,
    max_images: int,
    max_tokens: int = MOST_TOKENS,
) -> Example:
    """The prompt of a conversation. Each image is cut to patches before the next is decoded.

    Args:
      messages: of role system (or developer), user, assistant; content is a text or a list of parts of type text and,
        in a user's message, image_url.
      tok, processor, layout: see `data.batching.example`.
      max_images: of all messages together.
      max_tokens: texts that cannot be so few tokens are refused before they are tokenized, which takes long.

    Raises:
      ApiError: 400; it names the message.
    """
    turns: list[tuple[str, list[str | FramePatches]]] = []
    images = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(where, f"expected an object with a role of {', '.join(_ROLES)}")
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        parts: list[str | FramePatches] = []
        for place, part in enumerate([content] if isinstance(content, str) else _parts(content, where)):
            at = f"{where}.content[{place}]"
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                parts.append(_text(part.get("text"), at))
            elif kind == "image_url" and role == "user":
                images += 1
                if images > max_images:
                    raise invalid(
                        "messages", f"more than {max_images} images; send fewer, or raise limit-mm-per-prompt"
                    )
                parts.append(_image(part.get("image_url"), at, processor, layout))
            else:
                raise invalid(at, "expected an object of type text or, from a user, image_url")
        turns.append((_ROLES[role], parts))
    characters = sum(len(part) for _, parts in turns for part in parts if isinstance(part, str))
    if characters > _COMPOSED * tok.longest_token * max_tokens:
        message = f"the prompt has {characters} characters, which are more than {max_tokens} tokens"
        raise invalid("messages", message, "context_length_exceeded")
    try:
        return to_chat_example(turns, tok, layout, "messages")
    except ValueError as error:
        raise invalid("messages", str(error)) from error


def _parts(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise invalid(f"{where}.content", "expected a text or a list of parts")
    return content


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise invalid(where, "expected a text")
    if (message := half_character(text)) is not None:
        raise invalid(where, f"it {message}")
    return text


def _image(value: Any, where: str, processor: ProcessorSettings, layout: ImageLayout) -> FramePatches:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise invalid(where, f"expected {_EXPECTED}; nothing is fetched")
    try:
        data = from_base64(url, where)
        if not data.startswith(_STARTS):
            raise invalid(where, f"expected {_EXPECTED}")
        return image_to_patches(open_image(data, where, MAX_PIXELS), processor, layout)
    except ValueError as error:
        raise invalid(where, str(error).removeprefix(f"{where}: "), "invalid_image") from error
