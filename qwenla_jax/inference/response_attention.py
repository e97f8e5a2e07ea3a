"""One response run once more: what its insertions show, and the attention of every token on the images."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from qwenla_jax.data.batching.example import Example
from qwenla_jax.inference.answer import Insertion, SelectedTokens, VisualAttention
from qwenla_jax.inference.attention_mass import attention_mass
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import Array, PromptBatch, Rollout, VisionBatch
from qwenla_jax.weights.hf import Checkpoint


class ResponseAttention(NamedTuple):
    """Attention of each response token as the query, the mean over layers and heads: float32.

    Attributes:
      original_R, inserted_R: received by the visual tokens of the prompt, and by those of all insertions together.
      even_original_R, even_inserted_R: what they would receive of evenly spread attention.
      original_RxP, inserted_RxP: received by each slot of the prompt, and by its visual token where insertions show it.
    """

    original_R: Array
    inserted_R: Array
    even_original_R: Array
    even_inserted_R: Array
    original_RxP: Array
    inserted_RxP: Array


def attention_of(
    checkpoint: Checkpoint,
    reattention: ReattentionConfig,
    vision: VisionBatch,
    prompts: PromptBatch,
    rollout: Rollout,
) -> ResponseAttention:
    """Runs a response with its insertions once more.

    Compiled programs are cached by the static options and the shapes; the response is padded to few lengths.

    Args:
      checkpoint: the model.
      reattention: as the response was sampled with. A server passes the same one, `by_row`, with as many
        `max_insertions` as there were, for any mode and kept share.
      vision, prompts, rollout: of one question, with one response.

    Returns:
      numpy arrays; R are the response's tokens.
    """
    turns, length = int(rollout.inserted_B[0]), int(rollout.length_B[0])
    padded_BxR = np.zeros((1, power_of_two(length, 64)), np.int32)
    padded_BxR[0, :length] = rollout.ids_BxR[0, :length]
    selected_BxExX = None
    if reattention.inserts:
        assert prompts.block is not None  # there was an insertion
        selected_BxExX = rollout.selected_BxExX[:, : power_of_two(turns), : prompts.block.source_QxX.shape[1]]
    received = _run(
        checkpoint.config,
        reattention,
        checkpoint.params,
        vision,
        prompts,
        padded_BxR,
        rollout.length_B,
        selected_BxExX,
    )
    return jax.tree.map(lambda x: x[:length], jax.device_get(received))


# JAX caches compiled programs by the static arguments: the model's configuration and the options, compared by value.
@functools.partial(jax.jit, static_argnames=("config", "reattention"))
def _run(
    config: ModelConfig,
    reattention: ReattentionConfig,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    length_B: jax.Array,
    selected_BxExX: jax.Array | None,
) -> ResponseAttention:
    mass = attention_mass(QwenVL(config), params, vision, prompts, ids_BxR, length_B, reattention, selected_BxExX)
    return ResponseAttention(
        mass.original_BxR[0],
        mass.inserted_BxExR[0].sum(0),
        mass.even_original_BxR[0],
        mass.even_inserted_BxExR[0].sum(0),
        mass.image_BxRxP[0],
        mass.again_BxRxP[0],
    )


def insertions_of(
    attention: ResponseAttention,
    tok: Tokenizer,
    vision: VisionBatch,
    prompts: PromptBatch,
    rollout: Rollout,
    example: Example,
) -> list[Insertion]:
    """The insertions of a response with their cells and attention.

    Args:
      attention: of the response.
      tok: the tokenizer, with the tags.
      vision, prompts, rollout: of one question, with one response.
      example: the question.
    """
    turns, length = int(rollout.inserted_B[0]), int(rollout.length_B[0])
    ids_R = rollout.ids_BxR[0, :length]
    open_R = np.flatnonzero(ids_R == tok.ids.reflection_open)
    close_R = np.flatnonzero(ids_R == tok.ids.reflection_close)
    received = attention[:4]

    def mean(first: int, end: int) -> VisualAttention:
        return VisualAttention(*(float(values_R[first:end].mean()) for values_R in received))

    insertions = []
    since = 0
    for turn, position in enumerate(open_R[:turns].tolist()):
        ends = [length, *(close_R[close_R > position] + 1)[:1], *open_R[open_R > position][:1]]
        insertions.append(
            Insertion(
                position=position,
                offset=len(tok.decode(ids_R[:position].tolist())),
                images=selected_cells(rollout.selected_BxExX[0, turn], vision, prompts, example),
                before=mean(since, position) if position > since else None,
                after=mean(position, min(ends)),
            )
        )
        since = position
    return insertions


def selected_cells(
    selected_X: np.ndarray, vision: VisionBatch, prompts: PromptBatch, example: Example
) -> tuple[SelectedTokens, ...]:
    """The selected slots of an insertion (bool [X], see `Rollout.selected_BxExX`) as cells of the images' grids."""
    assert prompts.block is not None
    token_X = prompts.visual_QxP[0, prompts.block.source_QxX[0, np.flatnonzero(selected_X)]]
    number_X, cell_X = np.divmod(token_X[token_X >= 0], vision.gather_IxM.shape[1])  # delimiters are no visual tokens
    selected = []
    for number, frame in enumerate(example.frames):
        cells = sorted(cell_X[number_X == number].tolist())
        positions = tuple(divmod(cell, frame.cols) for cell in cells)
        selected.append(SelectedTokens(number, frame.rows, frame.cols, positions))
    return tuple(selected)


def selected_slots(
    cells: Sequence[Collection[tuple[int, int]]], vision: VisionBatch, prompts: PromptBatch, example: Example
) -> np.ndarray:
    """The slots of an insertion that shows these (row, col) of each image, delimiters included: bool [X].

    It is the inverse of `selected_cells`.
    """
    assert prompts.block is not None
    source_X, most = prompts.block.source_QxX[0], vision.gather_IxM.shape[1]
    token_X = prompts.visual_QxP[0, np.maximum(source_X, 0)]
    shown = [
        number * most + row * frame.cols + col
        for number, (frame, chosen) in enumerate(zip(example.frames, cells, strict=True))
        for row, col in chosen
    ]
    return (source_X >= 0) & ((token_X < 0) | np.isin(token_X, shown))


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()
