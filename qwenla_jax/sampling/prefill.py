"""Prefill: runs images and prompts before the first token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.types import PromptBatch, VisionBatch, VisualTokens


def encode_prompts(
    model: QwenVL,
    params: Params,
    vision: VisionBatch | VisualTokens,
    prompts: PromptBatch,
    content: str = "image",
) -> tuple[jax.Array, KeyValues, jax.Array]:
    """Runs images and prompts once.

    Args:
      model, params, vision, prompts: Q questions.
      content: what insertions show, `ReattentionOptions.content`.

    Returns:
      the hidden state [Q, D] of each prompt's last token, the prompts' keys and values, and the embeddings [Q, P, D]
      that insertions repeat, as `QwenVL.embed` returns them: those of the prompts, with other images if `content` is a
      control.

    Raises:
      ValueError: `content` needs the images (blank, other), but `vision` has encoded ones.
    """
    variables = {"params": params}
    visual_ZxD = model.apply(variables, vision, method="encode")
    x_QxPxD = model.apply(variables, prompts.ids_QxP, prompts.visual_QxP, visual_ZxD, vision.shards, method="embed")
    decoded = model.apply(variables, x_QxPxD, prompts.pos_QxPx3, method="decode")
    last_Qx1x1 = (prompts.length_Q - 1)[:, None, None]
    hidden_QxD = jnp.take_along_axis(decoded.hidden_BxTxD, last_Qx1x1, axis=1)[:, 0]
    if content != "image":
        x_QxPxD = _control_embeddings(model, params, vision, visual_ZxD, prompts, content)
    return hidden_QxD, KeyValues(*decoded.new, prompts.length_Q), x_QxPxD


def _control_embeddings(
    model: QwenVL,
    params: Params,
    vision: VisionBatch | VisualTokens,
    visual_ZxD: jax.Array,
    prompts: PromptBatch,
    content: str,
) -> jax.Array:
    """Embeddings of the prompts with their images replaced by a control, see `encode_prompts`."""
    variables, ids_QxP = {"params": params}, prompts.ids_QxP
    if content == "pause":  # the embedding of the image token, which nothing else uses
        return model.apply(variables, ids_QxP, None, None, method="embed")
    if isinstance(vision, VisualTokens):
        raise ValueError(f"reattention.content={content}: needs the images, but they are encoded already")
    shards, visual_QxP = vision.shards, jnp.asarray(prompts.visual_QxP)
    if content == "blank":  # patches are normalized: zero is the processor's mean
        blank = dataclasses.replace(vision, patches_IxSxC=jnp.zeros_like(vision.patches_IxSxC))
        visual_ZxD = model.apply(variables, blank, method="encode")
    else:
        (I, M), real_I = vision.gather_IxM.shape, jnp.any(vision.valid_IxS, axis=1)
        count_I = jnp.repeat(real_I.reshape(shards, -1).sum(1), I // shards)
        frame_I = jnp.arange(I)
        first_I = frame_I - frame_I % (I // shards)
        other_I = first_I + (frame_I - first_I + 1) % jnp.maximum(count_I, 1)
        # Without another image the index is out of range, which gives nan: a control must not show its own image.
        other_I = jnp.where(count_I > 1, other_I, I)
        visual_QxP = jnp.where(visual_QxP >= 0, other_I[visual_QxP // M] * M + visual_QxP % M, -1)
    return model.apply(variables, ids_QxP, visual_QxP, visual_ZxD, shards, method="embed")


def text_positions(first_B: jax.Array, tokens: int) -> jax.Array:
    """M-RoPE positions [B, T, 3] of `tokens` text tokens from position `first_B` on: the same on all three axes."""
    pos_BxT = first_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return jnp.broadcast_to(pos_BxT[..., None], (*pos_BxT.shape, 3))
