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
      length_B: int32, filled slots of each row; slots from there on are hidden.
    """

    k_LxBxSxKxH: jax.Array
    v_LxBxSxKxH: jax.Array
    length_B: jax.Array


def empty_cache(
    num_layers: int, rows: int, slots: int, num_kv_heads: int, head_dim: int, dtype: str
) -> KeyValues:
    """A cache of `slots` empty slots a row."""
    zeros = jnp.zeros((num_layers, rows, slots, num_kv_heads, head_dim), dtype)
    return KeyValues(zeros, zeros, jnp.zeros((rows,), jnp.int32))


def grow(cache: KeyValues, slots: int) -> KeyValues:
    """The cache with room for `slots` slots a row, the new ones empty."""
    more = [(0, 0)] * 5
    more[2] = (0, slots - cache.k_LxBxSxKxH.shape[2])
    return cache.replace(k_LxBxSxKxH=jnp.pad(cache.k_LxBxSxKxH, more), v_LxBxSxKxH=jnp.pad(cache.v_LxBxSxKxH, more))


def append(cache: KeyValues, new: KeyValues) -> KeyValues:
    """Write `new.length_B` tokens of `new` behind each row's filled slots; what finds no slot is dropped.

    Args:
      cache: the cache, S slots.
      new: T tokens a row, of which the first `length_B` count.

    Returns:
      The cache with the tokens in place and its lengths advanced.
    """
    tokens, slots = new.k_LxBxSxKxH.shape[2], cache.k_LxBxSxKxH.shape[2]
    offset_BxT = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    slot_BxT = jnp.where(offset_BxT < new.length_B[:, None], cache.length_B[:, None] + offset_BxT, slots)

    def write(old: jax.Array, values: jax.Array) -> jax.Array:
        # Mapped over rows, so that rows that lie on different devices are written without a word between them.
        row = lambda old, values, slot: old.at[:, slot].set(values, mode="drop")  # noqa: E731
        return jax.vmap(row, (1, 1, 0), 1)(old, values.astype(old.dtype), slot_BxT)

    return KeyValues(
        write(cache.k_LxBxSxKxH, new.k_LxBxSxKxH),
        write(cache.v_LxBxSxKxH, new.v_LxBxSxKxH),
        jnp.minimum(cache.length_B + new.length_B, slots),
    )
