"""Keys and values as explicit values: what the decoder reads, what it returns, and how the two are joined."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KeyValues:
    """Keys and values of all layers for rows of tokens, left-aligned.

    Attributes:
      k_LxBxSxKxH, v_LxBxSxKxH: the keys (already rotated) and values.
      length_B: int32, filled slots of each row; slots from there on are masked.
      bias_BxS: float32, added to every score of the slot's key (`layers.MASK_VALUE` masks it), or None for none.
    """

    k_LxBxSxKxH: jax.Array
    v_LxBxSxKxH: jax.Array
    length_B: jax.Array
    bias_BxS: jax.Array | None = None


def empty_cache(
    num_layers: int, rows: int, slots: int, num_kv_heads: int, head_dim: int, dtype: str, biased: bool = False
) -> KeyValues:
    """A cache of `slots` empty slots a row, with a bias (of 0) where `biased`."""
    zeros = jnp.zeros((num_layers, rows, slots, num_kv_heads, head_dim), dtype)
    bias_BxS = jnp.zeros((rows, slots), jnp.float32) if biased else None
    return KeyValues(zeros, zeros, jnp.zeros((rows,), jnp.int32), bias_BxS)


def grow(cache: KeyValues, slots: int) -> KeyValues:
    """The cache with room for `slots` slots a row, the new ones empty."""
    more = [(0, 0)] * 5
    more[2] = (0, slots - cache.k_LxBxSxKxH.shape[2])
    bias_BxS = None if cache.bias_BxS is None else jnp.pad(cache.bias_BxS, more[1:3])
    return KeyValues(jnp.pad(cache.k_LxBxSxKxH, more), jnp.pad(cache.v_LxBxSxKxH, more), cache.length_B, bias_BxS)


def append(cache: KeyValues, new: KeyValues) -> KeyValues:
    """Writes `new.length_B` tokens of `new` after each row's filled slots; tokens beyond the last slot are dropped.

    Args:
      cache: the cache, S slots.
      new: T tokens a row, of which the first `length_B` count; its bias, if the cache has one (None: 0).

    Returns:
      The cache with the tokens in place and its lengths advanced.
    """
    tokens, slots = new.k_LxBxSxKxH.shape[2], cache.k_LxBxSxKxH.shape[2]
    offset_BxT = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    slot_BxT = jnp.where(offset_BxT < new.length_B[:, None], cache.length_B[:, None] + offset_BxT, slots)

    def write(old: jax.Array, values: jax.Array) -> jax.Array:
        # Mapped over rows, so that sharded rows are written without communication.
        row = lambda old, values, slot: old.at[:, slot].set(values, mode="drop")  # noqa: E731
        return jax.vmap(row, (1, 1, 0), 1)(old, values.astype(old.dtype), slot_BxT)

    bias_BxS = cache.bias_BxS
    if bias_BxS is not None and new.bias_BxS is not None:  # a slot that is free holds 0
        bias_BxS = jax.vmap(lambda old, b, slot: old.at[slot].set(b, mode="drop"))(bias_BxS, new.bias_BxS, slot_BxT)
    return KeyValues(
        write(cache.k_LxBxSxKxH, new.k_LxBxSxKxH),
        write(cache.v_LxBxSxKxH, new.v_LxBxSxKxH),
        jnp.minimum(cache.length_B + new.length_B, slots),
        bias_BxS,
    )
