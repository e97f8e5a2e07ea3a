"""The vision tower: patches in window slots -> visual tokens of the decoder's width.

The host orders the patches by window and pads every window to its full number of slots (`types.VisionBatch`), so that
window attention is a reshape and no layer gathers anything. paper silent: the tower is Qwen2.5-VL's, unchanged.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from qwenla_jax.model.attention import Segment
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kernels import attend
from qwenla_jax.model.layers import Dense, GatedMLP, RMSNorm, scan_layers
from qwenla_jax.model.rope import rotate, vision_angles
from qwenla_jax.types import VisionBatch


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
        if windows == 1:  # one window is the whole frame: both kinds of layer are the same
            out = within(1)
        else:
            out = jax.lax.cond(is_full, lambda: within(1), lambda: within(windows))
        return dense("proj", ("heads", "embed"))(out)


class VisionBlock(nn.Module):
    """One layer of the tower: attention and a gated MLP, each after an RMS norm, with residuals."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, valid_IxS: jax.Array, is_full: jax.Array
    ) -> tuple[jax.Array, None]:
        cfg, tower = self.config, self.config.vision
        x = with_logical_constraint(x, ("frames", "patches", "act_embed"))
        h = RMSNorm(tower.rms_norm_eps, *cfg.types, name="norm1")(x)
        x = x + VisionAttention(cfg, name="attn")(h, cos, sin, valid_IxS, is_full)
        h = RMSNorm(tower.rms_norm_eps, *cfg.types, name="norm2")(x)
        x = x + GatedMLP(tower.intermediate_size, True, *cfg.types, cfg.initializer_range, name="mlp")(h)
        return x, None


class Merger(nn.Module):
    """Joins merge x merge neighbouring patches into one visual token of the decoder's width; exact (erf) GELU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_IxSxD: jax.Array) -> jax.Array:
        cfg, tower = self.config, self.config.vision
        kernel = (*cfg.types, cfg.initializer_range)
        I, S, D = x_IxSxD.shape
        unit = tower.spatial_merge_size**2
        x = RMSNorm(tower.rms_norm_eps, *cfg.types, name="norm")(x_IxSxD).reshape(I, S // unit, D * unit)
        x = Dense(D * unit, ("embed", "mlp"), True, *kernel, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return Dense(tower.out_hidden_size, ("mlp", "embed"), True, *kernel, name="fc2")(x)


class VisionTower(nn.Module):
    """Images to visual tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, vision: VisionBatch) -> jax.Array:
        """Visual tokens of every frame in raster order, [I, M, D] in the compute type; rows of padding are finite."""
        cfg, tower = self.config, self.config.vision
        kernel = (*cfg.types, cfg.initializer_range)
        x = Dense(tower.hidden_size, ("patch", "embed"), False, *kernel, name="patch_embed")(vision.patches_IxSxC)
        angles = vision_angles(vision.hw_IxSx2, tower.hidden_size // tower.num_heads)
        layer = jnp.arange(tower.depth)
        is_full_L = jnp.isin(layer, jnp.asarray(tower.full_attention_layers, jnp.int32))
        blocks = scan_layers(VisionBlock, tower.depth, cfg.remat, num_broadcast=3, num_scanned=1)(cfg, name="blocks")
        x, _ = blocks(x, jnp.cos(angles), jnp.sin(angles), vision.valid_IxS, is_full_L)
        merged = Merger(cfg, name="merger")(x)
        # Else they may come out split by width, as the last kernel is, and picking from them is undone on all devices.
        merged = with_logical_constraint(merged, ("frames", "tokens", "act_embed"))
        return jnp.take_along_axis(merged, vision.gather_IxM[:, :, None], axis=1)
