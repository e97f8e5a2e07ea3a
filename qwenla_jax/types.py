"""The values that pass between the package's parts: frozen structs of arrays.

Axis letters: B rows, T tokens, S slots, D width, N query heads, K key/value heads, H head size, V vocabulary, L layers,
P prompt tokens, M visual tokens of a frame after the merger (the paper's L_c), G responses a question, Q questions,
I frames (rows of the vision tower), R response tokens, C values of one flattened patch, X slots of a prompt's images
(visual tokens and delimiters), E insertions of a response (see `ReinsertedImages`), U shards of rows.
"""

from __future__ import annotations

from typing import Any

from flax import struct

Array = Any  # numpy on the host, jax.Array or a tracer on the device


@struct.dataclass
class VisionBatch:
    """Images in the layout that the vision tower works in: one row a frame, patches in padded window slots.

    S = W * slots of one window. Every field is made on the host, so that a bucket (I, S, M) compiles once.

    Frames and the rows of the batch are split into `shards` equal shards. A row uses frames of its own shard only, so
    that a device that holds whole shards of both needs no visual tokens of other devices.

    Attributes:
      patches_IxSxC: float32, normalised pixel values of each patch, channel-frame-row-column order, 0 in padding.
      hw_IxSx2: int32, row and column of the patch in the frame's patch grid, 0 in padding.
      valid_IxS: bool, True where the slot holds a patch.
      gather_IxM: int32, merged slot (four patch slots each) of every visual token in raster order, 0 in padding.
      shards: static; divides I and the rows.
    """

    patches_IxSxC: Array
    hw_IxSx2: Array
    valid_IxS: Array
    gather_IxM: Array
    shards: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class VisualTokens:
    """Images that the vision tower has encoded already, passed instead of their `VisionBatch`.

    Attributes:
      tokens_ZxD: [I * M, D (1 + F)] in the compute type, as `QwenVL.encode` gives them.
      shards: static; as in `VisionBatch`.
    """

    tokens_ZxD: Array
    shards: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class TokenBatch:
    """Whole sequences for supervised training: prompt and response in one row, left-aligned, padded on the right.

    Attributes:
      ids_BxT: int32, token ids; padding holds any valid id.
      pos_BxTx3: int32, M-RoPE positions (time, row, column).
      visual_BxT: int32, index into the flattened [I * M] visual tokens where the id is an image pad, else -1.
      length_B: int32, tokens in the row.
      target_BxR: int32, slots of the tokens that the loss is on, never 0; padding repeats any.
      loss_BxR: float32, weight of the loss on predicting each of them; 0 in padding.
    """

    ids_BxT: Array
    pos_BxTx3: Array
    visual_BxT: Array
    length_B: Array
    target_BxR: Array
    loss_BxR: Array


@struct.dataclass
class ReinsertedImages:
    """The tokens that re-insert a prompt's images into the sequence: all images, in order.

    Attributes:
      source_QxX: int32, the prompt slot whose token is repeated, -1 in padding.
      pos_QxXx3: int32, M-RoPE positions.
      moves_QxX: int32, 1 where the position counts from the insertion's first position, 0 where it is absolute.
      length_Q: int32, slots that are no padding.
      span_Q: int32, how far an insertion moves the position of what follows.
      tokens_QxN: int32, visual tokens of each of the prompt's images, 0 where it has fewer than N.
    """

    source_QxX: Array
    pos_QxXx3: Array
    moves_QxX: Array
    length_Q: Array
    span_Q: Array
    tokens_QxN: Array


@struct.dataclass
class PromptBatch:
    """Prompts, left-aligned, padded on the right.

    Attributes:
      ids_QxP, pos_QxPx3, visual_QxP, length_Q: as in `TokenBatch`.
      next_pos_Q: int32, the M-RoPE position of the first generated token (the same on all three axes).
      block: the images as insertions repeat them; None where nothing is ever inserted.
    """

    ids_QxP: Array
    pos_QxPx3: Array
    visual_QxP: Array
    length_Q: Array
    next_pos_Q: Array
    block: ReinsertedImages | None = None


@struct.dataclass
class ResponseBatch:
    """Given responses to prompts, for supervised training with re-attention.

    Attributes:
      ids_BxR: int32, response tokens, the stop token included; padding after `length_B`.
      length_B: int32, tokens in the response; 0 in a row that only fills the batch.
      insertion_BxE: int32, numbers of the insertions that a response may have: 0 .. E - 1.
    """

    ids_BxR: Array
    length_B: Array
    insertion_BxE: Array


@struct.dataclass
class Rollout:
    """What was sampled: B = Q * G rows, row b answers question b // G.

    Attributes:
      ids_BxR: int32, response tokens, the stop token included; padding after `length_B`.
      logp_BxR: float32, natural log-probability of each token under softmax(logits / temperature) with the suppressed
        tokens masked and before penalties, top-k and top-p; 0 in padding and for forced tokens.
      length_B: int32, tokens in the response, the stop token included.
      stopped_B: bool, True where a stop token ended the response, False where the length did.
      inserted_B: int32, insertions.
      skipped_B: int32, skipped insertions: reflections of text alone although the mode inserts, because the cap or the
        budget is spent or the prompt has no image.
      selected_BxExX: bool, the slots of the `ReinsertedImages` that insertion E shows; with form "bias" the others are
        inserted too, but masked. E is 0 where nothing is ever inserted.
    """

    ids_BxR: Array
    logp_BxR: Array
    length_B: Array
    stopped_B: Array
    inserted_B: Array
    skipped_B: Array
    selected_BxExX: Array
