"""The whole model: images and tokens in, hidden states and keys and values out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.decoder import Decoded, Decoder
from qwenla_jax.model.vision import VisionTower
from qwenla_jax.types import VisionBatch, VisualTokens

Params = dict[str, Any]


class QwenVL(nn.Module):
    """The model; use `apply({"params": params}, ..., method="encode" | "embed" | "decode")`, or no method for all."""

    config: ModelConfig

    def setup(self) -> None:
        self.visual = VisionTower(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, vision: VisionBatch | VisualTokens) -> jax.Array:
        """Visual tokens of all frames, [I * M, D (1 + F)], which `visual_BxT` indexes; `VisualTokens` pass through.

        Behind each token are its F features for DeepStack (none in a family without them).
        """
        if isinstance(vision, VisualTokens):
            return vision.tokens_ZxD
        tokens_IxMxD = self.visual(vision)
        return tokens_IxMxD.reshape(-1, tokens_IxMxD.shape[-1])

    def embed(
        self, ids_BxT: jax.Array, visual_BxT: jax.Array | None, visual_ZxD: jax.Array | None, shards: int = 1
    ) -> jax.Array:
        """Embeddings of tokens, visual tokens in their places.

        Args:
          ids_BxT: int32 token ids.
          visual_BxT: int32 index into `visual_ZxD`, -1 where the token is text; None for text only.
          visual_ZxD: visual tokens as `encode` returns them.
          shards: their `VisionBatch.shards`. An index outside of its row's shard gives an embedding of nan.

        Returns:
          [B, T, D (1 + F)] in the compute type, DeepStack's features behind each embedding, 0 at text; without visual
          tokens [B, T, D].
        """
        x_BxTxD = self.decoder.embed(ids_BxT)
        if visual_BxT is None:
            return x_BxTxD
        assert visual_ZxD is not None
        # Shard by shard, so that a device picks from its own: one index into all would gather them on every device.
        index_UxN = visual_BxT.reshape(shards, -1)
        first_Ux1 = jnp.arange(shards, dtype=index_UxN.dtype)[:, None] * (len(visual_ZxD) // shards)
        # Unsigned, since a negative index would count from the shard's end.
        index_UxN = jnp.where(index_UxN >= 0, index_UxN - first_Ux1, 0).astype(jnp.uint32)
        visual_UxZxD = visual_ZxD.reshape(shards, -1, visual_ZxD.shape[-1])
        picked = jax.vmap(lambda visual, index: jnp.take(visual, index, axis=0))(visual_UxZxD, index_UxN)
        picked = picked.reshape(*visual_BxT.shape, -1)
        picked = with_logical_constraint(picked, ("batch", "tokens", "act_embed"))
        x_BxTxD = with_features(x_BxTxD, picked.shape[-1])
        return jnp.where((visual_BxT >= 0)[..., None], picked.astype(x_BxTxD.dtype), x_BxTxD)

    def decode(self, *args: Any, **options: Any) -> Decoded:
        """See `Decoder.__call__`."""
        return self.decoder(*args, **options)

    def __call__(
        self, vision: VisionBatch, ids_BxT: jax.Array, pos_BxTx3: jax.Array, visual_BxT: jax.Array
    ) -> jax.Array:
        """Hidden states [B, T, D] of whole sequences, after the last norm."""
        x = self.embed(ids_BxT, visual_BxT, self.encode(vision), vision.shards)
        return self.decode(x, pos_BxTx3).hidden_BxTxD

    if TYPE_CHECKING:
        # Flax's own says nothing of the method's result, and adds the variables that only `mutable` returns.
        @overload
        def apply(self, variables: Any, *args: Any, method: Literal["decode"]) -> Decoded: ...
        @overload
        def apply(self, variables: Any, *args: Any, method: Literal["encode", "embed"] | None = None) -> jax.Array: ...
        def apply(self, variables: Any, *args: Any, method: str | None = None) -> Any: ...


def with_features(x_BxTxD: jax.Array, width: int) -> jax.Array:
    """Embeddings widened to [B, T, width] by features of 0, as text has them."""
    missing = width - x_BxTxD.shape[-1]
    if not missing:
        return x_BxTxD
    x_BxTxD = with_logical_constraint(x_BxTxD, ("batch", "tokens", "act_embed"))
    return jnp.pad(x_BxTxD, [(0, 0), (0, 0), (0, missing)])


def head_matrix(params: Params) -> jax.Array:
    """The output matrix [D, V]: the model's own, or its embedding transposed where the two are tied."""
    decoder = params["decoder"]
    if "lm_head" in decoder:
        return decoder["lm_head"]["kernel"]
    return decoder["embed"]["embedding"].T


def logits_of(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] in float32 of hidden states [..., D]. For few rows; training works in chunks."""
    head_DxV = head_matrix(params).astype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = jnp.dot(flat, head_DxV, preferred_element_type=jnp.float32)
    return out.reshape(*hidden.shape[:-1], head_DxV.shape[-1])


def abstract_inputs(config: ModelConfig) -> tuple[VisionBatch, jax.Array, jax.Array, jax.Array]:
    """The smallest inputs on which the model initialises: one frame of one window, one row of one token."""
    slots = config.vision.window_slots
    vision = VisionBatch(
        jnp.zeros((1, slots, config.vision.patch_values), jnp.float32),
        jnp.zeros((1, slots, 2), jnp.int32),
        jnp.ones((1, slots), bool),
        jnp.zeros((1, 1), jnp.int32),
    )
    ids = jnp.zeros((1, 1), jnp.int32)
    return vision, ids, jnp.zeros((1, 1, 3), jnp.int32), ids - 1


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters as a plain tree of arrays; normal with `config.initializer_range`, norms 1, biases 0."""
    return nn.meta.unbox(QwenVL(config).init(key, *abstract_inputs(config))["params"])


def logical_specs(config: ModelConfig) -> Params:
    """The parameters' tree with, for each, its logical axis names (a `PartitionSpec`)."""
    return nn.get_partition_spec(abstract_params(config))


@functools.lru_cache(maxsize=8)  # tracing the whole model takes seconds, and every start asks for it several times
def abstract_params(config: ModelConfig) -> Any:
    """The parameters' tree of abstract values in Flax's boxes, which have the logical axes. Not to be changed."""
    return jax.eval_shape(lambda: QwenVL(config).init(jax.random.key(0), *abstract_inputs(config)))["params"]
