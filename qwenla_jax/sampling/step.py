"""One step of decoding: a token for every active row, and the insertions of pending rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwenla_jax.model.pages import append, reads
from qwenla_jax.model.qwen_vl import Params, QwenVL, logits_of
from qwenla_jax.reattention.block import Inserted
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.reattention.route import select
from qwenla_jax.reattention.splice import embed_with_sources, insertion
from qwenla_jax.sampling.penalties import counted, penalized
from qwenla_jax.sampling.prefill import text_positions
from qwenla_jax.sampling.recent_logprobs import with_logprobs
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import RowSubset, SampleState
from qwenla_jax.sampling.token import sample_token, token_keys


def decode_step(
    model: QwenVL, options: SampleOptions, params: Params, logit_bias_V: jax.Array, state: SampleState
) -> SampleState:
    """Samples a token for every row that is live and not pending, and runs it through the model.

    A row that samples `<REFLECTION>` and may insert becomes pending: its tag is run after the insertion, by
    `run_insertions`. Pending and ended rows are computed too, and their results discarded.

    Args:
      model, options: static.
      params: in the compute type.
      logit_bias_V: float32, see `token.suppression_bias`.
      state: the state.
    """
    reattention, rows, rollout = options.reattention, state.rows, state.rollout
    logits_BxV = logits_of(params, state.hidden_BxD)
    keys_B = token_keys(rows.seed_B, rows.step_B, rows.sample_B, rollout.length_B)
    draws = rows.temperature_B, rows.top_p_B, rows.top_k_B, keys_B
    counts, recent, penalized_BxV = state.counts, state.logprobs, None
    if counts is not None and rows.penalties is not None:
        penalized_BxV = penalized(logits_BxV, counts, rows.penalties, state.live_B)
    ids_B, logp_B = sample_token(logits_BxV, logit_bias_V, *draws, options.cuts, penalized_BxV)
    active_B = state.live_B & ~state.pending_B
    forced_B = active_B & state.closing_B
    ids_B = jnp.where(forced_B, reattention.close_id, ids_B)
    if counts is not None:
        counts = counted(counts, ids_B, active_B)
    if recent is not None:
        given = logits_BxV, logit_bias_V, ids_B, rollout.length_B, rows.top_logprobs_B, active_B
        recent = with_logprobs(recent, *given)
    here_BxR = active_B[:, None] & (jnp.arange(options.max_new_tokens) == rollout.length_B[:, None])
    length_B = rollout.length_B + active_B
    more_B = length_B < rows.limit_B
    tag_B = active_B & (ids_B == reattention.open_id) & more_B & reattention.inserts
    pending_B = tag_B & (rollout.inserted_B < rows.reattention.allowed_B)
    fed_B = active_B & ~pending_B
    x_Bx1xD = model.apply({"params": params}, ids_B[:, None], None, None, method="embed")
    cache = reads(state.cache, None, options.shards, options.together)
    decoded = model.apply(
        {"params": params},
        x_Bx1xD,
        text_positions(state.next_pos_B, 1),
        reads(state.prefix, None, options.shards, options.together),
        cache,
        None,
        returned_attention(reattention),
        method="decode",
    )
    received_BxP = state.received_BxP
    if reattention.uses_attention:
        received_BxP = received_BxP + jnp.where(fed_B[:, None], _prompt(state, decoded.received["prefix"])[:, 0], 0.0)
    stops_B = active_B & jnp.isin(ids_B, jnp.asarray(options.stop_ids, jnp.int32))
    return dataclasses.replace(
        state,
        hidden_BxD=jnp.where(fed_B[:, None], decoded.hidden_BxTxD[:, 0], state.hidden_BxD),
        cache=append(cache, *decoded.new, fed_B.astype(jnp.int32), None),
        next_pos_B=state.next_pos_B + fed_B,
        received_BxP=received_BxP,
        pending_B=state.pending_B | pending_B,
        closing_B=state.closing_B & ~active_B,
        rollout=dataclasses.replace(
            rollout,
            ids_BxR=jnp.where(here_BxR, ids_B[:, None], rollout.ids_BxR),
            logp_BxR=jnp.where(here_BxR & ~forced_B[:, None], logp_B[:, None], rollout.logp_BxR),
            length_B=length_B,
            stopped_B=rollout.stopped_B | stops_B,
            skipped_B=rollout.skipped_B + (tag_B & ~pending_B & (rows.reattention.allowed_B >= 0)),
        ),
        counts=counts,
        logprobs=recent,
    )


def returned_attention(reattention: ReattentionConfig) -> tuple[str, ...]:
    """Which keys' received attention the decoder returns: that of the prompt's keys if ROUTE selects by it."""
    return ("prefix",) if reattention.uses_attention else ()


def _prompt(state: SampleState, received_BxTxS: jax.Array) -> jax.Array:
    """Attention on the slots of the prompt, without the padding of its last page."""
    return received_BxTxS[..., : state.received_BxP.shape[1]]


def insertion_rows(options: SampleOptions, rows: int) -> int:
    """How many of a batch's rows one call of `run_insertions` takes; the same number from each shard."""
    return min(rows, -(-options.reattention.rows_at_once // options.shards) * options.shards)


def run_insertions(
    model: QwenVL, options: SampleOptions, params: Params, state: SampleState, wanted_B: jax.Array, slots: int
) -> SampleState:
    """Runs the insertion and the tag of pending rows, at most `insertion_rows` of them; they continue after the tag.

    Args:
      model, options: static.
      params: in the compute type.
      state: the state.
      wanted_B: bool, pending rows whose insertions may run; if there are none, nothing changes.
      slots: static, the length that insertions are padded to; it fits those of all wanted rows.
    """
    reattention, B, rollout = options.reattention, len(wanted_B), state.rollout
    group = B // len(state.prompts.length_Q)
    rows = RowSubset(wanted_B, options.shards, insertion_rows(options, B))
    live_C = rows.wanted_C
    asked = jax.tree.map(lambda x: rows.take(x, 0, group), state.prompts)
    shown_C = rows.take(state.rows.reattention.shown_B)
    selected_CxX = select(reattention, asked, rows.take(state.received_BxP), shown_C)
    tokens = insertion(reattention, asked, selected_CxX, rows.take(state.next_pos_B), slots)
    # The tag follows the insertion's last slot.
    at_CxT = jnp.arange(slots + 1) == tokens.length_B[:, None]
    ids_CxT, source_CxT, pos_CxTx3, bias_CxT = _with_tag(reattention, tokens, at_CxT)
    prefix = reads(state.prefix, rows.row_C // group, options.shards, options.together)
    cache = reads(state.cache, rows.row_C, options.shards, options.together)
    x_CxTxD = embed_with_sources(model, params, ids_CxT, source_CxT, rows.take(state.prompt_QxPxD, 0, group))
    returned = returned_attention(reattention)
    decoded = model.apply({"params": params}, x_CxTxD, pos_CxTx3, prefix, cache, bias_CxT, returned, method="decode")
    of_tag = lambda x: jnp.sum(jnp.where(at_CxT[..., None], x, 0), axis=1)  # noqa: E731
    received_BxP = state.received_BxP
    if reattention.uses_attention:
        received_CxP = of_tag(_prompt(state, decoded.received["prefix"]))
        received_BxP = rows.put(received_BxP, rows.take(received_BxP) + received_CxP)
    turn_C = rows.take(rollout.inserted_B)
    now_CxE = jnp.arange(rollout.selected_BxExX.shape[1]) == turn_C[:, None]
    selected_CxExX = jnp.where(now_CxE[..., None], selected_CxX[:, None], rows.take(rollout.selected_BxExX))
    done_B = rows.put(jnp.zeros((B,), bool), live_C)
    return dataclasses.replace(
        state,
        hidden_BxD=rows.put(state.hidden_BxD, of_tag(decoded.hidden_BxTxD)),
        cache=append(cache, *decoded.new, (tokens.length_B + 1) * live_C, bias_CxT),
        next_pos_B=rows.put(state.next_pos_B, tokens.next_pos_B + 1),
        received_BxP=received_BxP,
        pending_B=state.pending_B & ~done_B,
        closing_B=state.closing_B | (done_B & state.rows.reattention.closes_B),
        rollout=dataclasses.replace(
            rollout,
            inserted_B=rollout.inserted_B + done_B,
            selected_BxExX=rows.put(rollout.selected_BxExX, selected_CxExX),
        ),
    )


def _with_tag(
    reattention: ReattentionConfig, tokens: Inserted, at_CxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Ids, sources, positions and bias of insertions with the tag at `at_CxT` (one-hot): T = Y + 1 slots."""
    one_more = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    ids_CxT = jnp.where(at_CxT, reattention.open_id, one_more(tokens.ids_BxY))
    source_CxT = jnp.where(at_CxT, -1, one_more(tokens.source_BxY))
    pos_CxTx3 = jnp.where(at_CxT[..., None], tokens.next_pos_B[:, None, None], one_more(tokens.pos_BxYx3))
    bias_CxT = jnp.where(at_CxT, 0.0, one_more(tokens.bias_BxY)) if reattention.masks else None
    return ids_CxT, source_CxT, pos_CxTx3, bias_CxT
