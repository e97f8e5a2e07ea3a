"""The splice that sampling and training share: the tokens of a response with its insertions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.model.qwen_vl import Params, QwenVL, with_features
from qwenla_jax.reattention.block import Inserted, copy_slots
from qwenla_jax.reattention.options import (
    ReattentionConfig,
    allowed_insertions,
    find_insertions,
    most_slots,
    selected_tokens,
)
from qwenla_jax.reattention.route import all_slots, compact, hiding_bias, select
from qwenla_jax.types import PromptBatch


def insertion(
    options: ReattentionConfig,
    prompts: PromptBatch,
    selected_BxX: jax.Array,
    next_pos_B: jax.Array,
    slots: int | None = None,
) -> Inserted:
    """The tokens of one insertion.

    Args:
      options: see there.
      prompts: one a row, with their `block`.
      selected_BxX: bool, what the insertion shows, from `route.select`.
      next_pos_B: int32, the position at which it begins.
      slots: Y, static; None: enough for any of the prompts.
    """
    slots = most_slots(options, prompts.block) if slots is None else slots
    if not options.masks:
        return copy_slots(prompts, compact(selected_BxX, slots), next_pos_B)
    everything = copy_slots(prompts, compact(all_slots(prompts), slots), next_pos_B)
    return dataclasses.replace(everything, bias_BxY=hiding_bias(selected_BxX[:, :slots]))


def embed_with_sources(
    model: QwenVL, params: Params, ids_BxT: jax.Array, source_BxT: jax.Array, prompt_QxPxD: jax.Array
) -> jax.Array:
    """Embeddings of tokens of which some repeat a slot of their row's prompt, with its features for DeepStack.

    Inserted tokens repeat the prompt's, so their embeddings are on the device that holds the row. The flat visual
    tokens would have to be gathered from all devices.

    Args:
      model, params: see there.
      ids_BxT: int32 token ids, B = Q * G; row b belongs to prompt b // G.
      source_BxT: int32, the prompt's slot, -1 where the token repeats none.
      prompt_QxPxD: embeddings of the prompts, as `sampling.prefill.encode_prompts` returns them.

    Returns:
      [B, T, D] in the compute type; D is that of `prompt_QxPxD`.
    """
    x_BxTxD = model.apply({"params": params}, ids_BxT, None, None, method="embed")
    x_BxTxD = with_features(x_BxTxD, prompt_QxPxD.shape[-1])
    at_QxA = jnp.maximum(source_BxT, 0).reshape(len(prompt_QxPxD), -1)
    again = jnp.take_along_axis(prompt_QxPxD, at_QxA[..., None], axis=1).reshape(x_BxTxD.shape)
    return jnp.where((source_BxT >= 0)[..., None], again, x_BxTxD)


def one_a_row(prompts: PromptBatch, rows: int) -> PromptBatch:
    """The prompts, repeated to one a row: row b belongs to prompt b // G."""
    return jax.tree.map(lambda x: jnp.repeat(x, rows // len(prompts.length_Q), axis=0), prompts)


@struct.dataclass
class Spliced:
    """Responses with their insertions in place, T slots a row.

    Attributes:
      ids_BxT, pos_BxTx3: as in `types.TokenBatch`.
      source_BxT: int32, the slot of the row's prompt that is repeated, -1 at the response's own tokens.
      bias_BxT: float32, added to every score of the slot's key; None where nothing is ever masked.
      slot_BxR: int32, the slot of each response token.
      inserts_BxR: bool, the response tokens that follow an insertion.
      turn_BxR: int32, insertions up to each response token, one right before it included.
      shown_BxExT: bool, the visual tokens that insertion E shows.
    """

    ids_BxT: jax.Array
    source_BxT: jax.Array
    pos_BxTx3: jax.Array
    bias_BxT: jax.Array | None
    slot_BxR: jax.Array
    inserts_BxR: jax.Array
    turn_BxR: jax.Array
    shown_BxExT: jax.Array


def splice(
    options: ReattentionConfig, prompts: PromptBatch, ids_BxR: jax.Array, length_B: jax.Array, selected_BxExX: jax.Array
) -> Spliced:
    """Inserts the images into given responses, as the sampler does.

    Args:
      options: see there.
      prompts: Q prompts with their `block`.
      ids_BxR: int32 responses, B = Q * G; row b answers prompt b // G.
      length_B: int32.
      selected_BxExX: bool, what insertion E shows. A response with more reflections than E gets E insertions.

    Returns:
      T = R + E * Y slots a row, Y as `reattention.options.most_slots`.
    """
    B, R = ids_BxR.shape
    E = selected_BxExX.shape[1]
    Y = most_slots(options, prompts.block)
    T = R + E * Y
    prompts = one_a_row(prompts, B)
    allowed_B = jnp.minimum(allowed_insertions(options, prompts), E)
    inserts_BxR, turn_BxR = find_insertions(ids_BxR, length_B, allowed_B, options.open_id)
    slot_BxR = jnp.broadcast_to(jnp.arange(R, dtype=jnp.int32), (B, R))
    pos_BxR = prompts.next_pos_Q[:, None] + jnp.arange(R, dtype=jnp.int32)
    parts = []
    for e in range(E):
        tag_BxR = inserts_BxR & (turn_BxR == e + 1)
        # The tag's slot after the earlier insertions; a row without this insertion writes to slot T, which is dropped.
        at_B, has_tag_B = jnp.argmax(tag_BxR, axis=1), tag_BxR.any(1)
        take = lambda x, at_B=at_B: jnp.take_along_axis(x, at_B[:, None], axis=1)[:, 0]  # noqa: E731
        tokens = insertion(options, prompts, selected_BxExX[:, e], take(pos_BxR))
        parts.append((jnp.where(has_tag_B, take(slot_BxR), T), tokens))
        after_BxR = turn_BxR > e
        slot_BxR = slot_BxR + after_BxR * tokens.length_B[:, None]
        pos_BxR = pos_BxR + after_BxR * (tokens.next_pos_B - take(pos_BxR))[:, None]

    def place(fill: int | float | bool, text: jax.Array | None, blocks: list[jax.Array]) -> jax.Array:
        """One row-wise array of the spliced tokens from the response's values and the insertions'."""
        like = blocks[0] if text is None else text
        out = jnp.full((B, T, *like.shape[2:]), fill, like.dtype)
        write = jax.vmap(lambda out, slot, values: out.at[slot].set(values, mode="drop"))
        if text is not None:
            out = write(out, slot_BxR, text)
        for (first_B, tokens), values in zip(parts, blocks, strict=True):
            offset_Y = jnp.arange(values.shape[1], dtype=jnp.int32)
            slot = jnp.where(offset_Y < tokens.length_B[:, None], first_B[:, None] + offset_Y, T)
            out = write(out, slot, values.astype(out.dtype))
        return out

    blocks = [tokens for _, tokens in parts]
    text_pos_BxRx3 = jnp.broadcast_to(pos_BxR[..., None], (B, R, 3)).astype(jnp.int32)
    bias_BxT = None
    if options.masks:
        bias_BxT = place(0.0, jnp.zeros((B, R), jnp.float32), [b.bias_BxY for b in blocks])
    shown = [
        place(False, None, [b.visual_BxY & (b.bias_BxY == 0) & (n == e) for n, b in enumerate(blocks)])
        for e in range(E)
    ]
    return Spliced(
        ids_BxT=place(0, ids_BxR, [b.ids_BxY for b in blocks]),
        source_BxT=place(-1, jnp.full((B, R), -1, jnp.int32), [b.source_BxY for b in blocks]),
        pos_BxTx3=place(0, text_pos_BxRx3, [b.pos_BxYx3 for b in blocks]),
        bias_BxT=bias_BxT,
        slot_BxR=slot_BxR,
        inserts_BxR=inserts_BxR,
        turn_BxR=turn_BxR,
        shown_BxExT=jnp.stack(shown, axis=1) if shown else jnp.zeros((B, 0, T), bool),
    )


def replay_selection(
    options: ReattentionConfig,
    model: QwenVL,
    params: Params,
    prompts: PromptBatch,
    prefix: KeyValues,
    prompt_QxPxD: jax.Array,
    ids_BxR: jax.Array,
    length_B: jax.Array,
    max_insertions: int,
) -> jax.Array:
    """What each insertion of given responses shows, computed as the sampler does: one insertion after the other.

    A selection depends on the attention of the tokens before its tag, and that on the earlier insertions. So each turn
    runs the responses with the insertions selected so far, without a gradient; there are as many turns as the response
    with the most insertions has.

    Args:
      options: see there.
      model, params: whose attention counts.
      prompts, prefix, prompt_QxPxD: the prompts, their keys and values, and their embeddings.
      ids_BxR, length_B: the responses.
      max_insertions: E.

    Returns:
      bool [B, E, X].
    """
    B = len(ids_BxR)
    asked = one_a_row(prompts, B)
    assert asked.block is not None
    shown_B = selected_tokens(options, asked.block)
    one_each = lambda selected_BxX: jnp.repeat(selected_BxX[:, None], max_insertions, axis=1)  # noqa: E731
    if not options.uses_attention:
        return one_each(select(options, asked, jnp.zeros((B, 0), jnp.float32), shown_B))
    selected_BxExX = one_each(all_slots(asked))
    params, prefix, prompt_QxPxD = jax.lax.stop_gradient((params, prefix, prompt_QxPxD))
    variables = {"params": params}
    allowed_B = jnp.minimum(allowed_insertions(options, asked), max_insertions)
    _, turn_BxR = find_insertions(ids_BxR, length_B, allowed_B, options.open_id)

    def turn(e: jax.Array, selected_BxExX: jax.Array) -> jax.Array:
        tokens = splice(options, prompts, ids_BxR, length_B, selected_BxExX)
        x_BxTxD = embed_with_sources(model, params, tokens.ids_BxT, tokens.source_BxT, prompt_QxPxD)
        decoded = model.apply(
            variables, x_BxTxD, tokens.pos_BxTx3, prefix, None, tokens.bias_BxT, ("prefix",), method="decode"
        )
        received_BxRxP = jnp.take_along_axis(decoded.received["prefix"], tokens.slot_BxR[..., None], axis=1)
        before_BxR = (turn_BxR <= e) & (jnp.arange(ids_BxR.shape[1]) < length_B[:, None])
        received_BxP = jnp.sum(received_BxRxP * before_BxR[..., None], axis=1)
        return selected_BxExX.at[:, e].set(select(options, asked, received_BxP, shown_B))

    return jax.lax.fori_loop(0, jnp.minimum(turn_BxR.max(), max_insertions), turn, selected_BxExX)
