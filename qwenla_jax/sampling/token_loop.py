"""The loop over tokens, insertions included, of all rows of a state."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import SampleState
from qwenla_jax.sampling.step import decode_step, insertion_rows, run_insertions

Carry = tuple[SampleState, jax.Array, jax.Array]

# Reading the weights takes about as long as computing this many tokens: a step of fewer rows is not cheaper.
STEP_TOKENS = 64


def decode_tokens(
    model: QwenVL,
    options: SampleOptions,
    sizes: tuple[int, ...],
    params: Params,
    logit_bias_V: jax.Array,
    state: SampleState,
    steps: jax.Array,
    awaited_Q: jax.Array,
) -> SampleState:
    """Decodes until all rows have ended, or after `steps` steps, or until an awaited question has ended.

    A row that samples `<REFLECTION>` and may insert becomes pending. Insertions run when the pending rows fill a chunk,
    when no other row is live, or when rows have been pending for about as many steps as the call costs. A row's result
    does not depend on the rows that share its call: the padded length of its insertion depends on the row alone.

    Args:
      model, options: static.
      sizes: static, ascending lengths that insertions are padded to; the last fits every insertion.
      params: in the compute type.
      logit_bias_V: float32, see `token.suppression_bias`.
      state: the state.
      steps: int32 scalar.
      awaited_Q: bool, questions that end the loop when they end.
    """
    chunk = insertion_rows(options, len(state.pending_B)) // options.shards
    call_tokens = chunk * options.shards * (max(sizes, default=0) + 1)
    patience = -(-call_tokens // max(STEP_TOKENS, len(state.pending_B)))
    size_B = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), state.rows.reattention.slots_B)

    def goes_on(carry: Carry) -> jax.Array:
        state, n, _ = carry
        live_B = state.live_B
        ended_Q = ~live_B.reshape(len(awaited_Q), -1).any(1)
        return live_B.any() & (n < steps) & ~jnp.any(awaited_Q & ended_Q)

    def token(carry: Carry) -> Carry:
        state, n, waited = carry
        waited = waited + state.pending_B.any()
        return decode_step(model, options, params, logit_bias_V, state), n + 1, waited

    def takes_token(carry: Carry) -> jax.Array:
        state, _, waited = carry
        full = state.pending_B.reshape(options.shards, -1).sum(1).max() >= chunk
        return goes_on(carry) & ~full & (waited < patience) & jnp.any(state.live_B & ~state.pending_B)

    def insert(number: int, state: SampleState) -> SampleState:
        with jax.named_scope("insertions"):
            return run_insertions(model, options, params, state, wanted(number, state), sizes[number])

    def wanted(number: int, state: SampleState) -> jax.Array:
        return state.pending_B & (size_B == number)

    def turn(carry: Carry) -> Carry:
        state, n, _ = jax.lax.while_loop(takes_token, token, carry)
        for number in range(len(sizes)):
            left = functools.partial(lambda number, state: wanted(number, state).any(), number)
            state = jax.lax.while_loop(left, functools.partial(insert, number), state)
        return state, n, jnp.int32(0)

    start = (state, jnp.int32(0), jnp.int32(0))
    state, *_ = jax.lax.while_loop(goes_on, turn if sizes else token, start)
    return state
