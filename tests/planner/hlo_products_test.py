"""Operations of products, read from programs' texts. Oracle: the compiler's own count, where there are no loops."""

import jax
import jax.numpy as jnp
import pytest
from programs import abstract, compiled

from qwenla_jax.planner.hlo_products import product_flops


def convolution(x, w, **window):
    return jax.lax.conv_general_dilated(x, w, **{"window_strides": (1, 1), "padding": "VALID"} | window)


IMAGE, KERNEL = abstract(2, 3, 9, 8), abstract(4, 3, 3, 2)
PROGRAMS = {
    "product": (jnp.matmul, abstract(64, 128), abstract(128, 32)),
    "of a batch": (lambda x, w: jnp.einsum("bqd,bkd->bqk", x, w), abstract(6, 64, 16), abstract(6, 48, 16)),
    "over two axes": (lambda x, w: jnp.einsum("abd,abf->df", x, w), abstract(4, 32, 16), abstract(4, 32, 8)),
    "convolution": (convolution, IMAGE, KERNEL),
    "padded": (lambda x, w: convolution(x, w, padding=((2, 1), (0, 3))), IMAGE, KERNEL),
    "strided": (lambda x, w: convolution(x, w, window_strides=(2, 3)), IMAGE, KERNEL),
    "dilated": (lambda x, w: convolution(x, w, lhs_dilation=(2, 3), padding=((1, 1), (0, 2))), IMAGE, KERNEL),
    "with a wide window": (lambda x, w: convolution(x, w, rhs_dilation=(3, 2)), IMAGE, KERNEL),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_loops_it_is_the_compilers_count(name):
    program = compiled(*PROGRAMS[name])
    assert product_flops(program.as_text()) == program.cost_analysis()["flops"] > 0


def test_a_layer_is_counted_as_often_as_it_runs():
    """28 products of [16, 64] with [64, 64] and their gradients', two for each."""

    def run(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    program = compiled(jax.grad(run, (0, 1)), abstract(16, 64), abstract(28, 64, 64))
    assert product_flops(program.as_text()) == 3 * 28 * 2 * 16 * 64 * 64


# As libtpu 0.0.42 writes scores of 2 rows and 2 heads, 512 queries and 256 keys of 128 numbers: a batch is a window, of
# which one tap meets a number. Then a product by [512, 8 * 128], and a gradient of weights, summed over 2 rows.
TPU = """HloModule jit_f

ENTRY %main (q: bf16[2,2,512,128]) -> f32[2,2,512,256] {
  %q = bf16[2,2,512,128]{3,2,1,0} parameter(0)
  %k = bf16[2,256,2,128]{3,2,1,0} parameter(1)
  %d = bf16[2,256,512,1]{3,2,1,0} parameter(2)
  %w = bf16[8,128,512,1]{3,2,1,0} parameter(3)
  %x = bf16[2,256,1024]{2,1,0} parameter(4)
  %y = bf16[2,256,512]{2,1,0} parameter(5)
  %scores = f32[2,2,512,256]{2,3,1,0} convolution(%q, %k), window={size=2x2 lhs_dilate=2x2}, dim_labels=01bf_0o1i->01bf
  %wide = bf16[2,256,8,128]{3,1,2,0} convolution(%d, %w), window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
  ROOT %own = bf16[1024,512,1]{1,0,2} convolution(%x, %y), window={size=2}, dim_labels=0fb_0io->bf0
}
"""  # noqa: E501


def test_products_as_the_tpu_compiler_writes_them():
    scores, wide, own = 2 * 2 * 512 * 256 * 128, 2 * 256 * 8 * 128 * 512, 2 * 256 * 1024 * 512
    assert product_flops(TPU) == 2 * (scores + wide + own)
