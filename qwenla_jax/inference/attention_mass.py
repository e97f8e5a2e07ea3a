"""Attention that visual tokens receive from given responses, beside their share of an even attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.parallel.distributed import is_multiprocess, place
from qwenla_jax.parallel.sharding import replicated
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig
from qwenla_jax.reattention.splice import embed_with_sources, splice
from qwenla_jax.sampling.prefill import encode_prompts, text_positions
from qwenla_jax.types import PromptBatch, VisionBatch

PARTS = ("before", "in", "after")


@struct.dataclass
class AttentionMass:
    """Attention of each response token, the mean over layers and heads.

    Attributes:
      original_BxR: float32, received by the visual tokens of the prompt's own images.
      inserted_BxExR: float32, received by the visual tokens that insertion E shows.
      even_original_BxR, even_inserted_BxExR: float32, the share of the tokens that the response token sees which those
        visual tokens are: what they would get if attention were spread evenly (theorems 3.1 and 3.2 are about it).
      image_BxRxP: float32, received by each slot of the prompt; None from a `compiled_mass` without it.
      again_BxRxP: float32, received by that slot's visual token where insertions show it, all of them together; None
        as above.
    """

    original_BxR: jax.Array
    inserted_BxExR: jax.Array
    even_original_BxR: jax.Array
    even_inserted_BxExR: jax.Array
    image_BxRxP: jax.Array
    again_BxRxP: jax.Array


def attention_mass(
    model: QwenVL,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    length_B: jax.Array,
    reattention: ReattentionConfig = TEXT_ONLY,
    selected_BxExX: jax.Array | None = None,
) -> AttentionMass:
    """Runs given responses, with their insertions, and returns their tokens' attention (paper, figures 2 and 9).

    Paper silent on which mean: here over all layers and heads. A response token is the query here, so its own key is
    among those that it sees. Values after a response's end, and at a last token that is never run, have no meaning.

    Args:
      model, reattention: static.
      params, vision, prompts, ids_BxR, length_B, selected_BxExX: see `train.logprobs.response_states`.
    """
    B, R = ids_BxR.shape
    G = B // len(prompts.length_Q)
    variables = {"params": params}
    _, prefix, prompt_QxPxD = encode_prompts(model, params, vision, prompts, reattention.content)
    if reattention.inserts:
        assert selected_BxExX is not None
        tokens = splice(reattention, prompts, ids_BxR, length_B, selected_BxExX)
        pos, bias = tokens.pos_BxTx3, tokens.bias_BxT
        x = embed_with_sources(model, params, tokens.ids_BxT, tokens.source_BxT, prompt_QxPxD)
        slot_BxR, shown_BxExT, source_BxT = tokens.slot_BxR, tokens.shown_BxExT, tokens.source_BxT
    else:
        x, bias = model.apply(variables, ids_BxR, None, None, method="embed"), None
        pos = text_positions(jnp.repeat(prompts.next_pos_Q, G), R)
        slot_BxR = jnp.broadcast_to(jnp.arange(R), (B, R))
        shown_BxExT, source_BxT = jnp.zeros((B, 0, R), bool), jnp.full((B, R), -1)
    received = model.apply(variables, x, pos, prefix, None, bias, ("prefix", "new"), method="decode").received
    at_response = lambda x: jnp.take_along_axis(x, slot_BxR[..., None], axis=1)  # noqa: E731
    image_BxRxP, new_BxRxT = at_response(received["prefix"]), at_response(received["new"])
    visual_BxP = jnp.repeat(prompts.visual_QxP >= 0, G, axis=0)
    repeats_BxTxP = jax.nn.one_hot(jnp.where(shown_BxExT.any(1), source_BxT, -1), image_BxRxP.shape[2])
    masked_BxT = jnp.zeros(x.shape[:2], jnp.int32) if bias is None else (bias != 0).astype(jnp.int32)
    # What a token sees: its prompt, and of the spliced response everything up to itself that is not masked.
    masked_before_BxR = jnp.take_along_axis(jnp.cumsum(masked_BxT, axis=1), slot_BxR, axis=1)
    seen_BxR = jnp.repeat(prompts.length_Q, G)[:, None] + slot_BxR + 1 - masked_before_BxR
    shown_before_BxExR = jnp.take_along_axis(
        jnp.cumsum(shown_BxExT, axis=2), jnp.broadcast_to(slot_BxR[:, None], (B, shown_BxExT.shape[1], R)), axis=2
    )
    return AttentionMass(
        original_BxR=jnp.einsum("brp,bp->br", image_BxRxP, visual_BxP.astype(jnp.float32)),
        inserted_BxExR=jnp.einsum("brt,bet->ber", new_BxRxT, shown_BxExT.astype(jnp.float32)),
        even_original_BxR=visual_BxP.sum(1)[:, None] / seen_BxR,
        even_inserted_BxExR=shown_before_BxExR / seen_BxR[:, None],
        image_BxRxP=image_BxRxP,
        again_BxRxP=jnp.einsum("brt,btp->brp", new_BxRxT, repeats_BxTxP),
    )


def compiled_mass(
    runtime: Runtime, reattention: ReattentionConfig, by_slot: bool = False
) -> Callable[..., AttentionMass]:
    """`attention_mass` compiled: (params, vision, prompts, ids, lengths, selected) -> AttentionMass on the host.

    Args:
      runtime: the run.
      reattention: the mode and options of the responses' insertions.
      by_slot: whether the result has the attention of each slot of the prompt too.
    """
    whole = replicated(runtime.mesh)  # where each of several processes is to see all of it

    @functools.partial(jax.jit, out_shardings=whole if is_multiprocess() else None)
    def run(params: Params, vision: Any, prompts: Any, ids: Any, lengths: Any, selected: Any) -> AttentionMass:
        mass = attention_mass(runtime.model, params, vision, prompts, ids, lengths, reattention, selected)
        return mass if by_slot else dataclasses.replace(mass, image_BxRxP=None, again_BxRxP=None)

    def call(params: Params, *args: Any) -> AttentionMass:
        args = place(args, whole)
        with runtime.context():
            return jax.device_get(run(params, *args))

    return call


def parts_of(ids_BxR: np.ndarray, length_B: np.ndarray, open_id: int, close_id: int) -> dict[str, np.ndarray]:
    """The part that each response token is in: before the first reflection, in one (its tags included), or after one.

    Returns:
      bool [B, R] for each of PARTS and for "all"; a response without a reflection is "before" throughout. The last
      token of a response is in none: it is never run.
    """
    run_BxR = np.arange(ids_BxR.shape[1]) < length_B[:, None] - 1
    opened_BxR = np.cumsum(ids_BxR == open_id, axis=1)
    closed_BxR = np.cumsum(ids_BxR == close_id, axis=1)
    inside_BxR = (opened_BxR > closed_BxR) | ((ids_BxR == close_id) & (opened_BxR >= closed_BxR) & (opened_BxR > 0))
    parts = {"before": opened_BxR == 0, "in": inside_BxR, "after": (opened_BxR > 0) & ~inside_BxR}
    return {name: where & run_BxR for name, where in parts.items()} | {"all": run_BxR}


def profile(mass: AttentionMass, parts: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means over the tokens of each part.

    Returns:
      part -> `tokens`, `original`, `inserted` (all insertions together), `visual` (both), `even` (what both would
      receive of evenly spread attention) and `ratio`, visual over even; a part without tokens is left out. The ratio
      is needed beside the mass, which also changes with the visual tokens' mere share of all tokens.
    """
    original = np.asarray(mass.original_BxR)
    inserted = np.asarray(mass.inserted_BxExR).sum(1)
    even = np.asarray(mass.even_original_BxR) + np.asarray(mass.even_inserted_BxExR).sum(1)
    result = {}
    for name, where in parts.items():
        if not where.any():
            continue
        mean = lambda x, where=where: float(x[where].mean())  # noqa: E731
        row = {"tokens": float(where.sum()), "original": mean(original), "inserted": mean(inserted), "even": mean(even)}
        row["visual"] = row["original"] + row["inserted"]
        result[name] = row | {"ratio": row["visual"] / row["even"]}
    return result
