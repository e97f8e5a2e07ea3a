"""The length study of a released model: its reasoning, made long, and what stands behind it in each arm.

A response is LEAD, N tokens of reasoning, what the arm inserts, OPENER and ANSWER; then the answer is generated. All of
it is one prompt, so every arm runs the same programs and differs in nothing but the inserted tokens. A released model
knows no `<REFLECTION>`: its reflection is opened in words.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwenla_jax.config.shared_options import MOST_PIXELS, ReattentionOptions
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.images.preprocess import FramePatches, image_to_patches, to_rgb
from qwenla_jax.data.record import Record
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sampler import Asked, Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.study.collect import StudyError
from qwenla_jax.text.tokenizer import Tokenizer

LEAD = "Let me think step by step.\n\n"  # of every response, so that ROUTE has attention to go by where N is 0
WAIT = "\n\nWait"  # in the place of an end that comes too early
OPENER = "\n\nWait, let me look at the image again.\n\n"
ANSWER = "So the final answer is \\boxed{"
CHUNK = 512  # tokens of reasoning between two checks for an early end
_FORM = "\nThink step by step, then put the final answer into \\boxed{}."
_LETTER = "\nThink step by step, then put the letter of the right option into \\boxed{}."


def asked(record: Record) -> Record:
    """The question with a line on the form of its answer.

    Raises:
      StudyError: it has not exactly one image, or has a video.
    """
    if len(record.images) != 1 or record.videos:
        got = f"{len(record.images)} image(s) and {len(record.videos)} video(s)"
        raise StudyError(f"record {record.id!r}: {got}; expected one image (in --source: #images=1)")
    return dataclasses.replace(record, question=record.question + (_LETTER if record.options else _FORM))


def without_tags(runtime: Runtime) -> Runtime:
    """The runtime, which samples none of the ten tags either: in a released model their rows are not trained."""
    ids, tok = runtime.tokenizer.ids, runtime.tokenizer
    never = (*ids.suppressed(), *ids.tags.values())
    bias_V = suppression_bias(runtime.model.config.text.vocab_size, tok.vocab_size, never)
    return dataclasses.replace(runtime, logit_bias_V=bias_V)


def reasoned(
    runtime: Runtime, params: Params, examples: Sequence[Example], numbers: Sequence[int], tokens: int, sampler: Sampler
) -> list[list[int]]:
    """The model's own reasoning, of exactly so many tokens a question.

    Where it ends too early, WAIT stands in the place of the end and it goes on (budget forcing as in s1, arXiv
    2501.19393). To forbid the end alone would have it continue with tokens that it holds for unlikely.

    Args:
      runtime, params: the model, see `without_tags`.
      examples: at most a batch of prompts.
      numbers: of the questions: randomness is a function of them.
      tokens: N.
      sampler: with one response a question; of so many tokens at once.
    """
    rows, tok = runtime.config.batch_size, runtime.tokenizer
    lead, wait, responses = tok.encode_plain(LEAD), tok.encode_plain(WAIT), [list[int]() for _ in examples]
    for turn in itertools.count():
        short = [i for i, ids in enumerate(responses) if len(ids) < tokens]
        if not short:
            return [ids[:tokens] for ids in responses]
        batch = [responded(examples[i], [*lead, *responses[i]], tok, runtime) for i in short]
        vision, prompts = runtime.collate_prompts(batch, sampler.buckets, rows)
        sample_B = np.zeros(rows, np.uint32)
        sample_B[: len(short)] = [numbers[i] for i in short]
        rollout = next(sampler.run(params, [Asked(vision, prompts, turn, sample_B, len(short))]))
        for row, i in enumerate(short):
            ids = rollout.ids_BxR[row, : rollout.length_B[row]].tolist()
            responses[i] += [*ids[:-1], *wait] if rollout.stopped_B[row] else ids
    raise AssertionError  # the loop has no end


def filler(tok: Tokenizer, tokens: int) -> list[int]:
    """So many tokens of text that tells nothing of any question: the control of the reasoning."""
    text, line = "", 0
    while len(ids := tok.encode_plain(text)) < tokens:
        for _ in range(64):
            line += 1
            text += f"Line {line} of this text says nothing about the image or the question.\n"
    return ids[:tokens]


def responded(
    example: Example,
    response: Sequence[int],
    tok: Tokenizer,
    runtime: Runtime,
    reattention: ReattentionOptions | None = None,
    control: FramePatches | None = None,
    selected_M: np.ndarray | None = None,
    after: Sequence[int] = (),
) -> Example:
    """A prompt with a part of its response, as a prompt that is to be continued.

    Positions are those of Qwen2.5-VL's rule for a further image; of a selection they stay those of the whole image.

    Args:
      example: a prompt with one image.
      response: ids before the insertion.
      tok, runtime: tokenizer, and the layout of images.
      reattention: the arm's; with mode "none" or None nothing is inserted.
      control: what is shown in the image's place, of its grid; None: the image itself.
      selected_M: bool, the visual tokens that are shown; None: all.
      after: ids after the insertion.
    """
    (image,), ids = example.frames, tok.ids
    M, inserts = image.num_visual_tokens, reattention is not None and reattention.mode != "none"
    block = [ids.vision_start, *[ids.image_pad] * M, ids.vision_end] if inserts else []
    ids_T = np.concatenate([example.ids_T, response, block, after]).astype(np.int32)
    grids = [(image.rows, image.cols)] * (2 if inserts else 1)
    layout = runtime.layout
    pos_Tx3, next_pos = visual_positions(ids_T, ids.image_pad, ids.video_pad, grids, layout.tokens_per_second)
    at = np.flatnonzero(ids_T == ids.image_pad)
    visual_T, present_T = np.full(len(ids_T), -1, np.int32), np.ones(len(ids_T), bool)
    visual_T[at[:M]] = np.arange(M)
    if inserts:
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
    """What is shown in an image's place, as many visual tokens as it has; None: the image itself.

    Args:
      content: of `ReattentionOptions`: image, blank or other.
      image: the question's image.
      other: another question's image, which is resized to the grid of this one.
      runtime: image processor and layout.

    Raises:
      ValueError: another content, or no other image.
    """
    if content == "image":
        return None
    if content == "blank":  # patches are normalized: zero is the processor's mean
        return dataclasses.replace(image, patches_SxC=np.zeros_like(image.patches_SxC))
    if content != "other" or other is None:
        raise ValueError(f"content: got {content!r} with other image {other}; expected image, blank, or other with one")
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
