"""Rotary position embeddings: two axes in the vision tower, three (M-RoPE) in the decoder. Angles in float32."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np


def vision_angles(hw_IxSx2: jax.Array, head_dim: int, theta: float = 10_000.0) -> jax.Array:
    """Angles of the vision tower: the first half of the frequencies turn with the row, the second with the column.

    Args:
      hw_IxSx2: int32 row and column of each patch.
      head_dim: head size H, a multiple of 4.
      theta: base of the frequencies.

    Returns:
      float32 [I, S, H/2], radians.
    """
    inv_freq = _inverse_frequencies(head_dim // 2, theta)
    angles = hw_IxSx2[..., None].astype(jnp.float32) * inv_freq
    return angles.reshape(*hw_IxSx2.shape[:2], head_dim // 2)


def mrope_angles(
    pos_BxTx3: jax.Array, head_dim: int, theta: float, sections: tuple[int, int, int], interleaved: bool = False
) -> jax.Array:
    """Angles of the decoder: frequencies turn with time, row or column.

    Args:
      pos_BxTx3: int32 M-RoPE positions.
      head_dim: head size H.
      theta: base of the frequencies.
      sections: frequencies of each axis; they sum to H/2.
      interleaved: the axes take turns (time, row, column, time, ...) until rows and columns have theirs, and the rest
        is time's; else they are three chunks.

    Returns:
      float32 [B, T, H/2], radians.
    """
    inv_freq = _inverse_frequencies(head_dim, theta)
    axis_of_freq = np.repeat(np.arange(3), sections)
    if interleaved:
        axis_of_freq = np.zeros_like(axis_of_freq)
        for axis in (1, 2):
            axis_of_freq[axis : 3 * sections[axis] : 3] = axis
    # A product with a constant 0/1 matrix chooses each frequency's axis: exact, and cheaper than a gather.
    select_3xF = np.asarray(axis_of_freq[None, :] == np.arange(3)[:, None], np.float32)
    pos = pos_BxTx3.astype(jnp.float32)
    chosen = cast(jax.Array, sum(pos[..., axis, None] * select_3xF[axis] for axis in range(3)))
    return chosen * inv_freq


def rotate(x_BxTxNxH: jax.Array, cos_BxTxF: jax.Array, sin_BxTxF: jax.Array) -> jax.Array:
    """Rotate-half: pairs (f, f + H/2) turn by the angle of frequency f; computed in float32, returned in x's type."""
    x1, x2 = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxTxF[:, :, None, :], sin_BxTxF[:, :, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BxTxNxH.dtype)


def _inverse_frequencies(size: int, theta: float) -> np.ndarray:
    """float32 [size / 2], theta^(-2i / size), divided in float32 as the released model does it.

    Its rounding matters: one unit in the last place is milliradians at position 30,000.
    """
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1) / np.float32(theta) ** exponent
