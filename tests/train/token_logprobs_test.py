"""Chunked log-probabilities against torch, whatever the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train import token_logprobs as module
from qwenla_jax.train.token_logprobs import token_logprobs


@pytest.mark.parametrize("tokens, vocab, rows", [(4096, 16384, 50), (7, 16384, 50), (4096, 12, 50), (16, 8, 34)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_torchs(monkeypatch, tokens, vocab, rows, temperature):
    monkeypatch.setattr(module, "TOKEN_CHUNK", tokens)
    monkeypatch.setattr(module, "VOCAB_CHUNK", vocab)
    rng = np.random.default_rng(0)
    V, D = 48, 10
    hidden, head = rng.normal(size=(rows, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    bias = suppression_bias(V, 45, [3, 17])
    ids = rng.choice(np.flatnonzero(bias == 0), rows).astype(np.int32)
    weight = rng.normal(size=rows).astype(np.float32)

    def loss(hidden, head):
        two = lambda x: x.reshape(2, rows // 2, *x.shape[1:])  # noqa: E731
        logp, entropy = (x.reshape(-1) for x in token_logprobs(two(hidden), head, two(ids), bias, temperature))
        return jnp.sum(logp * weight), (logp, entropy)

    grads, (logp, entropy) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, head)
    h, w = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    logits = (h @ w).masked_fill(torch.tensor(bias) < 0, -torch.inf) / temperature
    want = torch.log_softmax(logits, -1)
    dist = torch.distributions.Categorical(logits=logits[:, torch.tensor(bias) == 0])
    chosen = want[torch.arange(rows), torch.tensor(ids).long()]
    (chosen * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(logp, chosen.detach(), atol=2e-5)
    np.testing.assert_allclose(entropy, dist.entropy().detach(), atol=2e-5)
    np.testing.assert_allclose(grads[0], h.grad, atol=2e-5)
    np.testing.assert_allclose(grads[1], w.grad, atol=2e-5)


def test_the_whole_of_logits_never_exists():
    """No array of the compiled program is as large as rows x vocabulary."""
    rows, D, V = 20_000, 8, 50_000
    args = (jnp.zeros((4, rows // 4, D)), jnp.zeros((D, V)), jnp.zeros((4, rows // 4), jnp.int32), jnp.zeros(V))
    step = jax.jit(jax.grad(lambda h, w, i, b: token_logprobs(h, w, i, b)[0].sum(), (0, 1)))
    peak = step.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert peak < rows * V  # a quarter of the logits in float32
