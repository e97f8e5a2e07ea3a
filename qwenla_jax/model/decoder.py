"""The language decoder: embeddings with M-RoPE positions -> hidden states, keys and values explicit."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenla_jax.config import TextConfig
from qwenla_jax.model.attention import Segment, segment_attention
from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.model.layers import Dense, GatedMLP, RMSNorm, scan_layers
from qwenla_jax.model.rope import mrope_angles, rotate

# Below this many rows a product with a one-hot matrix beats a gather, whose gradient is a scatter.
ONE_HOT_VOCAB = 2048


class DecoderAttention(nn.Module):
    """Grouped-query self-attention over what came before; q, k, v have biases, o has none."""

    config: TextConfig
    dtype: str
    param_dtype: str
    init_scale: float

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: tuple[jax.Array, ...],
        past: tuple[tuple[jax.Array, jax.Array], ...],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        cfg = self.config
        B, T, D = x_BxTxD.shape
        N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

        def dense(name: str, features: int, axes: tuple[str, str], bias: bool) -> Dense:
            return Dense(features, axes, bias, self.dtype, self.param_dtype, self.init_scale, name=name)

        q = dense("q", N * H, ("embed", "heads"), True)(x_BxTxD).reshape(B, T, N, H)
        k = dense("k", K * H, ("embed", "kv_heads"), True)(x_BxTxD).reshape(B, T, K, H)
        v = dense("v", K * H, ("embed", "kv_heads"), True)(x_BxTxD).reshape(B, T, K, H)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = nn.with_logical_constraint(q, ("batch", "tokens", "act_heads", "head_dim"))
        runs = [*past, (k, v)]
        segments = tuple(Segment(ks, vs, seen) for (ks, vs), seen in zip(runs, visible, strict=True))
        out = segment_attention(q, segments).reshape(B, T, N * H)
        return dense("o", D, ("heads", "embed"), False)(out), (k, v)


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm, with residuals."""

    config: TextConfig
    dtype: str
    param_dtype: str
    init_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: tuple[jax.Array, ...],
        past: tuple[tuple[jax.Array, jax.Array], ...],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        cfg, types = self.config, (self.dtype, self.param_dtype)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "act_embed"))
        h = RMSNorm(cfg.rms_norm_eps, *types, name="input_norm")(x)
        h, new = DecoderAttention(cfg, *types, self.init_scale, name="attn")(h, cos, sin, visible, past)
        x = x + h
        h = RMSNorm(cfg.rms_norm_eps, *types, name="post_norm")(x)
        return x + GatedMLP(cfg.intermediate_size, False, *types, self.init_scale, name="mlp")(h), new


class Embedding(nn.Module):
    """The token embedding [V, D]."""

    vocab_size: int
    features: int
    dtype: str
    param_dtype: str
    init_scale: float

    @nn.compact
    def __call__(self, ids_BxT: jax.Array) -> jax.Array:
        table_VxD = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_scale), ("vocab", "embed")),
            (self.vocab_size, self.features),
            jnp.dtype(self.param_dtype),
        )
        if self.vocab_size <= ONE_HOT_VOCAB:
            one_hot = jax.nn.one_hot(ids_BxT.reshape(-1), self.vocab_size, dtype=self.dtype)
            return (one_hot @ table_VxD.astype(self.dtype)).reshape(*ids_BxT.shape, self.features)
        return jnp.take(table_VxD, ids_BxT, axis=0).astype(self.dtype)


class Head(nn.Module):
    """The output matrix [D, V] of a model that does not tie it to its embedding.

    It is never applied here: log-probabilities are made in chunks and sampling needs the last row only, so both take
    the matrix itself (`qwen_vl.head_matrix`).
    """

    vocab_size: int
    features: int
    param_dtype: str
    init_scale: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_scale), ("embed", "vocab")),
            (self.features, self.vocab_size),
            jnp.dtype(self.param_dtype),
        )


class Decoder(nn.Module):
    """The stack of layers; embedding and head live here so that the tree reads as the checkpoint does."""

    config: TextConfig
    dtype: str
    param_dtype: str
    remat: str
    init_scale: float

    def setup(self) -> None:
        cfg, types = self.config, (self.dtype, self.param_dtype)
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, *types, self.init_scale)
        self.layers = scan_layers(DecoderLayer, cfg.num_layers, self.remat, num_broadcast=3, num_scanned=1)(
            cfg, *types, self.init_scale
        )
        self.norm = RMSNorm(cfg.rms_norm_eps, *types)
        if not cfg.tie_word_embeddings:
            self.lm_head = Head(cfg.vocab_size, cfg.hidden_size, self.param_dtype, self.init_scale)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        pos_BxTx3: jax.Array,
        prefix: KeyValues | None = None,
        cache: KeyValues | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Run the layers over T new tokens a row.

        The causal mask goes by slot, never by M-RoPE position: a token sees the whole prefix, the filled slots of its
        row's cache, and the tokens of this call up to itself.

        Args:
          x_BxTxD: embeddings.
          pos_BxTx3: int32 M-RoPE positions.
          prefix: keys and values of Q prompts, each shared by B // Q consecutive rows.
          cache: keys and values of the row's own earlier tokens.

        Returns:
          hidden states [B, T, D] after the last norm, and the new keys and values, each [L, B, T, K, H].
        """
        cfg = self.config
        T = x_BxTxD.shape[1]
        angles = mrope_angles(pos_BxTx3, cfg.head_dim, cfg.rope_theta, cfg.mrope_section)
        visible, past = [], []
        for run in (prefix, cache):
            if run is not None:
                slots = jnp.arange(run.k_LxBxSxKxH.shape[2])
                visible.append((slots[None, :] < run.length_B[:, None])[:, None, None, :])
                past.append((run.k_LxBxSxKxH, run.v_LxBxSxKxH))
        visible.append(jnp.tril(jnp.ones((T, T), bool))[None, None])
        x, new = self.layers(x_BxTxD, jnp.cos(angles), jnp.sin(angles), tuple(visible), tuple(past))
        if not cfg.tie_word_embeddings and self.is_initializing():
            self.lm_head()
        return self.norm(x), new
