"""A prompt with a given part of its response and what an arm inserts there, as one prompt that is to be continued.

So every arm runs the same programs, and differs in nothing but the inserted tokens. Paper silent: it gives nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwenla_jax.config.shared_options import MOST_PIXELS, ReattentionOptions
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.images.preprocess import FramePatches, image_to_patches, to_rgb
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.reattention.options import TEXT_ONLY
from qwenla_jax.text.tokenizer import Tokenizer


def responded(
    example: Example,
    response: Sequence[int],
    tok: Tokenizer,
    runtime: Runtime,
    reattention: ReattentionOptions = TEXT_ONLY,
    control: FramePatches | None = None,
    selected_M: np.ndarray | None = None,
    after: Sequence[int] = (),
) -> Example:
    """A prompt with a part of its response, as a prompt that is to be continued.

    Positions are those of Qwen2.5-VL's rule for a further image; of a selection they stay those of the whole image.

    Args:
      example: a prompt with one image; whatever stands behind `prompt_length` is left out.
      response: ids before the insertion.
      tok, runtime: tokenizer, and the layout of images.
      reattention: the arm's; with mode "none" nothing is inserted.
      control: what is shown in the image's place, of its grid; None: the image itself.
      selected_M: bool, the visual tokens that are shown; None: all.
      after: ids after the insertion.
    """
    (image,), ids = example.frames, tok.ids
    M, inserts = image.num_visual_tokens, reattention.mode != "none"
    block = [ids.vision_start, *[ids.image_pad] * M, ids.vision_end] if inserts else []
    ids_T = np.concatenate([example.ids_T[: example.prompt_length], response, block, after]).astype(np.int32)
    grids = [(image.rows, image.cols)] * (2 if inserts else 1)
    layout = runtime.layout
    pos_Tx3, next_pos = visual_positions(ids_T, ids.image_pad, ids.video_pad, grids, layout.tokens_per_second)
    at = np.flatnonzero(ids_T == ids.image_pad)
    visual_T, present_T = np.full(len(ids_T), -1, np.int32), np.ones(len(ids_T), bool)
    visual_T[at[:M]] = np.arange(M)
    if inserts:
        if reattention.content != "pause":  # which is the image token's own embedding
            visual_T[at[M:]] = np.arange(M) + (0 if control is None else M)
        present_T[at[M:]] = True if selected_M is None else selected_M
    return dataclasses.replace(
        example,
        ids_T=ids_T[present_T],
        pos_Tx3=pos_Tx3[present_T],
        visual_T=visual_T[present_T],
        frames=(image,) if control is None else (image, control),
        prompt_length=int(present_T.sum()),
        next_pos=next_pos,
    )


def control_frame(
    content: str, image: FramePatches, other: Image.Image | None, runtime: Runtime
) -> FramePatches | None:
    """What is shown in an image's place, as many visual tokens as it has; None: the image itself, or no image.

    Args:
      content: of `ReattentionOptions`.
      image: the question's image.
      other: another question's image, which is resized to the grid of this one.
      runtime: image processor and layout.

    Raises:
      ValueError: another content, or content "other" without its image.
    """
    if content in ("image", "pause"):
        return None
    if content == "blank":  # patches are normalized: zero is the processor's mean
        return dataclasses.replace(image, patches_SxC=np.zeros_like(image.patches_SxC))
    if content != "other" or other is None:
        raise ValueError(
            f"content: got {content!r} with other image {other}; expected image, pause, blank, or other with one"
        )
    side = runtime.layout.token_pixels
    # Of the right size already; the bounds would change that of an image which their rounding lets exceed them.
    unbounded = dataclasses.replace(runtime.processor, min_pixels=1, max_pixels=MOST_PIXELS)
    resample = Image.Resampling(unbounded.resample)
    resized = to_rgb(other).resize((image.cols * side, image.rows * side), resample)
    return image_to_patches(resized, unbounded, runtime.layout)


def shown(example: Example, prompt_tokens: int) -> tuple[int, str]:
    """What stands behind a prompt's end, from the example itself: inserted tokens, and which image they show.

    Args:
      example: of `responded`.
      prompt_tokens: tokens of the question.

    Returns:
      visual tokens and delimiters; "own", "blank", "other", or "nothing".
    """
    visual_T = example.visual_T[prompt_tokens:]
    at = np.flatnonzero(visual_T >= 0)
    if not len(at):
        return 0, "nothing"
    image, frame = example.frames[0], example.frames[int(visual_T[at[0]]) // example.frames[0].num_visual_tokens]
    same = np.array_equal(frame.patches_SxC, image.patches_SxC)
    return len(at) + 2, "own" if same else "other" if frame.patches_SxC.any() else "blank"
