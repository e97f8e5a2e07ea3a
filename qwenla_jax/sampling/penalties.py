"""Penalties on tokens that have been before: repetition, frequency and presence, in vLLM's sense."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.types import PromptBatch

NEUTRAL = (0.0, 0.0, 1.0)  # presence, frequency and repetition penalty of a row without any
LARGEST = 1e20  # of a penalized logit: far above any other, far below what suppresses a token


@struct.dataclass
class RowPenalties:
    """What a request sets for its rows; all arrays are float32 [B].

    Attributes:
      presence_B, frequency_B: subtracted from the logit of a token of the response, once and for each time that it has
        been; 0: nothing.
      repetition_B: divides the logit of a token of prompt or response where it is positive, else multiplies it; 1:
        nothing.
    """

    presence_B: Any
    frequency_B: Any
    repetition_B: Any


@struct.dataclass
class TokenCounts:
    """Which tokens have been.

    Attributes:
      prompt_QxV: bool, whether the prompt has the token.
      response_BxV: int16 or int32, how often the response has it; inserted tokens are none of it, forced ones are.
    """

    prompt_QxV: jax.Array
    response_BxV: jax.Array


def first_counts(prompts: PromptBatch, group: int, vocab_size: int, most: int) -> TokenCounts:
    """The counts of rows before their first token.

    Args:
      prompts: Q questions.
      group: rows of a question.
      vocab_size: V.
      most: tokens of the longest response.
    """
    Q, P = prompts.ids_QxP.shape
    real_QxP = jnp.arange(P) < jnp.asarray(prompts.length_Q)[:, None]
    at_QxP = jnp.where(real_QxP, prompts.ids_QxP, vocab_size)  # beyond the last: dropped
    mark = lambda row_V, at_P: row_V.at[at_P].set(True, mode="drop")  # noqa: E731
    dtype = jnp.int16 if most < 2**15 else jnp.int32
    return TokenCounts(
        jax.vmap(mark)(jnp.zeros((Q, vocab_size), bool), at_QxP), jnp.zeros((Q * group, vocab_size), dtype)
    )


def counted(counts: TokenCounts, ids_B: jax.Array, active_B: jax.Array) -> TokenCounts:
    """The counts with one token more in the active rows."""
    add = lambda row_V, token, one: row_V.at[token].add(one)  # noqa: E731
    response_BxV = jax.vmap(add)(counts.response_BxV, ids_B, active_B.astype(counts.response_BxV.dtype))
    return dataclasses.replace(counts, response_BxV=response_BxV)


def penalized(logits_BxV: jax.Array, counts: TokenCounts, penalties: RowPenalties, live_B: jax.Array) -> jax.Array:
    """Logits after the penalties: repetition first, as transformers has it, then OpenAI's frequency and presence.

    A row without penalties keeps its bits.

    Args:
      logits_BxV: float32, without any bias.
      counts, penalties: of the rows.
      live_B: bool, rows that go on; where none of them has a penalty nothing is computed.
    """
    presence_Bx1, frequency_Bx1, repetition_Bx1 = (
        x[:, None] for x in (penalties.presence_B, penalties.frequency_B, penalties.repetition_B)
    )

    def apply(logits_BxV: jax.Array) -> jax.Array:
        said_BxV = counts.response_BxV
        group = len(said_BxV) // len(counts.prompt_QxV)
        seen_BxV = jnp.repeat(counts.prompt_QxV, group, axis=0) | (said_BxV > 0)
        repeated_BxV = jnp.where(logits_BxV > 0, logits_BxV / repetition_Bx1, logits_BxV * repetition_Bx1)
        logits_BxV = jnp.where(seen_BxV, repeated_BxV, logits_BxV)
        logits_BxV = logits_BxV - frequency_Bx1 * said_BxV - presence_Bx1 * (said_BxV > 0)
        return jnp.clip(logits_BxV, -LARGEST, LARGEST)

    asks_Bx1 = live_B[:, None] & ((presence_Bx1 != 0) | (frequency_Bx1 != 0) | (repetition_Bx1 != 1))
    return jax.lax.cond(jnp.any(asks_Bx1), apply, lambda x: x, logits_BxV)
