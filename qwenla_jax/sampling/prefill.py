"""Prefill: images and prompts are run once, before the first token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwenla_jax.model.kv_cache import KeyValues, empty_cache
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.reattention.options import RowReattention, row_reattention
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import SampleState
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
      that insertions repeat: the prompts' own, but for the images where `content` is a control.

    Raises:
      ValueError: a blank image is to be shown, and the images are encoded already.
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
    """Embeddings of the prompts with something else in the place of their images, see `encode_prompts`."""
    variables, ids_QxP = {"params": params}, prompts.ids_QxP
    if content == "pause":  # the row of the image token, which otherwise stands nowhere
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
        # Where there is no other image, an index outside, which gives nan: a control must not show its own image.
        other_I = jnp.where(count_I > 1, other_I, I)
        visual_QxP = jnp.where(visual_QxP >= 0, other_I[visual_QxP // M] * M + visual_QxP % M, -1)
    return model.apply(variables, ids_QxP, visual_QxP, visual_ZxD, shards, method="embed")


def text_positions(first_B: jax.Array, tokens: int) -> jax.Array:
    """M-RoPE positions [B, T, 3] of `tokens` text tokens from position `first_B` on: the same on all three axes."""
    pos_BxT = first_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return jnp.broadcast_to(pos_BxT[..., None], (*pos_BxT.shape, 3))


def prefill(
    model: QwenVL,
    options: SampleOptions,
    params: Params,
    vision: VisionBatch | VisualTokens,
    prompts: PromptBatch,
    seed: jax.Array,
    step: jax.Array,
    sample_B: jax.Array,
    rows: RowReattention | None = None,
) -> SampleState:
    """The state before the first token; the G rows of a prompt share its keys and values.

    Args: as in `sampler.sample`; `params` in the compute type.
    """
    config, reattention, G = model.config, options.reattention, options.group_size
    text, (Q, P), R = config.text, prompts.ids_QxP.shape, options.max_new_tokens
    B = Q * G
    hidden_QxD, prefix, prompt_QxPxD = encode_prompts(model, params, vision, prompts, reattention.content)
    E = X = 0
    if reattention.inserts:
        assert prompts.block is not None  # collated with the images' blocks
        E, X = reattention.max_insertions, prompts.block.source_QxX.shape[1]
    return SampleState(
        prompts=prompts,
        prompt_QxPxD=prompt_QxPxD,
        prefix=prefix,
        reattention=row_reattention(reattention, prompts, G) if rows is None else rows,
        seed=seed,
        step=step,
        sample_B=sample_B,
        temperature_B=None,
        top_p_B=None,
        limit_B=jnp.full((B,), R, jnp.int32),
        steps=jnp.int32(0),
        hidden_BxD=jnp.repeat(hidden_QxD, G, axis=0),
        cache=empty_cache(text.num_layers, B, 0, text.num_kv_heads, text.head_dim, config.dtype, reattention.masks),
        next_pos_B=jnp.repeat(prompts.next_pos_Q, G),
        received_BxP=jnp.zeros((B, P if reattention.uses_attention else 0), jnp.float32),
        pending_B=jnp.zeros((B,), bool),
        closing_B=jnp.zeros((B,), bool),
        ids_BxR=jnp.full((B, R), options.stop_ids[0], jnp.int32),
        logp_BxR=jnp.zeros((B, R), jnp.float32),
        length_B=jnp.zeros((B,), jnp.int32),
        stopped_B=jnp.zeros((B,), bool),
        inserted_B=jnp.zeros((B,), jnp.int32),
        skipped_B=jnp.zeros((B,), jnp.int32),
        selected_BxExX=jnp.zeros((B, E, X), bool),
    )
