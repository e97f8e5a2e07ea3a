"""Prefill: images and prompts are run once, before the first token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.types import PromptBatch, VisionBatch, VisualTokens


def encode_prompts(
    model: QwenVL, params: Params, vision: VisionBatch | VisualTokens, prompts: PromptBatch
) -> tuple[jax.Array, KeyValues, jax.Array]:
    """Runs images and prompts once.

    Returns:
      the hidden state [Q, D] of each prompt's last token, the prompts' keys and values, and their embeddings [Q, P, D].
    """
    variables = {"params": params}
    visual_ZxD = model.apply(variables, vision, method="encode")
    x_QxPxD = model.apply(variables, prompts.ids_QxP, prompts.visual_QxP, visual_ZxD, vision.shards, method="embed")
    decoded = model.apply(variables, x_QxPxD, prompts.pos_QxPx3, method="decode")
    last_Qx1x1 = (prompts.length_Q - 1)[:, None, None]
    hidden_QxD = jnp.take_along_axis(decoded.hidden_BxTxD, last_Qx1x1, axis=1)[:, 0]
    return hidden_QxD, KeyValues(*decoded.new, prompts.length_Q), x_QxPxD


def text_positions(first_B: jax.Array, tokens: int) -> jax.Array:
    """M-RoPE positions [B, T, 3] of `tokens` text tokens from position `first_B` on: the same on all three axes."""
    pos_BxT = first_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return jnp.broadcast_to(pos_BxT[..., None], (*pos_BxT.shape, 3))
