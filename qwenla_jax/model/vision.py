"""The vision tower: patches in window slots -> visual tokens of the decoder's width.

The host orders the patches by window and pads every window to its full number of slots (`types.VisionBatch`), so that
window attention is a reshape and no layer gathers anything. paper silent: the tower is the base model's, unchanged.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from qwenla_jax.model.attention import Segment
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kernels import attend
from qwenla_jax.model.layers import Dense, FeedForward, LayerNorm, RMSNorm, partitioned, scan_layers
from qwenla_jax.model.rope import rotate, vision_angles
from qwenla_jax.types import VisionBatch

Carry = tuple[jax.Array, tuple[jax.Array, ...]]  # states of the patches, and those kept for DeepStack


def _norm(config: ModelConfig, name: str) -> LayerNorm | RMSNorm:
    """A norm of the family's kind."""
    kind = LayerNorm if config.family.layer_norm else RMSNorm
    return kind(config.vision.rms_norm_eps, *config.types, name=name)


class PositionEmbedding(nn.Module):
    """Learned positions of a square grid, stretched over each frame so that the corners meet: bilinear, in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, hw_IxSx2: jax.Array) -> jax.Array:
        cfg, tower = self.config, self.config.vision
        side = math.isqrt(tower.num_position_embeddings)
        init = partitioned(nn.initializers.normal(cfg.initializer_range), ("patch", "embed"))
        shape = (tower.num_position_embeddings, tower.hidden_size)
        table_NxD = self.param("embedding", init, shape, jnp.dtype(cfg.param_dtype))
        # Gathered whole: else what is picked from it is split by width.
        table_NxD = with_logical_constraint(table_NxD, ("patch", "act_embed"))
        last_Ix1x2 = hw_IxSx2.max(axis=1, keepdims=True)  # padding is at 0
        at_IxSx2 = hw_IxSx2.astype(jnp.float32) * (side - 1) / jnp.maximum(last_Ix1x2, 1)
        low_IxSx2 = jnp.floor(at_IxSx2)
        up_IxSx2 = at_IxSx2 - low_IxSx2
        total = jnp.zeros((*hw_IxSx2.shape[:2], tower.hidden_size), jnp.float32)
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row_col = jnp.minimum(low_IxSx2.astype(jnp.int32) + jnp.array(corner), side - 1)
            weight = jnp.prod(jnp.where(jnp.array(corner) == 1, up_IxSx2, 1 - up_IxSx2), axis=-1)
            total += weight[..., None] * jnp.take(table_NxD, row_col[..., 0] * side + row_col[..., 1], axis=0)
        return total.astype(cfg.dtype)


class VisionAttention(nn.Module):
    """Self-attention of patches, within a window or within the whole frame."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_IxSxD: jax.Array, cos: jax.Array, sin: jax.Array, valid_IxS: jax.Array, is_full: jax.Array
    ) -> jax.Array:
        cfg, tower = self.config, self.config.vision
        I, S, D = x_IxSxD.shape
        N, H = tower.num_heads, D // tower.num_heads

        def dense(name: str, axes: tuple[str, str]) -> Dense:
            return Dense(D, axes, True, *cfg.types, cfg.initializer_range, name=name)

        q, k, v = (dense(name, ("embed", "heads"))(x_IxSxD).reshape(I, S, N, H) for name in "qkv")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        def within(rows: int) -> jax.Array:
            split = (I * rows, S // rows)
            seg = Segment(k.reshape(*split, N, H), v.reshape(*split, N, H), valid_IxS.reshape(*split)[:, None, None, :])
            return attend(cfg.attention, q.reshape(*split, N, H), (seg,), "frames").reshape(I, S, D)

        windows = S // tower.window_slots
        if windows == 1 or not cfg.family.windows:  # one window is the whole frame: both kinds of layer are the same
            out = within(1)
        else:
            out = jax.lax.cond(is_full, lambda: within(1), lambda: within(windows))
        return dense("proj", ("heads", "embed"))(out)


class VisionBlock(nn.Module):
    """One layer of the tower: attention and a feed-forward, each after a norm, with residuals."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, carry: Carry, cos: jax.Array, sin: jax.Array, valid_IxS: jax.Array, layer: jax.Array
    ) -> tuple[Carry, None]:
        cfg, tower = self.config, self.config.vision
        x, kept = carry
        is_full = jnp.isin(layer, jnp.asarray(tower.full_attention_layers, jnp.int32))
        x = with_logical_constraint(x, ("frames", "patches", "act_embed"))
        h = _norm(cfg, "norm1")(x)
        x = x + VisionAttention(cfg, name="attn")(h, cos, sin, valid_IxS, is_full)
        h = _norm(cfg, "norm2")(x)
        gated = cfg.family.vision_act == "silu"
        x = x + FeedForward(tower.intermediate_size, True, gated, *cfg.types, cfg.initializer_range, name="mlp")(h)
        kept = tuple(jnp.where(layer == own, x, old) for own, old in zip(tower.deepstack_layers, kept, strict=True))
        return (x, kept), None


class Merger(nn.Module):
    """Joins merge x merge neighbouring patches into one visual token of the decoder's width; exact (erf) GELU.

    The norm is of single patches, or of the joined ones.
    """

    config: ModelConfig
    joined_norm: bool = False

    @nn.compact
    def __call__(self, x_IxSxD: jax.Array) -> jax.Array:
        cfg, tower = self.config, self.config.vision
        kernel = (*cfg.types, cfg.initializer_range)
        I, S, D = x_IxSxD.shape
        unit = tower.spatial_merge_size**2
        joined = (I, S // unit, D * unit)
        x = x_IxSxD.reshape(joined) if self.joined_norm else x_IxSxD
        x = _norm(cfg, "norm")(x).reshape(joined)
        x = Dense(D * unit, ("embed", "mlp"), True, *kernel, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return Dense(tower.out_hidden_size, ("mlp", "embed"), True, *kernel, name="fc2")(x)


class VisionTower(nn.Module):
    """Images to visual tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, vision: VisionBatch) -> jax.Array:
        """Visual tokens of every frame in raster order, DeepStack's features of each behind it in order of the layers:
        [I, M, `VisionConfig.token_values`] in the compute type; rows of padding are finite."""
        cfg, tower = self.config, self.config.vision
        kernel = (cfg.family.patch_bias, *cfg.types, cfg.initializer_range)
        x = Dense(tower.hidden_size, ("patch", "embed"), *kernel, name="patch_embed")(vision.patches_IxSxC)
        if tower.num_position_embeddings:
            x = x + PositionEmbedding(cfg, name="pos_embed")(vision.hw_IxSx2)
        angles = vision_angles(vision.hw_IxSx2, tower.hidden_size // tower.num_heads)
        blocks = scan_layers(VisionBlock, tower.depth, cfg.remat, num_broadcast=3, num_scanned=1)(cfg, name="blocks")
        carry = x, (jnp.zeros_like(x),) * len(tower.deepstack_layers)
        (x, kept), _ = blocks(carry, jnp.cos(angles), jnp.sin(angles), vision.valid_IxS, jnp.arange(tower.depth))
        features = [Merger(cfg, True, name=f"deepstack_{number}")(own) for number, own in enumerate(kept)]
        merged = Merger(cfg, name="merger")(x)
        merged = jnp.concatenate([merged, *features], axis=-1) if features else merged
        # Else they may come out split by width, as the last kernel is, and picking from them is undone on all devices.
        merged = with_logical_constraint(merged, ("frames", "tokens", "act_embed"))
        return jnp.take_along_axis(merged, vision.gather_IxM[:, :, None], axis=1)
