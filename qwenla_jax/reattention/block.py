"""COPY: all visual tokens again, by a gather of the embeddings that the vision tower made once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.types import PromptBatch


@struct.dataclass
class Inserted:
    """The tokens of one insertion a row, Y slots.

    Attributes:
      ids_BxY: int32.
      source_BxY: int32, the prompt slot whose token, and embedding, is repeated; -1 in padding.
      visual_BxY: bool, True at visual tokens.
      pos_BxYx3: int32, M-RoPE positions.
      bias_BxY: float32, 0, or `layers.MASK_VALUE` at a token that is inserted and masked.
      length_B: int32, slots that are no padding.
      next_pos_B: int32, the position of what follows.
    """

    ids_BxY: jax.Array
    source_BxY: jax.Array
    visual_BxY: jax.Array
    pos_BxYx3: jax.Array
    bias_BxY: jax.Array
    length_B: jax.Array
    next_pos_B: jax.Array


def copy_slots(prompts: PromptBatch, slot_BxY: jax.Array, next_pos_B: jax.Array) -> Inserted:
    """Repeats slots of the prompts' images.

    Args:
      prompts: one a row, with their `block`.
      slot_BxY: int32, slots of the block in their order, then -1 in padding.
      next_pos_B: int32, the position at which the insertion begins.
    """
    block = prompts.block
    assert block is not None
    real_BxY = slot_BxY >= 0
    slot_BxY = jnp.maximum(slot_BxY, 0)
    of_block = lambda x: jnp.take_along_axis(x, slot_BxY, axis=1)  # noqa: E731
    source_BxY = of_block(block.source_QxX)
    of_prompt = lambda x: jnp.take_along_axis(x, source_BxY, axis=1)  # noqa: E731
    base_BxY = of_block(block.moves_QxX) * next_pos_B[:, None]
    pos_QxXx3 = jnp.asarray(block.pos_QxXx3)
    pos_BxYx3 = jnp.stack([of_block(pos_QxXx3[..., axis]) + base_BxY for axis in range(3)], axis=-1)
    return Inserted(
        ids_BxY=of_prompt(prompts.ids_QxP),
        source_BxY=jnp.where(real_BxY, source_BxY, -1),
        visual_BxY=real_BxY & (of_prompt(prompts.visual_QxP) >= 0),
        pos_BxYx3=pos_BxYx3,
        bias_BxY=jnp.zeros(slot_BxY.shape, jnp.float32),
        length_B=real_BxY.sum(1, dtype=jnp.int32),
        next_pos_B=next_pos_B + block.span_Q,
    )
