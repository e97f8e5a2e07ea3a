"""From prompt to last token in one compiled program."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwenla_jax.model.kv_cache import KeyValues, append, empty_cache, grow
from qwenla_jax.model.qwen_vl import Params, QwenVL, logits_of
from qwenla_jax.sampling.logits import choose, token_keys
from qwenla_jax.sampling.state import SampleState
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
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.group_size < 1 or self.max_new_tokens < 1:
            raise ValueError("group_size and max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0 and top_p above 0 and at most 1")


def encode_prompts(
    model: QwenVL, params: Params, vision: VisionBatch, prompts: PromptBatch
) -> tuple[jax.Array, KeyValues]:
    """Runs pictures and prompts once.

    Returns:
      the hidden state [Q, D] of each prompt's last token, and the prompts' keys and values.
    """
    variables = {"params": params}
    visual_ZxD = model.apply(variables, vision, method="encode")
    x_QxPxD = model.apply(variables, prompts.ids_QxP, prompts.visual_QxP, visual_ZxD, method="embed")
    hidden_QxPxD, (k, v) = model.apply(variables, x_QxPxD, prompts.pos_QxPx3, method="decode")
    last_Qx1x1 = (prompts.length_Q - 1)[:, None, None]
    hidden_QxD = jnp.take_along_axis(hidden_QxPxD, last_Qx1x1, axis=1)[:, 0]
    return hidden_QxD, KeyValues(k, v, prompts.length_Q)


def text_positions(first_B: jax.Array, tokens: int) -> jax.Array:
    """M-RoPE positions [B, T, 3] of `tokens` text tokens from position `first_B` on: the same on all three axes."""
    pos_BxT = first_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return jnp.broadcast_to(pos_BxT[..., None], (*pos_BxT.shape, 3))


def sample(
    model: QwenVL,
    options: SampleOptions,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    bias_V: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    sample_B: jax.Array,
) -> Rollout:
    """Samples G responses to each of Q prompts. Pure; compile it with `model` and `options` bound.

    A prompt and its pictures are encoded once and shared by its G rows. The loop ends when every row has stopped.

    Args:
      model, options: static.
      params: the model's parameters.
      vision, prompts: the questions.
      bias_V: float32, see `logits.forbidden_bias`.
      seed, step: uint32 scalars.
      sample_B: uint32 [Q * G], numbers of the samples within the step; a row's randomness is a function of
        (seed, step, its number, its token) alone, whoever else is in the batch.

    Returns:
      The responses, row b to question b // G.
    """
    cfg = model.config
    # Once, and not at every token: the layers would cast what is kept in another type than is computed in.
    params = jax.tree.map(lambda x: x.astype(cfg.dtype), params)
    G, R = options.group_size, options.max_new_tokens
    Q = prompts.ids_QxP.shape[0]
    B = Q * G
    hidden_QxD, prefix = encode_prompts(model, params, vision, prompts)
    stop_ids = jnp.asarray(options.stop_ids, jnp.int32)

    def one_token(state: SampleState) -> SampleState:
        token_B = jnp.broadcast_to(state.token, (B,))
        keys_B = token_keys(seed, step, sample_B, token_B)
        logits_BxV = logits_of(params, state.hidden_BxD)
        ids_B, logp_B = choose(logits_BxV, bias_V, options.temperature, options.top_p, keys_B)
        live_B = ~state.stopped_B
        ids_B = jnp.where(live_B, ids_B, options.stop_ids[0])
        # A row that has stopped keeps running with the others: its tokens fall behind its length and are never read.
        x_Bx1xD = model.apply({"params": params}, ids_B[:, None], None, None, method="embed")
        pos_Bx1x3 = text_positions(state.next_pos_B, 1)
        hidden_Bx1xD, (k, v) = model.apply(
            {"params": params}, x_Bx1xD, pos_Bx1x3, prefix, state.cache, method="decode"
        )
        return SampleState(
            token=state.token + 1,
            hidden_BxD=hidden_Bx1xD[:, 0],
            cache=append(state.cache, KeyValues(k, v, jnp.ones((B,), jnp.int32))),
            next_pos_B=state.next_pos_B + 1,
            ids_BxR=jax.lax.dynamic_update_slice(state.ids_BxR, ids_B[:, None], (0, state.token)),
            logp_BxR=jax.lax.dynamic_update_slice(
                state.logp_BxR, jnp.where(live_B, logp_B, 0.0)[:, None], (0, state.token)
            ),
            length_B=state.length_B + live_B,
            stopped_B=state.stopped_B | jnp.isin(ids_B, stop_ids),
        )

    text = cfg.text
    start = SampleState(
        token=jnp.zeros((), jnp.int32),
        hidden_BxD=jnp.repeat(hidden_QxD, G, axis=0),
        cache=empty_cache(text.num_layers, B, 0, text.num_kv_heads, text.head_dim, cfg.dtype),
        next_pos_B=jnp.repeat(prompts.next_pos_Q, G),
        ids_BxR=jnp.full((B, R), options.stop_ids[0], jnp.int32),
        logp_BxR=jnp.zeros((B, R), jnp.float32),
        length_B=jnp.zeros((B,), jnp.int32),
        stopped_B=jnp.zeros((B,), bool),
    )
    state = start
    for slots in cache_sizes(R):
        # Every token reads the whole cache, so a short one first; the loop's body is compiled once for each size.
        state = jax.lax.while_loop(
            lambda state, slots=slots: (state.token < slots) & ~jnp.all(state.stopped_B),
            one_token,
            state.replace(cache=grow(state.cache, slots)),
        )
    return Rollout(state.ids_BxR, state.logp_BxR, state.length_B, state.stopped_B)


def cache_sizes(max_new_tokens: int) -> tuple[int, ...]:
    """Slots of a row's cache as its response grows: a quarter, a half and all of the longest, in multiples of 8."""
    parts = {min(max_new_tokens, -(-max_new_tokens // (8 * n)) * 8) for n in (4, 2)}
    return tuple(sorted(parts | {max_new_tokens}))
