"""What the sampling loop carries from token to token."""

from __future__ import annotations

import jax
from flax import struct

from qwenla_jax.model.kv_cache import KeyValues


@struct.dataclass
class SampleState:
    """The loop's carry; every row stands on its own.

    Attributes:
      token: int32 scalar, tokens sampled so far (of the rows that still run).
      hidden_BxD: the hidden state that predicts each row's next token.
      cache: keys and values of the row's own tokens; `cache.length_B` is the next free slot.
      next_pos_B: int32, M-RoPE position of the next token. Carried, not derived from the length, because a picture put
        into the sequence moves it by another amount than it moves the length.
      ids_BxR, logp_BxR, length_B, stopped_B: the growing `types.Rollout`.
    """

    token: jax.Array
    hidden_BxD: jax.Array
    cache: KeyValues
    next_pos_B: jax.Array
    ids_BxR: jax.Array
    logp_BxR: jax.Array
    length_B: jax.Array
    stopped_B: jax.Array
