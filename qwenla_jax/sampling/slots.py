"""The engine's compiled programs: encode images, prefill questions, put them into slots, decode."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.model.pages import Pages, empty_pages
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.parallel.distributed import is_multiprocess
from qwenla_jax.parallel.sharding import batch_sharding, replicated
from qwenla_jax.reattention.options import RowReattention, row_reattention
from qwenla_jax.sampling.param_layout import cast
from qwenla_jax.sampling.penalties import RowPenalties, first_counts
from qwenla_jax.sampling.prefill import encode_prompts
from qwenla_jax.sampling.recent_logprobs import RecentLogprobs, no_logprobs
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import RowSettings, SampleState
from qwenla_jax.sampling.slot_sizes import SlotSizes, empty_prompts
from qwenla_jax.sampling.token_loop import decode_tokens
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch, VisualTokens


@struct.dataclass
class Prefilled:
    """Prefilled questions, ready to be put into slots.

    Attributes:
      prompts: the questions.
      hidden_QxD: the hidden state of each prompt's last token.
      prefix: keys and values of the prompts.
      prompt_QxPxD: their embeddings.
    """

    prompts: PromptBatch
    hidden_QxD: jax.Array
    prefix: KeyValues
    prompt_QxPxD: jax.Array


# Steps of a loop that runs until rows end: more than the longest response, as rows may wait for insertions.
FOREVER = 2**31 - 1
PAGE_HEADS, PROMPT_HEADS = 2, 3  # the axis of the heads in `Pages` and in `KeyValues`


class SlotPrograms(NamedTuple):
    """Compiled functions; the state that `insert` and `decode` take is donated, and written in place.

    Attributes:
      empty: () -> a state without a question.
      encode: (params, vision) -> VisualTokens.
      prefill: (params, vision or VisualTokens, prompts) -> Prefilled.
      insert: (state, Prefilled, RowSettings and used_B of its rows, slot_Q) -> state; slot_Q int32 is the slot of each
        question within its shard, out of range for questions that are left out.
      decode: (params, state, bias, cancelled_B, steps, awaited_Q) -> state, Rollout of all rows, live_B, and their
        RecentLogprobs, or None where none are reported.
    """

    empty: Any
    encode: Any
    prefill: Any
    insert: Any
    decode: Any


def slot_programs(
    config: ModelConfig, options: SampleOptions, sizes: SlotSizes, mesh: Mesh | None = None, params: Any = None
) -> SlotPrograms:
    """The programs of an engine.

    Args:
      config, options: see there; temperature and top_p are the rows' own.
      sizes: see there.
      mesh: devices; None for one. Call the programs in a context of it.
      params: shardings of the parameters on the mesh.
    """
    if mesh is None:
        return _programs_alone(config, options, sizes)
    make = _Functions(config, options, sizes)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    state = jax.tree.map(functools.partial(_sharding, mesh, PAGE_HEADS), jax.eval_shape(make.empty))
    prefilled = jax.eval_shape(functools.partial(_no_questions, config, sizes))
    waiting = jax.tree.map(functools.partial(_sharding, mesh, PROMPT_HEADS), prefilled)
    return SlotPrograms(
        jax.jit(make.empty, out_shardings=state),
        jax.jit(make.encode, in_shardings=(params, rows), out_shardings=rows),
        jax.jit(make.prefill, in_shardings=(params, rows, rows), out_shardings=waiting),
        jax.jit(make.insert, in_shardings=(state, waiting, rows, rows, rows), out_shardings=state, donate_argnums=0),
        jax.jit(
            make.decode,
            in_shardings=(params, state, whole, rows, whole, rows),
            out_shardings=(state, *[whole if is_multiprocess() else rows] * 3),  # every process reads all rows
            donate_argnums=1,
        ),
    )


def rollout_program(
    config: ModelConfig, options: SampleOptions, sizes: SlotSizes, mesh: Mesh, stored: Any, params: Any
) -> Any:
    """A whole rollout (prefill, insert, decode) as one program, for the compiler's analysis of memory and transfers.

    Args:
      config, options, sizes, mesh: as in `slot_programs`; as many questions as slots.
      stored, params: shardings of the parameters as they are given, and as the programs take them.

    Returns:
      jitted (params, vision, prompts, bias, seed, step, sample_B) -> Rollout.
    """
    make, rows, whole = _Functions(config, options, sizes), batch_sharding(mesh), replicated(mesh)
    places = jax.tree.map(functools.partial(_sharding, mesh, PAGE_HEADS), jax.eval_shape(make.empty))
    Q, B = sizes.questions, sizes.questions * options.group_size

    def run(
        given: Params,
        vision: VisionBatch | VisualTokens,
        prompts: PromptBatch,
        logit_bias_V: jax.Array,
        seed: jax.Array,
        step: jax.Array,
        sample_B: jax.Array,
    ) -> Rollout:
        own = jax.lax.with_sharding_constraint(cast(given, config.dtype, options.int8), params)
        visual = make.encode(own, vision) if isinstance(vision, VisionBatch) else vision
        each = lambda value, dtype: jnp.full((B,), value, dtype)  # noqa: E731
        settings = RowSettings(
            each(seed, jnp.uint32),
            each(step, jnp.uint32),
            sample_B,
            each(options.temperature, jnp.float32),
            each(options.top_p, jnp.float32),
            each(0, jnp.int32),
            each(options.max_new_tokens, jnp.int32),
            row_reattention(options.reattention, jax.tree.map(jnp.asarray, prompts), options.group_size),
        )
        state = jax.lax.with_sharding_constraint(make.empty(), places)
        slot_Q = jnp.arange(Q) % (Q // options.shards)
        state = make.insert(state, make.prefill(own, visual, prompts), settings, each(True, bool), slot_Q)
        forever = jnp.int32(FOREVER)
        return make.decode(own, state, logit_bias_V, each(False, bool), forever, jnp.zeros((Q,), bool))[1]

    return jax.jit(
        run,
        in_shardings=(stored, rows, rows, whole, whole, whole, rows),
        out_shardings=whole if is_multiprocess() else rows,
    )


# Engines of one model and options share their programs, as calls of one jitted function do.
@functools.lru_cache(maxsize=16)
def _programs_alone(config: ModelConfig, options: SampleOptions, sizes: SlotSizes) -> SlotPrograms:
    make = _Functions(config, options, sizes)
    return SlotPrograms(
        jax.jit(make.empty),
        jax.jit(make.encode),
        jax.jit(make.prefill),
        jax.jit(make.insert, donate_argnums=0),
        jax.jit(make.decode, donate_argnums=1),
    )


class _Functions:
    """The functions that `SlotPrograms` compiles."""

    def __init__(self, config: ModelConfig, options: SampleOptions, sizes: SlotSizes) -> None:
        self._model, self._options, self._sizes = QwenVL(config), options, sizes

    def encode(self, params: Params, vision: VisionBatch) -> VisualTokens:
        visual_ZxD = self._model.apply({"params": params}, vision, method="encode")
        missing = self._sizes.visual - len(visual_ZxD)
        if vision.shards == 1 and missing > 0:  # one size, so that `prefill` compiles once for each bucket of prompts
            visual_ZxD = jnp.pad(visual_ZxD, [(0, missing), (0, 0)])
        return VisualTokens(visual_ZxD, vision.shards)

    def prefill(self, params: Params, vision: VisionBatch | VisualTokens, prompts: PromptBatch) -> Prefilled:
        content = self._options.reattention.content
        return Prefilled(prompts, *encode_prompts(self._model, params, vision, prompts, content))

    def insert(
        self, state: SampleState, prefilled: Prefilled, rows: RowSettings, used_B: jax.Array, slot_Q: jax.Array
    ) -> SampleState:
        one = first_state(self._model.config, self._options, self._sizes, prefilled, rows, used_B)
        return put_slots(state, one, slot_Q, self._options.shards)

    def decode(
        self,
        params: Params,
        state: SampleState,
        logit_bias_V: jax.Array,
        cancelled_B: jax.Array,
        steps: jax.Array,
        awaited_Q: jax.Array,
    ) -> tuple[SampleState, Rollout, jax.Array, RecentLogprobs | None]:
        rollout = dataclasses.replace(state.rollout, stopped_B=state.rollout.stopped_B | cancelled_B)
        state = dataclasses.replace(state, pending_B=state.pending_B & ~cancelled_B, rollout=rollout)
        sizes = self._sizes.insertions
        state = decode_tokens(self._model, self._options, sizes, params, logit_bias_V, state, steps, awaited_Q)
        return state, state.rollout, state.live_B, state.logprobs

    def empty(self) -> SampleState:
        config, options, sizes = self._model.config, self._options, self._sizes
        B = sizes.questions * options.group_size
        first = functools.partial(first_state, config, options, sizes)
        shapes = jax.eval_shape(lambda: first(_no_questions(config, sizes), no_rows(B, options), jnp.zeros((B,), bool)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # with limit 0 no row is live


def _sharding(mesh: Mesh, heads: int, x: Any) -> NamedSharding:
    """The sharding of keys and values, whose axes are layers, rows, ... and heads, or of an array of rows."""
    if x.ndim < 5:
        return batch_sharding(mesh)
    tensor = "tensor" if x.shape[heads] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), *[None] * (heads - 2), tensor))


def _no_questions(config: ModelConfig, sizes: SlotSizes) -> Prefilled:
    """Zero-filled questions for all slots; for their shapes."""
    text, Q, P = config.text, sizes.questions, sizes.prompt
    zeros = lambda *shape: jnp.zeros(shape, config.dtype)  # noqa: E731
    keys = zeros(text.num_layers, Q, P, text.num_kv_heads, text.head_dim)
    prefix = KeyValues(keys, keys, jnp.zeros((Q,), jnp.int32))
    return Prefilled(
        empty_prompts(sizes, Q), zeros(Q, text.hidden_size), prefix, zeros(Q, P, config.vision.token_values)
    )


def no_rows(rows: int, options: SampleOptions) -> RowSettings:
    """Settings of unused rows."""
    u, i, f, no = (jnp.zeros((rows,), dtype) for dtype in (jnp.uint32, jnp.int32, jnp.float32, bool))
    penalties = RowPenalties(f, f, f) if options.penalties else None
    top = None if options.top_logprobs is None else i
    return RowSettings(u, u, u, f, f, i, i, RowReattention(i, i, i, no), penalties, top)


def first_state(
    config: ModelConfig,
    options: SampleOptions,
    sizes: SlotSizes,
    prefilled: Prefilled,
    rows: RowSettings,
    used_B: jax.Array,
) -> SampleState:
    """The state of prefilled questions before their first token, padded to the engine's sizes."""
    text, reattention, G = config.text, options.reattention, options.group_size
    Q, R = len(prefilled.hidden_QxD), options.max_new_tokens
    B, P = Q * G, sizes.prompt
    E, X = (reattention.max_insertions, sizes.block[0]) if sizes.insertions else (0, 0)
    no_B, zero_B = jnp.zeros((B,), bool), jnp.zeros((B,), jnp.int32)
    cache = empty_pages(
        text.num_layers,
        B,
        *options.pages(sizes.cache(options)),
        text.num_kv_heads,
        text.head_dim,
        config.dtype,
        reattention.masks,
    )
    return SampleState(
        prompts=_in_sizes(prefilled.prompts, empty_prompts(sizes, Q)),
        prompt_QxPxD=_widened(prefilled.prompt_QxPxD, (Q, P, config.vision.token_values)),
        prefix=_in_pages(prefilled.prefix, *options.pages(P)),
        rows=rows,
        hidden_BxD=jnp.repeat(prefilled.hidden_QxD, G, axis=0),
        cache=cache,
        next_pos_B=jnp.repeat(prefilled.prompts.next_pos_Q, G),
        received_BxP=jnp.zeros((B, P if reattention.uses_attention else 0), jnp.float32),
        pending_B=no_B,
        closing_B=no_B,
        rollout=Rollout(
            ids_BxR=jnp.full((B, R), options.stop_ids[0], jnp.int32),
            logp_BxR=jnp.zeros((B, R), jnp.float32),
            length_B=zero_B,
            stopped_B=~used_B,
            inserted_B=zero_B,
            skipped_B=zero_B,
            selected_BxExX=jnp.zeros((B, E, X), bool),
        ),
        counts=first_counts(prefilled.prompts, G, text.vocab_size, R) if options.penalties else None,
        logprobs=None if options.top_logprobs is None else no_logprobs(B, sizes.reported, options.top_logprobs),
    )


def _widened(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])


def _in_sizes(prompts: PromptBatch, like: PromptBatch) -> PromptBatch:
    """Prompts padded to the sizes of `like`; padding is beyond every length, so it is never read."""
    prompts = dataclasses.replace(prompts, block=prompts.block if like.block is not None else None)
    return jax.tree.map(lambda x, like: _widened(jnp.asarray(x, like.dtype), like.shape), prompts, like)


def _in_pages(prefix: KeyValues, pages: int, slots: int) -> Pages:
    def one(x_LxBxSxKxH: jax.Array) -> jax.Array:
        L, B, S, K, H = x_LxBxSxKxH.shape
        wide = jnp.pad(x_LxBxSxKxH, [(0, 0), (0, 0), (0, pages * slots - S), (0, 0), (0, 0)])
        return jnp.swapaxes(wide.reshape(L, B * pages, slots, K, H), 2, 3)

    return Pages(one(prefix.k_LxBxSxKxH), one(prefix.v_LxBxSxKxH), prefix.length_B)


def put_slots(state: SampleState, new: SampleState, slot_Q: jax.Array, shards: int) -> SampleState:
    """The state with questions of `new` written to slots.

    Old keys and values of the rows' cache are not cleared: its lengths become 0, so they are never read.

    Args:
      state: Q questions.
      new: at most Q questions, over the same shards.
      slot_Q: int32, the slot of each new question within its shard; a question whose slot is out of range is left out.
      shards: equal shards of questions and of their rows.
    """
    questions = len(new.prompts.length_Q)

    def put(whole: jax.Array, part: jax.Array, axis: int = 0) -> jax.Array:
        own = part.shape[axis] // questions  # rows of a question
        shape = lambda x: (*x.shape[:axis], shards, x.shape[axis] // (shards * own), own, *x.shape[axis + 1 :])  # noqa: E731
        split = lambda x: x.reshape(shape(x))  # noqa: E731
        write = lambda whole, part, slot: whole.at[(slice(None),) * axis + (slot,)].set(part, mode="drop")  # noqa: E731
        slot_UxW = slot_Q.reshape(shards, -1)
        return jax.vmap(write, (axis, axis, 0), axis)(split(whole), split(part), slot_UxW).reshape(whole.shape)

    keys = lambda whole, part: put(whole, part, 1)  # noqa: E731
    prefix, cache, empty = state.prefix, state.cache, new.cache
    return dataclasses.replace(
        jax.tree.map(put, _without_keys(state), _without_keys(new)),
        prefix=dataclasses.replace(
            prefix,
            k_LxAxKxWxH=keys(prefix.k_LxAxKxWxH, new.prefix.k_LxAxKxWxH),
            v_LxAxKxWxH=keys(prefix.v_LxAxKxWxH, new.prefix.v_LxAxKxWxH),
            length_R=put(prefix.length_R, new.prefix.length_R),
        ),
        cache=dataclasses.replace(
            cache,
            length_R=put(cache.length_R, empty.length_R),
            bias_RxS=jax.tree.map(put, cache.bias_RxS, empty.bias_RxS),  # either may be None
        ),
    )


def _without_keys(state: SampleState) -> Any:
    return dataclasses.replace(state, prefix=None, cache=None)
