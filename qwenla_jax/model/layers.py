"""Building blocks that the vision tower and the decoder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

# Additive mask value: finite, so that a row whose keys are all masked gives numbers and not nan, and far enough below
# any score that its probability is exactly zero in float32 and bfloat16.
MASK_VALUE = -1e30

# The name of attention's results in the remat policies.
ATTENTION_OUTPUT = "attention_output"

# The scales of a linear layer's outputs, beside a kernel in int8; see `sampling.param_layout`.
KERNEL_SCALE = "kernel_scale"
# A linear layer's low-rank adapter, beside its kernel; see `model.lora`.
LORA_A, LORA_B, LORA_SCALE = "lora_a", "lora_b", "lora_scale"


def partitioned(init: nn.initializers.Initializer, axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """An initializer with the logical names of its axes, typed as what `Module.param` returns: without flax's box."""
    return cast(Callable[..., jax.Array], nn.with_logical_partitioning(init, axes))


class Dense(nn.Module):
    """A linear layer with a two-dimensional kernel [in, out].

    The rows are flattened before the product: one large 2-D matmul is what every backend does best. Where the tree
    holds an adapter beside the kernel, scale (x A) B is added; W + scale A B is never made. A product with a kernel in
    int8 is multiplied by the scales beside it.

    Attributes:
      features: size of the output's last axis.
      axes: logical names of the kernel's two axes.
      use_bias: whether a bias is added.
      dtype, param_dtype: names of the compute and the storage type.
      init_scale: standard deviation of the kernel's initial values (the checkpoint's `initializer_range`).
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_scale: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.normal(self.init_scale), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.dtype(self.param_dtype))
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = rows @ kernel.astype(self.dtype)
        if self.has_variable("params", KERNEL_SCALE):
            y = y * self.get_variable("params", KERNEL_SCALE).astype(self.dtype)
        if self.use_bias:
            init = partitioned(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", init, (self.features,), jnp.dtype(self.param_dtype))
            y = y + bias.astype(self.dtype)
        if self.has_variable("params", LORA_A):
            names = (LORA_A, LORA_B, LORA_SCALE)
            a, b, scale = (self.get_variable("params", name).astype(self.dtype) for name in names)
            y = y + scale * ((rows @ a) @ b)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm: variance in float32, rounded to the compute type *before* the weight multiplies.

    The order of rounding and multiplication is the released model's; in bfloat16 the other order differs.
    """

    eps: float
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.param_dtype))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias: all in float32, rounded to the compute type at the end."""

    eps: float
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def param(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(name, partitioned(init, ("norm",)), (x.shape[-1],), jnp.dtype(self.param_dtype))

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale + bias).astype(self.dtype)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(gelu(up(x))) where it is not gated, with the approximate (tanh) GELU."""

    features: int
    use_bias: bool
    gated: bool
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_scale: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name: str, features: int, axes: tuple[str, str]) -> Dense:
            return Dense(features, axes, self.use_bias, self.dtype, self.param_dtype, self.init_scale, name=name)

        gate = dense("gate", self.features, ("embed", "mlp"))(x) if self.gated else None
        up = dense("up", self.features, ("embed", "mlp"))(x)
        inner = nn.gelu(up) if gate is None else nn.silu(gate) * up
        return dense("down", x.shape[-1], ("mlp", "embed"))(inner)


def remat_policy(name: str) -> Callable | None:
    """The checkpoint policy of that name: "full" saves nothing, "dots" saves the products with the weights
    and the output of attention.

    Raises:
      ValueError: for another name.
    """
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
        ),
    }
    if name not in policies:
        raise ValueError(f"remat: {name!r} is not known; use 'none', {', '.join(map(repr, policies))}")
    return policies[name]


def scan_layers(
    block: type[nn.Module], length: int, remat: str, num_broadcast: int, num_scanned: int
) -> type[nn.Module]:
    """One scan over `length` equal layers, parameters stacked on a leading axis named "layers".

    The block is called as `block(carry, *broadcast, *scanned) -> (carry, outputs)`.

    Args:
      block: the layer's module class.
      length: number of layers.
      remat: "none", "full" or "dots".
      num_broadcast: how many arguments after the carry are the same for all layers.
      num_scanned: how many arguments after those carry a leading layer axis (or are None).
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=remat_policy(remat))
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (nn.broadcast,) * num_broadcast + (0,) * num_scanned),  # one for each, not only an int
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
