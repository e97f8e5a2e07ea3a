"""Examples: a record as arrays of token ids, positions and image patches. One row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.images.preprocess import FramePatches, ImageLayout, ProcessorSettings, image_to_patches
from qwenla_jax.data.images.video import VideoPatches, video_to_patches
from qwenla_jax.data.record import Record
from qwenla_jax.text.conversation import Turn, Visual, build_conversation, encode_response
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.utils.unicode import half_character


@dataclass(frozen=True)
class Example:
    """One record on the host.

    Attributes:
      ids_T: int32, the prompt and, for supervised training, the response after it.
      pos_Tx3: int32, M-RoPE positions.
      visual_T: int32, index into the example's own visual tokens (of all its images, concatenated) where the id
        stands for one, else -1.
      frames: the rows of the tower: the images, then the steps of each video.
      prompt_length: tokens of the prompt; the response is `ids_T[prompt_length:]`.
      next_pos: position of the token after the last.
      record: the source's record, with the right answer.
    """

    ids_T: np.ndarray
    pos_Tx3: np.ndarray
    visual_T: np.ndarray
    frames: tuple[FramePatches, ...]
    prompt_length: int
    next_pos: int
    record: Record


def to_prompt_example(
    record: Record, tok: Tokenizer, settings: ProcessorSettings, layout: ImageLayout, system: str | None = None
) -> Example:
    """The prompt that a response is to be sampled for.

    Raises:
      ValueError: an image or a text cannot be used; the message names the record.
    """
    return _to_example(record, tok, settings, layout, system, with_response=False)


def to_sft_example(
    record: Record, tok: Tokenizer, settings: ProcessorSettings, layout: ImageLayout, system: str | None = None
) -> Example:
    """Prompt, response and, if it is complete, `<|im_end|>`, for training on the response.

    Paper silent on the loss of the prompt: none.

    Raises:
      ValueError: the record has no response, its response holds a control token, or an image or a text cannot be
        used; the message names the record.
    """
    return _to_example(record, tok, settings, layout, system, with_response=True)


def to_chat_example(
    turns: Sequence[tuple[str, Sequence[str | FramePatches]]], tok: Tokenizer, layout: ImageLayout, name: str
) -> Example:
    """The prompt of a conversation, for its next assistant turn.

    Args:
      turns: (role, texts and images in their order), oldest first; see `text.conversation.build_conversation`.
        Strings of special tokens stay ordinary text in all of them, an assistant's ten tags excepted.
      tok: the tokenizer, with all special tokens.
      layout: the vision tower's numbers.
      name: of the conversation, for errors.

    Raises:
      ValueError: the turns are in no order that a conversation has; the message names the turn.
    """
    frames = tuple(part for _, parts in turns for part in parts if not isinstance(part, str))
    parts = lambda content: [p if isinstance(p, str) else Visual(p.num_visual_tokens) for p in content]  # noqa: E731
    said = [Turn(role, parts(content)) for role, content in turns]
    ids = build_conversation(said, tok, control_as_text=True).ids
    record = Record(name, (), "", "", None, "chat")
    return _placed(ids, [], frames, [], tok, layout, record)


def _to_example(
    record: Record,
    tok: Tokenizer,
    settings: ProcessorSettings,
    layout: ImageLayout,
    system: str | None,
    with_response: bool,
) -> Example:
    try:
        system = system if record.system is None else record.system
        if with_response and record.response is None:
            raise ValueError("supervised training needs a response, but there is none")
        for name, text in (("system", system), ("question", record.question), ("response", record.response)):
            if (message := half_character(text or "")) is not None:
                raise ValueError(f"{name} {message}")
        frames = tuple(image_to_patches(image, settings, layout) for image in record.images)
        clips = [video_to_patches(clip.frames, clip.fps, settings, layout, clip.total_pixels) for clip in record.videos]
        visuals = [Visual(frame.num_visual_tokens) for frame in frames]
        visuals += [Visual(clip.num_visual_tokens, video=True) for clip in clips]
        turns = [] if system is None else [Turn("system", system)]
        prompt = build_conversation([*turns, Turn("user", [*visuals, record.question])], tok).ids
        response = []
        if with_response and record.response is not None:
            response = encode_response(record.response, tok, record.complete)
        return _placed(prompt, response, frames, clips, tok, layout, record)
    except ValueError as error:
        raise ValueError(f"record {record.id!r}: {error}") from error


def _placed(
    prompt: list[int],
    response: list[int],
    frames: tuple[FramePatches, ...],
    clips: list[VideoPatches],
    tok: Tokenizer,
    layout: ImageLayout,
    record: Record,
) -> Example:
    """Ids with their positions and visual tokens."""
    ids_T = np.array(prompt + response, np.int32)
    grids = [*((frame.rows, frame.cols) for frame in frames), *(clip.grid for clip in clips)]
    pos_Tx3, next_pos = visual_positions(ids_T, tok.ids.image_pad, tok.ids.video_pad, grids, layout.tokens_per_second)
    is_visual_T = (ids_T == tok.ids.image_pad) | (ids_T == tok.ids.video_pad)
    frames += tuple(step for clip in clips for step in clip.steps)
    visual_T = np.where(is_visual_T, np.cumsum(is_visual_T) - 1, -1).astype(np.int32)
    return Example(ids_T, pos_Tx3, visual_T, frames, len(prompt), next_pos, record)
