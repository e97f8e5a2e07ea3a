"""From prompt to last token in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwenla_jax.model.kv_cache import KeyValues, append, empty_cache, grow
from qwenla_jax.model.qwen_vl import Params, QwenVL, logits_of
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig, allowed_insertions, most_slots
from qwenla_jax.reattention.route import select
from qwenla_jax.reattention.splice import embed_with_sources, insertion
from qwenla_jax.sampling.prefill import encode_prompts, text_positions
from qwenla_jax.sampling.sample_state import RowSubset, SampleState
from qwenla_jax.sampling.token import sample_token, token_keys
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How to sample.

    Attributes:
      group_size: responses a question, G.
      max_new_tokens: longest response, R, the stop token included.
      temperature: 0 is greedy.
      top_p: nucleus; 1 is the whole distribution.
      stop_ids: any of these ends a response.
      look: whether and how a reflection looks at the images again.
      shards: equal runs of rows that lie on different devices; rows of one run only are served together.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    reattention: ReattentionConfig = TEXT_ONLY
    shards: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.group_size < 1 or self.max_new_tokens < 1:
            raise ValueError("group_size and max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0 and top_p above 0 and at most 1")


def sample(
    model: QwenVL,
    options: SampleOptions,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    logit_bias_V: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    sample_B: jax.Array,
) -> Rollout:
    """Samples G responses to each of Q prompts. Pure; compile it with `model` and `options` bound.

    A prompt and its images are encoded once and shared by its G rows. A row that samples `<REFLECTION>` and is to
    look again waits; rows that wait are served together: the images' tokens and the tag are run for them in one go,
    and the state behind the tag continues. The loop ends when every row has stopped.

    Args:
      model, options: static.
      params: the model's parameters.
      vision, prompts: the questions; with `prompts.block` where `options.look` puts anything in.
      logit_bias_V: float32, see `logits.suppression_bias`.
      seed, step: uint32 scalars.
      sample_B: uint32 [Q * G], numbers of the samples within the step; a row's randomness is a function of
        (seed, step, its number, its token) alone, whoever else is in the batch.

    Returns:
      The responses, row b to question b // G. Inserted tokens are no part of them.

    Raises:
      ValueError: the prompts come without the images' block that `options.look` needs.
    """
    cfg, reattention = model.config, options.reattention
    if reattention.inserts and prompts.block is None:
        raise ValueError(f"mode {reattention.mode!r} needs prompts with their `block`; collate them with block options")
    # Once, and not at every token: the layers would cast what is kept in another type than is computed in.
    params = jax.tree.map(lambda x: x.astype(cfg.dtype), params)
    variables = {"params": params}
    G, R = options.group_size, options.max_new_tokens
    Q, P = prompts.ids_QxP.shape
    B = Q * G
    hidden_QxD, prefix, prompt_QxPxD = encode_prompts(model, params, vision, prompts)
    stop_ids = jnp.asarray(options.stop_ids, jnp.int32)
    allowed_B = jnp.repeat(allowed_insertions(reattention, prompts), G)
    Y = most_slots(reattention, prompts.block)
    insert_rows = min(B, -(-reattention.rows_at_once // options.shards) * options.shards)
    return_attention = ("prefix",) if reattention.selects else ()

    def one_token(state: SampleState) -> SampleState:
        logits_BxV = logits_of(params, state.hidden_BxD)
        keys_B = token_keys(seed, step, sample_B, state.length_B)
        ids_B, logp_B = sample_token(logits_BxV, logit_bias_V, options.temperature, options.top_p, keys_B)
        active_B = state.live_B & ~state.pending_B
        forced_B = active_B & state.closing_B
        ids_B = jnp.where(forced_B, reattention.close_id, ids_B)
        here_BxR = active_B[:, None] & (jnp.arange(R) == state.length_B[:, None])
        length_B = state.length_B + active_B
        tag_B = active_B & (ids_B == reattention.open_id) & (length_B < R) & reattention.inserts
        waits_B = tag_B & (state.inserted_B < allowed_B)
        fed_B = active_B & ~waits_B
        # Rows that wait or have stopped run along; what they give is not kept.
        x_Bx1xD = model.apply(variables, ids_B[:, None], None, None, method="embed")
        decoded = model.apply(
            variables,
            x_Bx1xD,
            text_positions(state.next_pos_B, 1),
            prefix,
            state.cache,
            None,
            return_attention,
            method="decode",
        )
        received_BxP = state.received_BxP
        if return_attention:
            received_BxP = received_BxP + jnp.where(fed_B[:, None], decoded.received["prefix"][:, 0], 0.0)
        return state.replace(
            hidden_BxD=jnp.where(fed_B[:, None], decoded.hidden_BxTxD[:, 0], state.hidden_BxD),
            cache=append(state.cache, KeyValues(*decoded.new, fed_B.astype(jnp.int32))),
            next_pos_B=state.next_pos_B + fed_B,
            received_BxP=received_BxP,
            pending_B=state.pending_B | waits_B,
            closing_B=state.closing_B & ~active_B,
            ids_BxR=jnp.where(here_BxR, ids_B[:, None], state.ids_BxR),
            logp_BxR=jnp.where(here_BxR & ~forced_B[:, None], logp_B[:, None], state.logp_BxR),
            length_B=length_B,
            stopped_B=state.stopped_B | (active_B & jnp.isin(ids_B, stop_ids)),
            skipped_B=state.skipped_B + (tag_B & ~waits_B),
        )

    def run_insertions(state: SampleState) -> SampleState:
        rows = RowSubset(state.pending_B, options.shards, insert_rows)
        live_C = rows.wanted_C
        asked = jax.tree.map(lambda x: rows.take(x, 0, G), prompts)
        selected_CxX = select(reattention, asked, rows.take(state.received_BxP))
        block = insertion(reattention, asked, selected_CxX, rows.take(state.next_pos_B))
        # The tag stands right behind the block's last slot.
        at_CxT = jnp.arange(Y + 1) == block.length_B[:, None]
        one_more = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
        ids_CxT = jnp.where(at_CxT, reattention.open_id, one_more(block.ids_BxY))
        source_CxT = jnp.where(at_CxT, -1, one_more(block.source_BxY))
        pos_CxTx3 = jnp.where(at_CxT[..., None], block.next_pos_B[:, None, None], one_more(block.pos_BxYx3))
        bias_CxT = jnp.where(at_CxT, 0.0, one_more(block.bias_BxY)) if reattention.masks else None
        mine = KeyValues(
            rows.take(prefix.k_LxBxSxKxH, 1, G), rows.take(prefix.v_LxBxSxKxH, 1, G), rows.take(prefix.length_B, 0, G)
        )
        cache = KeyValues(
            rows.take(state.cache.k_LxBxSxKxH, 1),
            rows.take(state.cache.v_LxBxSxKxH, 1),
            rows.take(state.cache.length_B),
            None if state.cache.bias_BxS is None else rows.take(state.cache.bias_BxS),
        )
        x_CxTxD = embed_with_sources(model, params, ids_CxT, source_CxT, rows.take(prompt_QxPxD, 0, G))
        decoded = model.apply(variables, x_CxTxD, pos_CxTx3, mine, cache, bias_CxT, return_attention, method="decode")
        cache = append(cache, KeyValues(*decoded.new, (block.length_B + 1) * live_C, bias_CxT))
        of_tag = lambda x: jnp.sum(jnp.where(at_CxT[..., None], x, 0), axis=1)  # noqa: E731
        received_BxP = state.received_BxP
        if return_attention:
            received_BxP = rows.put(received_BxP, rows.take(received_BxP) + of_tag(decoded.received["prefix"]))
        turn_C = rows.take(state.inserted_B)
        now_CxE = jnp.arange(state.selected_BxExX.shape[1]) == turn_C[:, None]
        selected_CxExX = jnp.where(now_CxE[..., None], selected_CxX[:, None], rows.take(state.selected_BxExX))
        done_B = rows.put(jnp.zeros((B,), bool), live_C)
        return state.replace(
            hidden_BxD=rows.put(state.hidden_BxD, of_tag(decoded.hidden_BxTxD)),
            cache=state.cache.replace(
                k_LxBxSxKxH=rows.put(state.cache.k_LxBxSxKxH, cache.k_LxBxSxKxH, 1),
                v_LxBxSxKxH=rows.put(state.cache.v_LxBxSxKxH, cache.v_LxBxSxKxH, 1),
                length_B=rows.put(state.cache.length_B, cache.length_B),
                bias_BxS=None if cache.bias_BxS is None else rows.put(state.cache.bias_BxS, cache.bias_BxS),
            ),
            next_pos_B=rows.put(state.next_pos_B, block.next_pos_B + 1),
            received_BxP=received_BxP,
            pending_B=state.pending_B & ~done_B,
            closing_B=state.closing_B | (done_B & (reattention.mode == "vision_only")),
            inserted_B=state.inserted_B + done_B,
            selected_BxExX=rows.put(state.selected_BxExX, selected_CxExX),
        )

    text = cfg.text
    E, X = (reattention.max_insertions, prompts.block.source_QxX.shape[1]) if reattention.inserts else (0, 0)
    state = SampleState(
        hidden_BxD=jnp.repeat(hidden_QxD, G, axis=0),
        cache=empty_cache(text.num_layers, B, 0, text.num_kv_heads, text.head_dim, cfg.dtype, reattention.masks),
        next_pos_B=jnp.repeat(prompts.next_pos_Q, G),
        received_BxP=jnp.zeros((B, P if return_attention else 0), jnp.float32),
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

    def tokens_until(state: SampleState, going: Callable[[SampleState], jax.Array]) -> SampleState:
        """Single tokens while some row can take one and no chunk of waiting rows is full."""

        def more(state: SampleState) -> jax.Array:
            full = state.pending_B.reshape(options.shards, -1).sum(1).max() >= insert_rows // options.shards
            return going(state) & ~full & jnp.any(state.live_B & ~state.pending_B)

        return jax.lax.while_loop(more, one_token, state)

    sizes = cache_sizes(R + E * Y)
    for slots in sizes:
        # Every token reads the whole cache, so a short one first; the loop's body is compiled once for each size.
        # A size is left while it still has room for a row's token, and for a block with its tag.
        most = slots if slots == sizes[-1] else slots - (Y + 1 if reattention.inserts else 1)
        going = lambda state, most=most: (  # noqa: E731
            jnp.any(state.live_B & (state.cache.length_B <= most))
            & jnp.all(~state.live_B | (state.cache.length_B <= most))
        )
        state = state.replace(cache=grow(state.cache, slots))
        if not reattention.inserts:
            state = jax.lax.while_loop(going, one_token, state)
            continue
        state = jax.lax.while_loop(
            going,
            lambda state, going=going: jax.lax.cond(
                jnp.any((state := tokens_until(state, going)).pending_B) & going(state),
                run_insertions,
                lambda s: s,
                state,
            ),
            state,
        )
    return Rollout(
        state.ids_BxR,
        state.logp_BxR,
        state.length_B,
        state.stopped_B,
        state.inserted_B,
        state.skipped_B,
        state.selected_BxExX,
    )


def cache_sizes(max_tokens: int) -> tuple[int, ...]:
    """Slots of a row's cache as its response grows: a quarter, a half and all of the longest, in multiples of 8."""
    parts = {min(max_tokens, -(-max_tokens // (8 * n)) * 8) for n in (4, 2)}
    return tuple(sorted(parts | {max_tokens}))
