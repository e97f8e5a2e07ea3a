"""Sampling with int8 kernels beside transformers on kernels that torch has rounded."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from models import sampler_of

import qwenla_jax
from qwenla_jax.model.layers import KERNEL_SCALE
from qwenla_jax.sampling.param_layout import cast
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias


def rounded(weight):
    """A matrix [out, in] rounded by torch to 255 values, with one scale for each output."""
    scale = weight.abs().amax(1) / 127
    return torch.quantize_per_channel(weight, scale, torch.zeros(len(scale)), 0, torch.qint8).dequantize()


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_sampled_tokens_and_their_log_probabilities(oracle, saved):
    arch = oracle.architecture(3)
    official, folder = saved(arch)
    model, params = qwenla_jax.load(folder)
    batch = oracle.inputs(arch)
    kernels = [x for x in official.model.language_model.layers.modules() if isinstance(x, torch.nn.Linear)]
    assert len(kernels) == 7 * arch.text_layers
    with torch.no_grad():
        for kernel in kernels:
            kernel.weight.copy_(rounded(kernel.weight))
    want = oracle.continue_greedily(official, arch, batch.hf)
    logits = oracle.logits(official, batch.hf, want)[:, -want.shape[1] - 1 : -1]
    bias_V = suppression_bias(arch.vocab, arch.vocab, range(arch.vocab - 4, arch.vocab))
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits + bias_V)), want.numpy()[..., None], 2)[..., 0]
    options = SampleOptions(1, oracle.tokens, 0.0, 1.0, (arch.vocab - 1,))
    samples = np.arange(len(batch.length_Q), dtype=np.uint32)
    given = batch.vision, batch.prompts, bias_V, np.uint32(0), np.uint32(0), samples

    own = cast(params, "float32", int8=True)
    assert sum(x.dtype == np.int8 for x in jax.tree.leaves(own)) == 7
    rollout = sampler_of(model, dataclasses.replace(options, int8=True))(own, *given)
    np.testing.assert_array_equal(rollout.ids_BxR, want)
    np.testing.assert_allclose(rollout.logp_BxR, logp, atol=1e-4)

    # The same bound tells int8 from the model itself, and a scale that is left out from int8.
    assert np.abs(sampler_of(model, options)(params, *given).logp_BxR - logp).max() > 1e-3
    own["decoder"]["layers"]["mlp"]["up"][KERNEL_SCALE] *= 1.01
    assert np.abs(sampler_of(model, options)(own, *given).logp_BxR - logp).max() > 1e-3
