"""The engine's compiled programs: encode images, put a question into a slot, decode some tokens, read a slot."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kv_cache import KeyValues, grow
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.reattention.options import RowReattention
from qwenla_jax.sampling.prefill import prefill
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import SampleState
from qwenla_jax.sampling.sampler import decode_tokens, rollout_of
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch, VisualTokens


@struct.dataclass
class RowSettings:
    """What a request sets for its rows; all arrays are [B].

    Attributes:
      seed_B, step_B, sample_B, temperature_B, top_p_B, limit_B: as in `SampleState`.
      used_B: bool, False for a slot's rows beyond the request's.
      reattention: see there.
    """

    seed_B: Any
    step_B: Any
    sample_B: Any
    temperature_B: Any
    top_p_B: Any
    limit_B: Any
    used_B: Any
    reattention: RowReattention


class Report(NamedTuple):
    """What the host reads after a loop.

    Attributes:
      ids_BxT: int32, each row's tokens of this loop, as many as its length has grown by.
      length_B, stopped_B: of the responses.
      filled_B: int32, filled slots of the cache.
    """

    ids_BxT: jax.Array
    length_B: jax.Array
    stopped_B: jax.Array
    filled_B: jax.Array


class SlotPrograms(NamedTuple):
    """Compiled functions; the state that `insert` and `decode` take is donated, and written in place.

    Attributes:
      encode: (params, vision) -> visual tokens [Z, D], padded.
      insert: (params, state, visual tokens, one question, its RowSettings, slot) -> state.
      decode: (size, most, params, state, bias, cancelled_B) -> state, Report; size and most are static.
      read: (state, slot) -> Rollout of the slot's rows.
    """

    encode: Any
    insert: Any
    decode: Any
    read: Any


# Engines of one model and options share their programs, as calls of one jitted function do.
@functools.lru_cache(maxsize=8)
def slot_programs(
    config: ModelConfig, options: SampleOptions, visual_tokens: int, prompt_tokens: int, cache_slots: int, steps: int
) -> SlotPrograms:
    """The programs of an engine.

    Args:
      config, options: see there; temperature and top_p are the rows' own.
      visual_tokens: Z, most visual tokens of a question.
      prompt_tokens: P, most tokens of a prompt.
      cache_slots: S, most slots of a row's own tokens.
      steps: most tokens of a row in one loop.
    """
    model = QwenVL(config)

    def encode(params: Params, vision: VisionBatch) -> jax.Array:
        visual_ZxD = model.apply({"params": params}, vision, method="encode")
        return jnp.pad(visual_ZxD, [(0, visual_tokens - len(visual_ZxD)), (0, 0)])

    def insert(
        params: Params, state: SampleState, visual_ZxD: jax.Array, prompts: PromptBatch, rows: RowSettings, slot: Any
    ) -> SampleState:
        one = prefilled(model, options, prompt_tokens, cache_slots, params, visual_ZxD, prompts, rows)
        return put_slot(state, one, slot)

    def decode(
        size: int, most: int, params: Params, state: SampleState, logit_bias_V: jax.Array, cancelled_B: jax.Array
    ) -> tuple[SampleState, Report]:
        whole, before_B = state.cache, state.length_B
        state = dataclasses.replace(
            state,
            steps=jnp.int32(0),
            stopped_B=state.stopped_B | cancelled_B,
            pending_B=state.pending_B & ~cancelled_B,
            cache=_first_slots(whole, size),
        )
        state = decode_tokens(model, options, params, logit_bias_V, most, state, steps)
        at_BxT = jnp.minimum(before_B[:, None] + jnp.arange(steps), options.max_new_tokens - 1)
        ids_BxT = jnp.take_along_axis(state.ids_BxR, at_BxT, axis=1)
        report = Report(ids_BxT, state.length_B, state.stopped_B, state.cache.length_B)
        return dataclasses.replace(state, cache=_with_first_slots(whole, state.cache)), report

    def read(state: SampleState, slot: Any) -> Rollout:
        G = options.group_size
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot * G, G), rollout_of(state))

    return SlotPrograms(
        jax.jit(encode),
        jax.jit(insert, donate_argnums=1),
        jax.jit(decode, static_argnums=(0, 1), donate_argnums=3),
        jax.jit(read),
    )


def prefilled(
    model: QwenVL,
    options: SampleOptions,
    prompt_tokens: int,
    cache_slots: int,
    params: Params,
    visual_ZxD: jax.Array,
    prompts: PromptBatch,
    rows: RowSettings,
) -> SampleState:
    """The state of questions before their first token, with keys, values and settings of the engine's sizes.

    Args: as in `slot_programs` and `SlotPrograms.insert`.
    """
    state = prefill(
        model,
        options,
        params,
        VisualTokens(visual_ZxD),
        prompts,
        rows.seed_B,
        rows.step_B,
        rows.sample_B,
        rows.reattention,
    )
    return dataclasses.replace(
        state,
        temperature_B=rows.temperature_B,
        top_p_B=rows.top_p_B,
        limit_B=rows.limit_B,
        stopped_B=~rows.used_B,
        prefix=grow(state.prefix, prompt_tokens),
        cache=grow(state.cache, cache_slots),
    )


def put_slot(state: SampleState, one: SampleState, slot: jax.Array) -> SampleState:
    """The state with a slot's rows replaced by those of a state of one question; nothing of the old rows stays."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        if not whole.ndim:
            return whole  # `steps`
        axis = 1 if whole.ndim == 5 else 0  # keys and values have layers first
        shape = list(whole.shape)
        shape[axis] = part.shape[axis]
        part = jnp.pad(part, [(0, size - own) for size, own in zip(shape, part.shape, strict=True)])
        at = slot * part.shape[axis]
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), at, axis)

    return jax.tree.map(put, state, one)


def _first_slots(cache: KeyValues, size: int) -> KeyValues:
    return dataclasses.replace(
        cache,
        k_LxBxSxKxH=cache.k_LxBxSxKxH[:, :, :size],
        v_LxBxSxKxH=cache.v_LxBxSxKxH[:, :, :size],
        bias_BxS=None if cache.bias_BxS is None else cache.bias_BxS[:, :size],
    )


def _with_first_slots(cache: KeyValues, first: KeyValues) -> KeyValues:
    write = lambda whole, part: jax.lax.dynamic_update_slice(whole, part, [0] * whole.ndim)  # noqa: E731
    return jax.tree.map(write, cache, first)
