"""The language decoder: embeddings with M-RoPE positions -> hidden states, keys and values explicit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from qwenla_jax.model.attention import Partial, Segment, attend_segment, attention_with_weights, joined, segment_weights
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kernels import attend
from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.model.layers import Dense, FeedForward, RMSNorm, partitioned, scan_layers
from qwenla_jax.model.pages import PageReads, attend_pages, page_weights, whole_rows
from qwenla_jax.model.rope import mrope_angles, rotate

# Below this many rows a product with a one-hot matrix beats a gather, whose gradient is a scatter.
ONE_HOT_VOCAB = 2048


# Of one segment of keys: how many count (None: the call's own, in order), and what is added to their scores; see
# `attention.Segment`.
Mask = tuple[jax.Array | None, jax.Array | None]
# Number of a segment of keys -> float32 [B, T, S], the attention that they received, summed over the layers so far.
AttentionReceived = dict[int, jax.Array]


class Decoded(NamedTuple):
    """What the decoder makes of T new tokens a row.

    Attributes:
      hidden_BxTxD: hidden states after the last norm.
      new: keys and values of the tokens, each [L, B, T, K, H].
      received: name of each segment of keys -> float32 [B, T, S], the attention of each token to each key: the mean
        over layers and heads.
    """

    hidden_BxTxD: jax.Array
    new: tuple[jax.Array, jax.Array]
    received: dict[str, jax.Array]


class DecoderAttention(nn.Module):
    """Grouped-query self-attention over what came before; o has no bias, and the family says what q, k and v have."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        runs: tuple[Mask | PageReads, ...],
        past: tuple[tuple[jax.Array, jax.Array], ...],
        layer: jax.Array,
        return_attention: tuple[int, ...],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
        cfg, text = self.config, self.config.text
        B, T, D = x_BxTxD.shape
        N, K, H = text.num_heads, text.num_kv_heads, text.head_dim

        def dense(name: str, features: int, axes: tuple[str, str], bias: bool) -> Dense:
            return Dense(features, axes, bias, *cfg.types, cfg.initializer_range, name=name)

        bias = cfg.family.qkv_bias
        q = dense("q", N * H, ("embed", "heads"), bias)(x_BxTxD).reshape(B, T, N, H)
        k = dense("k", K * H, ("embed", "kv_heads"), bias)(x_BxTxD).reshape(B, T, K, H)
        v = dense("v", K * H, ("embed", "kv_heads"), bias)(x_BxTxD).reshape(B, T, K, H)
        if cfg.family.qk_norm:
            q = RMSNorm(text.rms_norm_eps, *cfg.types, name="q_norm")(q)
            k = RMSNorm(text.rms_norm_eps, *cfg.types, name="k_norm")(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = with_logical_constraint(q, ("batch", "tokens", "act_heads", "head_dim"))
        keys_values = iter((*past, (k, v)))
        segments: list[Segment | PageReads] = []
        for run in runs:
            if isinstance(run, PageReads):
                segments.append(run if run.count_E is not None else whole_rows(run, layer))
            else:
                length_Q, bias_QxS = run
                segments.append(Segment(*next(keys_values), bias=bias_QxS, length_Q=length_Q, causal=length_Q is None))
        out, received = _attend(cfg.attention, q, tuple(segments), layer, return_attention)
        return dense("o", D, ("heads", "embed"), False)(out.reshape(B, T, N * H)), (k, v), received


def _attend(
    choice: str,
    q_BxTxNxH: jax.Array,
    segments: tuple[Segment | PageReads, ...],
    layer: jax.Array,
    return_attention: tuple[int, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Attention [B, T, N, H] to all segments of keys, and what some of them received: float32 [B, T, S] each."""
    whole = tuple(s for s in segments if isinstance(s, Segment))
    if len(whole) == len(segments):
        if return_attention:
            return attention_with_weights(q_BxTxNxH, whole, return_attention)
        return attend(choice, q_BxTxNxH, whole), ()
    parts: list[Partial] = []
    scores: dict[int, Any] = {}
    for number, segment in enumerate(segments):
        if isinstance(segment, Segment):
            parts.append(attend_segment(q_BxTxNxH, segment))
        else:
            part, scores[number] = attend_pages(q_BxTxNxH, segment, layer, number in return_attention)
            parts.append(part)
    out, lse_BxTxN = joined(parts)
    received = []
    for number in return_attention:
        segment = segments[number]
        if isinstance(segment, Segment):
            received.append(segment_weights(q_BxTxNxH, segment, lse_BxTxN))
        else:
            received.append(page_weights(q_BxTxNxH, segment, scores[number], lse_BxTxN))
    return out.astype(q_BxTxNxH.dtype), tuple(received)


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm, with residuals; in the first layers DeepStack's features."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, AttentionReceived],
        cos: jax.Array,
        sin: jax.Array,
        runs: tuple[Mask | PageReads, ...],
        features_BxTxC: jax.Array | None,
        past: tuple[tuple[jax.Array, jax.Array], ...],
        layer: jax.Array,
    ) -> tuple[tuple[jax.Array, AttentionReceived], tuple[jax.Array, jax.Array]]:
        cfg, text = self.config, self.config.text
        x, total = carry
        return_attention = tuple(total)
        x = with_logical_constraint(x, ("batch", "tokens", "act_embed"))
        h = RMSNorm(text.rms_norm_eps, *cfg.types, name="input_norm")(x)
        h, new, received = DecoderAttention(cfg, name="attn")(h, cos, sin, runs, past, layer, return_attention)
        x = x + h
        h = RMSNorm(text.rms_norm_eps, *cfg.types, name="post_norm")(x)
        x = x + FeedForward(text.intermediate_size, False, True, *cfg.types, cfg.initializer_range, name="mlp")(h)
        if features_BxTxC is not None:
            D = x.shape[-1]
            own = lambda: jax.lax.dynamic_slice_in_dim(features_BxTxC, layer * D, D, axis=2)  # noqa: E731
            x = jax.lax.cond(layer * D < features_BxTxC.shape[2], lambda: x + own(), lambda: x)
        return (x, {number: total[number] + p for number, p in zip(return_attention, received, strict=True)}), new


class Embedding(nn.Module):
    """The token embedding [V, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, ids_BxT: jax.Array) -> jax.Array:
        cfg, (V, D) = self.config, (self.config.text.vocab_size, self.config.text.hidden_size)
        init = partitioned(nn.initializers.normal(cfg.initializer_range), ("vocab", "embed"))
        table_VxD = self.param("embedding", init, (V, D), jnp.dtype(cfg.param_dtype))
        if V <= ONE_HOT_VOCAB:
            one_hot = jax.nn.one_hot(ids_BxT.reshape(-1), V, dtype=cfg.dtype)
            return (one_hot @ table_VxD.astype(cfg.dtype)).reshape(*ids_BxT.shape, D)
        return jnp.take(table_VxD, ids_BxT, axis=0).astype(cfg.dtype)


class Head(nn.Module):
    """The output matrix [D, V] of a model that does not tie it to its embedding.

    It is never applied here: log-probabilities are made in chunks and sampling needs the last row only, so both take
    the matrix itself (`qwen_vl.head_matrix`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        cfg, text = self.config, self.config.text
        init = partitioned(nn.initializers.normal(cfg.initializer_range), ("embed", "vocab"))
        return self.param("kernel", init, (text.hidden_size, text.vocab_size), jnp.dtype(cfg.param_dtype))


class Decoder(nn.Module):
    """The stack of layers; embedding and head live here so that the tree reads as the checkpoint does."""

    config: ModelConfig

    def setup(self) -> None:
        cfg, text = self.config, self.config.text
        self.embed = Embedding(cfg)
        self.layers = scan_layers(DecoderLayer, text.num_layers, cfg.remat, num_broadcast=4, num_scanned=2)(cfg)
        self.norm = RMSNorm(text.rms_norm_eps, *cfg.types)
        if not text.tie_word_embeddings:
            self.lm_head = Head(cfg)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        pos_BxTx3: jax.Array,
        prefix: KeyValues | PageReads | None = None,
        cache: PageReads | None = None,
        bias_BxT: jax.Array | None = None,
        return_attention: tuple[str, ...] = (),
    ) -> Decoded:
        """Run the layers over T new tokens a row.

        The causal mask goes by slot, never by M-RoPE position: a token sees the whole prefix, the filled slots of its
        row's cache, and the tokens of this call up to itself, as far as no bias hides them.

        Args:
          x_BxTxD: embeddings, DeepStack's features behind them where there are any, as `QwenVL.embed` returns them.
          pos_BxTx3: int32 M-RoPE positions.
          prefix: keys and values of Q prompts, each shared by B // Q consecutive rows.
          cache: keys and values of the row's own earlier tokens.
          bias_BxT: float32, added to every score of a new token's key; None for none.
          return_attention: for which of the segments "prefix", "cache" and "new" the received attention is returned;
            for passes without a gradient.
        """
        cfg, interleaved = self.config.text, self.config.family.mrope_interleaved
        T, D = x_BxTxD.shape[1], cfg.hidden_size
        features = None
        if x_BxTxD.shape[-1] > D:
            x_BxTxD, features = x_BxTxD[..., :D], x_BxTxD[..., D:]
        angles = mrope_angles(pos_BxTx3, cfg.head_dim, cfg.rope_theta, cfg.mrope_section, interleaved)
        names, keys, past = [], [], []
        runs: list[Mask | PageReads] = []
        for name, run in (("prefix", prefix), ("cache", cache)):
            if run is None:
                continue
            names.append(name)
            if isinstance(run, PageReads):
                runs.append(run)
                keys.append(run.pages.row_slots)
            else:
                runs.append((run.length_B, _sharded_bias(run.bias_BxS)))
                past.append((run.k_LxBxSxKxH, run.v_LxBxSxKxH))
                keys.append(run.k_LxBxSxKxH.shape[2])
        names.append("new")
        runs.append((None, _sharded_bias(bias_BxT)))
        keys.append(T)
        returns_attention = sorted(names.index(name) for name in return_attention)
        nothing = {number: jnp.zeros((*x_BxTxD.shape[:2], keys[number]), jnp.float32) for number in returns_attention}
        layers = jnp.arange(cfg.num_layers)
        carry = x_BxTxD, nothing
        same = jnp.cos(angles), jnp.sin(angles), tuple(runs), features
        if not self.is_initializing() and is_apart(params := self.variables["params"]):
            (x, total), new = _each_layer(self.config, params["layers"], carry, same, tuple(past))
        else:
            (x, total), new = self.layers(carry, *same, tuple(past), layers)
        if not cfg.tie_word_embeddings and self.is_initializing():
            self.lm_head()
        received = {names[number]: sums / cfg.num_layers for number, sums in total.items()}
        return Decoded(self.norm(x), new, received)


def layers_apart(decoder: dict[str, Any]) -> dict[str, Any]:
    """The decoder's parameters with each layer's own arrays under "0", "1" and so on, in place of the stacked ones.

    The decoder takes either form. On CPU a scan copies a layer's weights out of the stacked arrays before it multiplies
    by them, which for a few tokens takes longer than the products; on TPU it reads them where they are.

    Args:
      decoder: the decoder's parameters, stacked.
    """
    stacked = decoder["layers"]
    length = len(jax.tree.leaves(stacked)[0])
    return decoder | {"layers": {str(n): jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(length)}}


def is_apart(decoder: Mapping[str, Any]) -> bool:
    """Whether the decoder's parameters are of `layers_apart`."""
    return "0" in decoder["layers"]


def _each_layer(config: ModelConfig, params: Mapping[str, Any], carry: Any, same: tuple[Any, ...], past: Any) -> Any:
    """What the scan over layers gives, of layers apart; `same` are the arguments that it broadcasts."""
    block, new = DecoderLayer(config, parent=None), []
    for n in range(config.text.num_layers):
        own = jax.tree.map(lambda x, n=n: x[n], past)
        carry, keys_values = block.apply({"params": params[str(n)]}, carry, *same, own, jnp.int32(n))
        new.append(keys_values)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *new)


def _sharded_bias(bias_BxS: jax.Array | None) -> jax.Array | None:
    """The bias, laid out as the rows are."""
    return None if bias_BxS is None else with_logical_constraint(bias_BxS, ("batch", "tokens"))
