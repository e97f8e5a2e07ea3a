"""From prompt to last token in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwenla_jax.model.kv_cache import grow
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.reattention.options import RowReattention, most_slots
from qwenla_jax.sampling.prefill import prefill
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import SampleState
from qwenla_jax.sampling.step import decode_step, insertion_rows, run_insertions
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch


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
    rows: RowReattention | None = None,
) -> Rollout:
    """Samples G responses to each of Q prompts. Pure; compile it with `model` and `options` bound.

    A prompt and its images are encoded once and shared by its G rows. A row that samples `<REFLECTION>` and
    may insert becomes pending. One call runs the images' tokens and the tag of several pending rows, which then
    continue after the tag. The loop ends when every row has ended.

    Args:
      model, options: static.
      params: the model's parameters.
      vision, prompts: the questions; with `PromptBatch.block` where `options.reattention` inserts anything.
      logit_bias_V: float32, see `token.suppression_bias`.
      seed, step: uint32 scalars.
      sample_B: uint32 [Q * G], numbers of the samples within the step; a row's randomness is a function of
        (seed, step, its number, its token) alone, not of the other rows.
      rows: re-attention of each row, where `options.reattention.by_row`; None: `options.reattention` for all.

    Returns:
      The responses, row b to question b // G, without inserted tokens.

    Raises:
      ValueError: the prompts have no `block`, but `options.reattention` inserts.
    """
    reattention = options.reattention
    if reattention.inserts and prompts.block is None:
        raise ValueError(
            f"mode {reattention.mode!r} needs prompts with their `block`; collate them with re-attention options"
        )
    # Cast once: the layers would cast parameters of another type at every token.
    params = jax.tree.map(lambda x: x.astype(model.config.dtype), params)
    state = prefill(model, options, params, vision, prompts, seed, step, sample_B, rows)
    # Every token reads the whole cache, so the cache starts small. The loop's body is compiled once for each size.
    for size, most in cache_room(options, most_slots(reattention, prompts.block)).items():
        state = dataclasses.replace(state, cache=grow(state.cache, size))
        state = decode_tokens(model, options, params, logit_bias_V, most, state)
    return rollout_of(state)


def rollout_of(state: SampleState) -> Rollout:
    """The responses so far."""
    return Rollout(
        state.ids_BxR,
        state.logp_BxR,
        state.length_B,
        state.stopped_B,
        state.inserted_B,
        state.skipped_B,
        state.selected_BxExX,
    )


def decode_tokens(
    model: QwenVL,
    options: SampleOptions,
    params: Params,
    logit_bias_V: jax.Array,
    most: int,
    state: SampleState,
    steps: int | None = None,
) -> SampleState:
    """Decodes, insertions included, until all rows have ended or one has more than `most` filled slots of its cache.

    Args:
      model, options: static.
      params: in the compute type.
      logit_bias_V: float32, see `token.suppression_bias`.
      most: static, see `cache_room`.
      state: the state.
      steps: static; the loop ends when `state.steps` is as large, and an insertion of pending rows has followed.
    """

    def decode(state: SampleState) -> SampleState:
        return decode_step(model, options, params, logit_bias_V, state)

    def insert(state: SampleState) -> SampleState:
        return run_insertions(model, options, params, state)

    room = functools.partial(cache_has_room, most)
    fits = room if steps is None else lambda state: room(state) & (state.steps < steps)
    if options.reattention.inserts:
        return decode_with_insertions(options, decode, insert, fits, room, state)
    return jax.lax.while_loop(fits, decode, state)


def cache_has_room(most: int, state: SampleState) -> jax.Array:
    """Whether there are live rows, and all of them have at most `most` filled slots. bool scalar."""
    has_room_B = state.cache.length_B <= most
    return jnp.any(state.live_B & has_room_B) & jnp.all(~state.live_B | has_room_B)


def decode_with_insertions(
    options: SampleOptions,
    decode: Callable[[SampleState], SampleState],
    insert: Callable[[SampleState], SampleState],
    fits: Callable[[SampleState], jax.Array],
    room: Callable[[SampleState], jax.Array],
    state: SampleState,
) -> SampleState:
    """Decodes tokens until enough rows are pending to fill a chunk, then inserts, while the cache has room.

    Args:
      options: static.
      decode, insert: one token of all active rows; the insertion of a chunk of pending rows.
      fits: whether to go on with tokens.
      room: whether the cache has room for what comes next.
      state: the state.
    """
    chunk = insertion_rows(options, len(state.length_B)) // options.shards

    def takes_token(state: SampleState) -> jax.Array:
        full = state.pending_B.reshape(options.shards, -1).sum(1).max() >= chunk
        return fits(state) & ~full & jnp.any(state.live_B & ~state.pending_B)

    def turn(state: SampleState) -> SampleState:
        state = jax.lax.while_loop(takes_token, decode, state)
        return jax.lax.cond(jnp.any(state.pending_B) & room(state), insert, lambda s: s, state)

    return jax.lax.while_loop(fits, turn, state)


def cache_sizes(max_tokens: int) -> tuple[int, ...]:
    """Slots of a row's cache as its response grows: a quarter, a half and all of the longest, in multiples of 8."""
    parts = {min(max_tokens, -(-max_tokens // (8 * n)) * 8) for n in (4, 2)}
    return tuple(sorted(parts | {max_tokens}))


def cache_room(options: SampleOptions, slots: int) -> dict[int, int]:
    """How far each size of the cache may be filled.

    Args:
      options: static.
      slots: of an insertion, see `reattention.options.most_slots`.

    Returns:
      size -> the most filled slots that leave room for a token, or for an insertion with its tag; ascending. The last
      size has room for every response.
    """
    inserts = options.reattention.inserts
    sizes = cache_sizes(options.max_new_tokens + (options.reattention.max_insertions * slots if inserts else 0))
    if options.cache_block is not None:
        sizes = tuple(sorted({-(-size // options.cache_block) * options.cache_block for size in sizes}))
    return {size: size if size == sizes[-1] else size - (slots + 1 if inserts else 1) for size in sizes}
