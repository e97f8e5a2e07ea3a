"""Attention by a kernel on meshes and on one device: prints "equal" or fails. No accelerator is needed."""

import os
import sys

os.environ.pop("XLA_FLAGS", None)  # compiled as by itself
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from qwenla_jax.config.shared_options import MeshOptions  # noqa: E402
from qwenla_jax.model import kernels  # noqa: E402
from qwenla_jax.model.attention import Segment, segment_attention  # noqa: E402
from qwenla_jax.model.layers import MASK_VALUE  # noqa: E402
from qwenla_jax.parallel.mesh import make_mesh  # noqa: E402
from qwenla_jax.parallel.sharding import activation_rules  # noqa: E402
from qwenla_jax.utils.compiler_options import accepted  # noqa: E402

QUICK = {"xla_backend_optimization_level": 0}
T, P, H = 20, 12, 16
SPLASH = functools.partial(kernels.splash_attention, interpret=True)
CUDNN = functools.partial(kernels.cudnn_attention, implementation="xla")
# Kernel, mesh, prompts, rows, query heads, key heads, rows that each device has, heads of queries and keys there.
CASES = [
    (SPLASH, (2, 2, 2), 4, 8, 4, 2, 2, (2, 1)),
    (SPLASH, (2, 1, 4), 1, 4, 8, 2, 2, (2, 1)),  # one prompt for all rows; each key head is needed on two devices
    (SPLASH, (4, 2, 1), 2, 4, 2, 2, 4, (2, 2)),  # four rows do not divide over eight devices
    (CUDNN, (2, 2, 2), 8, 8, 3, 3, 2, (3, 3)),  # three heads do not divide over two devices
    (CUDNN, (2, 2, 2), 4, 8, 4, 2, 2, (2, 1)),
]


def inputs(Q, B, N, K, hidden):
    """Queries, keys and values, and what hides keys."""
    rng = np.random.default_rng(Q + B + N)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    bias = jnp.asarray(np.where(rng.random((B, T)) < 0.3, MASK_VALUE, 0.0), jnp.float32) if hidden else None
    length = jnp.asarray(rng.integers(1, P + 1, Q), jnp.int32)
    return make(B, T, N, H), (make(Q, P, K, H), make(Q, P, K, H)), (make(B, T, K, H), make(B, T, K, H)), length, bias


def gradient(compute):
    """Value and gradient of a sum, compiled."""

    def loss(q, shared, own, length, bias):
        out = compute(q, (Segment(*shared, length_Q=length), Segment(*own, bias=bias, causal=True)))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=accepted(QUICK))


def compare(kernel, sizes, Q, B, N, K, rows, heads):
    """Fails where a mesh gives something else than one device, or another share of the work than it should."""
    arguments = inputs(Q, B, N, K, kernel is SPLASH)
    want = gradient(segment_attention)(*arguments)
    seen = []

    def local(q, segments):
        seen.append((len(q), (q.shape[2], segments[0].k.shape[2])))
        return kernel(q, segments)

    kernels.splash_attention, before = local, kernels.splash_attention
    with jax.set_mesh(make_mesh(MeshOptions(*sizes), 8)), activation_rules():
        got = gradient(functools.partial(kernels.attend, "splash"))(*arguments)
    kernels.splash_attention = before
    assert set(seen) == {(rows, heads)}, (seen, rows, heads)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


if __name__ == "__main__":
    for case in CASES:
        compare(*case)
    print("equal")
