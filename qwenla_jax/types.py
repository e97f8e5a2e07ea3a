"""The values that pass between the package's parts: frozen structs of arrays.

Axis letters: B rows, T tokens, S slots, D width, N query heads, K key/value heads, H head size, V vocabulary, L layers,
P prompt tokens, M visual tokens of a frame after the merger (the paper's L_c), G responses a question, Q questions,
I frames (rows of the vision tower), R response tokens, C values of one flattened patch.
"""

from __future__ import annotations

from typing import Any

from flax import struct

Array = Any  # numpy on the host, jax.Array or a tracer on the device


@struct.dataclass
class VisionBatch:
    """Pictures in the layout that the vision tower works in: one row a frame, patches in padded window slots.

    S = W * slots of one window. Every field is made on the host, so that a bucket (I, S, M) compiles once.

    Attributes:
      patches_IxSxC: float32, normalised pixel values of each patch, channel-frame-row-column order, 0 in padding.
      hw_IxSx2: int32, row and column of the patch in the frame's patch grid, 0 in padding.
      valid_IxS: bool, True where the slot holds a patch.
      gather_IxM: int32, merged slot (four patch slots each) of every visual token in raster order, 0 in padding.
    """

    patches_IxSxC: Array
    hw_IxSx2: Array
    valid_IxS: Array
    gather_IxM: Array


@struct.dataclass
class TokenBatch:
    """Whole sequences for supervised training: prompt and response in one row, left-aligned, padded on the right.

    Attributes:
      ids_BxT: int32, token ids; padding holds any valid id.
      pos_BxTx3: int32, M-RoPE positions (time, row, column).
      visual_BxT: int32, index into the flattened [I * M] visual tokens where the id is an image pad, else -1.
      loss_BxT: float32, weight of the loss on *predicting* the token at T; 0 on prompt and padding.
      length_B: int32, tokens in the row.
    """

    ids_BxT: Array
    pos_BxTx3: Array
    visual_BxT: Array
    loss_BxT: Array
    length_B: Array


@struct.dataclass
class PromptBatch:
    """Prompts, left-aligned, padded on the right.

    Attributes:
      ids_QxP, pos_QxPx3, visual_QxP, length_Q: as in `TokenBatch`.
      next_pos_Q: int32, the M-RoPE position of the first generated token (the same on all three axes).
    """

    ids_QxP: Array
    pos_QxPx3: Array
    visual_QxP: Array
    length_Q: Array
    next_pos_Q: Array


@struct.dataclass
class Rollout:
    """What was sampled: B = Q * G rows, row b answers question b // G.

    Attributes:
      ids_BxR: int32, response tokens, the stop token included; padding after `length_B`.
      logp_BxR: float32, natural log-probability of each token under softmax(logits / temperature) with the forbidden
        tokens masked and before top-p; 0 in padding.
      length_B: int32, tokens in the response, the stop token included.
      stopped_B: bool, True where a stop token ended the response, False where the length did.
    """

    ids_BxR: Array
    logp_BxR: Array
    length_B: Array
    stopped_B: Array
