"""Programs compiled from shapes alone, for tests of what is read from their texts."""

import os
import sys

import jax
import jax.numpy as jnp
import pytest

needs_tpu_compiler = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="the TPU compiler is for Linux on x86-64"
)


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(run, *inputs):
    return jax.jit(run).lower(*inputs).compile()
