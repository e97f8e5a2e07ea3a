"""Where given responses look: attention paid to visual tokens, beside what an even attention would pay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.reattention.insert import splice
from qwenla_jax.reattention.trigger import TEXT_ONLY, LookOptions
from qwenla_jax.sampling.loop import encode_prompts, text_positions
from qwenla_jax.types import PromptBatch, VisionBatch


@struct.dataclass
class AttentionMass:
    """Attention of each response token, the mean over layers and heads.

    Attributes:
      original_BxR: float32, paid to the visual tokens of the prompt's own pictures.
      inserted_BxExR: float32, paid to the visual tokens that insertion E shows.
      even_original_BxR, even_inserted_BxExR: float32, the share of the tokens that the response token sees which those
        visual tokens are: what they would get if attention were spread evenly (theorems 3.1 and 3.2 are about it).
      image_BxRxP: float32, paid to each slot of the prompt.
    """

    original_BxR: jax.Array
    inserted_BxExR: jax.Array
    even_original_BxR: jax.Array
    even_inserted_BxExR: jax.Array
    image_BxRxP: jax.Array


def attention_mass(
    model: QwenVL,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    length_B: jax.Array,
    look: LookOptions = TEXT_ONLY,
    kept_BxExX: jax.Array | None = None,
) -> AttentionMass:
    """Runs given responses, with their insertions, and collects where their tokens looked (paper, figures 2 and 9).

    Paper silent on which mean: here over all layers and heads. A response token is the query here, so its own key is
    among those that it sees. Values behind a response's end, and at its last token where it is never run, are of no
    meaning.

    Args:
      model, look: static.
      params, vision, prompts, ids_BxR, length_B, kept_BxExX: see `train.logprobs.response_states`.
    """
    B, R = ids_BxR.shape
    G = B // len(prompts.length_Q)
    variables = {"params": params}
    _, prefix, visual_ZxD = encode_prompts(model, params, vision, prompts)
    if look.inserts:
        assert kept_BxExX is not None
        tokens = splice(look, prompts, ids_BxR, length_B, kept_BxExX)
        ids, visual, pos, bias = tokens.ids_BxT, tokens.visual_BxT, tokens.pos_BxTx3, tokens.bias_BxT
        slot_BxR, shown_BxExT = tokens.slot_BxR, tokens.shown_BxExT
    else:
        ids, visual, bias = ids_BxR, None, None
        pos = text_positions(jnp.repeat(prompts.next_pos_Q, G), R)
        slot_BxR = jnp.broadcast_to(jnp.arange(R), (B, R))
        shown_BxExT = jnp.zeros((B, 0, R), bool)
    x = model.apply(variables, ids, visual, visual_ZxD, method="embed")
    paid = model.apply(variables, x, pos, prefix, None, bias, ("prefix", "new"), method="decode").paid
    at_response = lambda x: jnp.take_along_axis(x, slot_BxR[..., None], axis=1)  # noqa: E731
    image_BxRxP, new_BxRxT = at_response(paid["prefix"]), at_response(paid["new"])
    visual_BxP = jnp.repeat(prompts.visual_QxP >= 0, G, axis=0)
    hidden_BxT = jnp.zeros(ids.shape, jnp.int32) if bias is None else (bias != 0).astype(jnp.int32)
    # What a token sees: its prompt, and of the spliced response everything up to itself but what a bias hides.
    hidden_before_BxR = jnp.take_along_axis(jnp.cumsum(hidden_BxT, axis=1), slot_BxR, axis=1)
    seen_BxR = jnp.repeat(prompts.length_Q, G)[:, None] + slot_BxR + 1 - hidden_before_BxR
    shown_before_BxExR = jnp.take_along_axis(
        jnp.cumsum(shown_BxExT, axis=2), jnp.broadcast_to(slot_BxR[:, None], (B, shown_BxExT.shape[1], R)), axis=2
    )
    return AttentionMass(
        original_BxR=jnp.einsum("brp,bp->br", image_BxRxP, visual_BxP.astype(jnp.float32)),
        inserted_BxExR=jnp.einsum("brt,bet->ber", new_BxRxT, shown_BxExT.astype(jnp.float32)),
        even_original_BxR=visual_BxP.sum(1)[:, None] / seen_BxR,
        even_inserted_BxExR=shown_before_BxExR / seen_BxR[:, None],
        image_BxRxP=image_BxRxP,
    )
