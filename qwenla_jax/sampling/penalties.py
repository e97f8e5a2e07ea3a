"""Repetition, frequency and presence penalties, as in vLLM."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.types import PromptBatch

NEUTRAL = (0.0, 0.0, 1.0)  # presence, frequency and repetition penalties that change nothing
LARGEST = 1e20  # bound on penalized logits: far above real ones, far below `layers.MASK_VALUE` in magnitude


@struct.dataclass
class RowPenalties:
    """What a request sets for its rows; all arrays are float32 [B].

    Attributes:
      presence_B: subtracted once from the logit of every token that is in the response; 0: no penalty.
      frequency_B: the same, but once for each occurrence; 0: no penalty.
      repetition_B: of every token that is in the prompt or the response, a positive logit is divided by it and a
        negative one multiplied; 1: no penalty.
    """

    presence_B: Any
    frequency_B: Any
    repetition_B: Any


@struct.dataclass
class TokenCounts:
    """The tokens of prompts and responses.

    Attributes:
      prompt_QxV: bool, whether the token is in the prompt.
      response_BxV: int16 or int32, occurrences in the response; forced tokens count, inserted tokens do not.
    """

    prompt_QxV: jax.Array
    response_BxV: jax.Array


def first_counts(prompts: PromptBatch, group: int, vocab_size: int, most: int) -> TokenCounts:
    """The counts before the first token.

    Args:
      prompts: Q questions.
      group: rows of a question.
      vocab_size: V.
      most: tokens of the longest response.
    """
    Q, P = prompts.ids_QxP.shape
    real_QxP = jnp.arange(P) < jnp.asarray(prompts.length_Q)[:, None]
    at_QxP = jnp.where(real_QxP, prompts.ids_QxP, vocab_size)  # out of range: dropped
    mark = lambda row_V, at_P: row_V.at[at_P].set(True, mode="drop")  # noqa: E731
    dtype = jnp.int16 if most < 2**15 else jnp.int32
    return TokenCounts(
        jax.vmap(mark)(jnp.zeros((Q, vocab_size), bool), at_QxP), jnp.zeros((Q * group, vocab_size), dtype)
    )


def counted(counts: TokenCounts, ids_B: jax.Array, active_B: jax.Array) -> TokenCounts:
    """The counts with one more token in the active rows."""
    add = lambda row_V, token, one: row_V.at[token].add(one)  # noqa: E731
    response_BxV = jax.vmap(add)(counts.response_BxV, ids_B, active_B.astype(counts.response_BxV.dtype))
    return dataclasses.replace(counts, response_BxV=response_BxV)


def penalized(logits_BxV: jax.Array, counts: TokenCounts, penalties: RowPenalties, live_B: jax.Array) -> jax.Array:
    """Logits after the repetition penalty of transformers, and then OpenAI's frequency and presence penalties.

    The logits of a row with neutral penalties are bit-identical.

    Args:
      logits_BxV: float32, without any bias.
      counts, penalties: of the rows.
      live_B: bool, rows that have not ended; if none of them has a penalty, the computation is skipped.
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
