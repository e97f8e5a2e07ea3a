"""When images are re-inserted: the modes, and which `<REFLECTION>` tags get an insertion."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwenla_jax.config.shared_options import CONTENTS, FORMS, MODES, ReattentionOptions
from qwenla_jax.types import Array, PromptBatch, ReinsertedImages


@dataclasses.dataclass(frozen=True)
class ReattentionConfig(ReattentionOptions):
    """How images are re-inserted (paper, section Visual re-attention), with the ids that programs need; static.

    `form` gives the same logits either way; the paper is silent on the cap, the budget and the delimiters.

    Attributes:
      open_id, close_id: ids of `<REFLECTION>` and `</REFLECTION>`.
      by_row: every row has a `RowReattention` of its own; there is room for all visual tokens, and attention counts.

    Raises:
      ValueError: a value out of its range.
    """

    open_id: int = -1
    close_id: int = -1
    by_row: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.mode not in MODES or self.form not in FORMS:
            raise ValueError(f"mode {self.mode!r} and form {self.form!r}: expected one of {MODES} and one of {FORMS}")
        if self.content not in CONTENTS:
            raise ValueError(f"content {self.content!r}: expected one of {CONTENTS}")
        if not 0 <= self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio: got {self.keep_ratio}, expected a number from 0 to 1")
        if self.max_insertions < 0 or self.rows_at_once < 1:
            raise ValueError("max_insertions must be at least 0 and rows_at_once at least 1")
        if self.max_inserted_tokens is not None and self.max_inserted_tokens < 0:
            raise ValueError(f"max_inserted_tokens: got {self.max_inserted_tokens}, expected at least 0 or None")
        if self.mode != "none" and (self.open_id < 0 or self.close_id < 0):
            raise ValueError("a mode with insertions needs the ids of <REFLECTION> and </REFLECTION>")

    @property
    def inserts(self) -> bool:
        """Whether anything is ever put in."""
        return self.mode != "none" and self.max_insertions > 0 and self.selected_ratio > 0

    @property
    def selected_ratio(self) -> float:
        """The share of the visual tokens that an insertion shows."""
        return self.keep_ratio if self.mode == "route" and not self.by_row else 1.0

    @property
    def selects(self) -> bool:
        """Whether an insertion shows some of the visual tokens, not all."""
        return self.inserts and (self.by_row or self.selected_ratio < 1)

    @property
    def uses_attention(self) -> bool:
        """Whether they are selected by the attention that they received."""
        return self.selects and (self.by_row or self.mode == "route")

    @property
    def masks(self) -> bool:
        """Whether tokens that are not selected are inserted too, masked by a bias."""
        return self.selects and self.form == "bias"


TEXT_ONLY = ReattentionConfig()


@struct.dataclass
class RowReattention:
    """What may differ by row within one program.

    Attributes:
      allowed_B: int32, most insertions; -1 in a row of mode none, whose reflections are not counted as skipped.
      shown_B: int32, visual tokens that an insertion shows.
      slots_B: int32, slots that an insertion takes, masked ones included.
      closes_B: bool, whether `</REFLECTION>` is forced after an insertion (mode vision_only).
    """

    allowed_B: Array
    shown_B: Array
    slots_B: Array
    closes_B: Array


def row_reattention(options: ReattentionConfig, prompts: PromptBatch, group_size: int = 1) -> RowReattention:
    """The same options for all rows, G of each prompt. Of prompts on the host it is computed there, by no program."""
    xp = _numpy_of(prompts.length_Q)
    allowed_Q = allowed_insertions(options, prompts)
    if options.mode == "none":
        allowed_Q = allowed_Q - 1
    shown_Q = slots_Q = xp.zeros_like(allowed_Q)
    if options.inserts and prompts.block is not None:
        shown_Q, slots_Q = selected_tokens(options, prompts.block), inserted_slots(options, prompts.block)
    closes_Q = xp.full(allowed_Q.shape, options.mode == "vision_only")
    return jax.tree.map(lambda x: x.repeat(group_size), RowReattention(allowed_Q, shown_Q, slots_Q, closes_Q))


def _numpy_of(x: Array) -> Any:
    """numpy for an array on the host, else jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def selected_tokens(options: ReattentionConfig, block: ReinsertedImages) -> Array:
    """How many of each prompt's visual tokens an insertion shows: all, or ceil(share * all). int32 [Q]."""
    xp = _numpy_of(block.tokens_QxN)
    tokens_Q = xp.sum(block.tokens_QxN, axis=1, dtype=np.int32)
    if not options.selects:
        return tokens_Q
    # No floating-point product gives the ceiling for every share and number of tokens: a table of exact ones does.
    share = exact_ratio(options.selected_ratio)
    selected = [math.ceil(share * tokens) for tokens in range(block.source_QxX.shape[1] + 1)]
    return xp.asarray(selected, np.int32)[tokens_Q]


def exact_ratio(share: float) -> Fraction:
    """The ratio as written: 0.1 is exactly a tenth, though the float is a little more, and 1 / 3 a third.

    It is the fraction with a denominator up to a million that rounds to this float. There is at most one; where there
    is none, it is the float's shortest decimal.
    """
    fraction = Fraction(share).limit_denominator(10**6)
    return fraction if float(fraction) == share else Fraction(repr(float(share)))


def inserted_slots(options: ReattentionConfig, block: ReinsertedImages) -> Array:
    """How many slots an insertion takes, masked ones included. int32 [Q]."""
    if not options.selects or options.masks:
        return block.length_Q
    tokens_Q = _numpy_of(block.tokens_QxN).sum(block.tokens_QxN, axis=1, dtype=np.int32)
    return block.length_Q - tokens_Q + selected_tokens(options, block)


def most_slots(options: ReattentionConfig, block: ReinsertedImages | None) -> int:
    """The Y slots that hold an insertion of any prompt of a batch; static, from shapes alone."""
    if block is None or not options.inserts:
        return 0
    X, N = block.source_QxX.shape[1], block.tokens_QxN.shape[1]
    if not options.selects or options.masks:
        return X
    return min(X, math.ceil(exact_ratio(options.selected_ratio) * X) + 2 * N)


def allowed_insertions(options: ReattentionConfig, prompts: PromptBatch) -> Array:
    """How many insertions a response to each prompt may have.

    Returns:
      int32 [Q]: the cap, or as many as the token budget allows if fewer; 0 for a prompt without an image.
    """
    block, xp = prompts.block, _numpy_of(prompts.length_Q)
    if not options.inserts or block is None:
        return xp.zeros(prompts.length_Q.shape, np.int32)
    allowed_Q = xp.full(block.length_Q.shape, options.max_insertions, np.int32)
    if options.max_inserted_tokens is not None:
        slots_Q = xp.maximum(inserted_slots(options, block), 1)
        allowed_Q = xp.minimum(allowed_Q, options.max_inserted_tokens // slots_Q)
    return xp.where(block.length_Q > 0, allowed_Q, 0)


def find_insertions(
    ids_BxR: jax.Array, length_B: jax.Array, allowed_B: jax.Array, open_id: int
) -> tuple[jax.Array, jax.Array]:
    """Which tokens of given responses follow an insertion: the first `<REFLECTION>` tags, as many as are allowed.

    A tag that is a response's last token gets none: no token after it could attend to the images.

    Returns:
      bool [B, R], and int32 [B, R]: the number of insertions up to each token, one right before it included.
    """
    tag_BxR = (ids_BxR == open_id) & (jnp.arange(ids_BxR.shape[1]) + 1 < length_B[:, None])
    number_BxR = jnp.cumsum(tag_BxR, axis=1)
    inserts_BxR = tag_BxR & (number_BxR <= allowed_B[:, None])
    return inserts_BxR, jnp.minimum(number_BxR, allowed_B[:, None]).astype(jnp.int32)


def forced_tokens(
    options: ReattentionConfig, prompts: PromptBatch, ids_BxR: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Tokens of given responses that were not sampled: in mode "vision_only" the token after a tag with an insertion.

    Returns:
      bool [B, R]; they carry no loss.
    """
    if options.mode != "vision_only":
        return jnp.zeros(ids_BxR.shape, bool)
    allowed_B = jnp.repeat(allowed_insertions(options, prompts), len(ids_BxR) // len(prompts.length_Q))
    inserts_BxR, _ = find_insertions(ids_BxR, length_B, allowed_B, options.open_id)
    return jnp.pad(inserts_BxR[:, :-1], [(0, 0), (1, 0)])
