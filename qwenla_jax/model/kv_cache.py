"""Keys and values of prompts as explicit values: what the decoder returns, and reads again."""

from __future__ import annotations

import jax
from flax import struct


@struct.dataclass
class KeyValues:
    """Keys and values of all layers for rows of tokens, left-aligned.

    Attributes:
      k_LxBxSxKxH, v_LxBxSxKxH: the keys (already rotated) and values.
      length_B: int32, filled slots of each row; slots from there on are masked.
      bias_BxS: float32, added to every score of the slot's key (`layers.MASK_VALUE` masks it), or None for none.
    """

    k_LxBxSxKxH: jax.Array
    v_LxBxSxKxH: jax.Array
    length_B: jax.Array
    bias_BxS: jax.Array | None = None
