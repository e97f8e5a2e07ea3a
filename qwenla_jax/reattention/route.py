"""ROUTE: the most attended visual tokens (paper, section Visual re-attention, equation 5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwenla_jax.model.layers import MASK_VALUE
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.types import PromptBatch


def all_slots(prompts: PromptBatch) -> jax.Array:
    """Every slot of each prompt's block: what COPY selects. bool [Q, X]."""
    block = prompts.block
    assert block is not None
    X = block.source_QxX.shape[1]
    return jnp.arange(X) < block.length_Q[:, None]


def select(options: ReattentionConfig, prompts: PromptBatch, received_BxP: jax.Array, shown_B: jax.Array) -> jax.Array:
    """Selects the slots of the block that an insertion shows.

    Equation 5 scores visual token j by (1 / L_y) sum_i attn_ij over the L_y tokens generated so far, here the mean over
    layers and heads. Dividing by L_y does not change the order, so the sum serves. The tokens are those of the prompt's
    own images, in every insertion (paper silent on the attention that earlier insertions receive), and are ranked over
    all images of a prompt together (paper silent). Equal scores, as before the first token, are ranked in raster order.

    Args:
      options: see there.
      prompts: one a row, with their `block`.
      received_BxP: float32, attention that each prompt slot received from the tokens so far, summed; [B, 0]
        where `options.uses_attention` is False.
      shown_B: int32, how many visual tokens to select.

    Returns:
      bool [B, X]; delimiters are always selected.
    """
    real_BxX = all_slots(prompts)
    if not options.selects:
        return real_BxX
    block = prompts.block
    assert block is not None
    source_BxX = jnp.maximum(block.source_QxX, 0)
    visual_BxX = real_BxX & (jnp.take_along_axis(prompts.visual_QxP, source_BxX, axis=1) >= 0)
    score_BxX = jnp.where(visual_BxX, jnp.take_along_axis(received_BxP, source_BxX, axis=1), -jnp.inf)
    order_BxX = jnp.argsort(-score_BxX, axis=1, stable=True)
    rank_BxX = jnp.argsort(order_BxX, axis=1, stable=True)
    return jnp.where(visual_BxX, rank_BxX < shown_B[:, None], real_BxX)


def compact(selected_BxX: jax.Array, slots: int) -> jax.Array:
    """The selected slots in their order, then -1: int32 [B, slots]. At most `slots` are selected."""
    order_BxX = jnp.argsort(~selected_BxX, axis=1, stable=True)[:, :slots]
    count_B = selected_BxX.sum(1)
    return jnp.where(jnp.arange(order_BxX.shape[1]) < count_B[:, None], order_BxX, -1).astype(jnp.int32)


def hiding_bias(selected_BxX: jax.Array) -> jax.Array:
    """The additive attention bias that masks what is not selected: float32 [B, X]."""
    return jnp.where(selected_BxX, 0.0, MASK_VALUE).astype(jnp.float32)
