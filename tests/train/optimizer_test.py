"""AdamW against torch's, schedules by hand, and what may be trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import small_model

from qwenla_jax.train.optimizer import make_optimizer, param_paths, schedule, trainable_labels
from qwenla_jax.train.options import OptimOptions
from qwenla_jax.train.state import apply_gradients, create


def test_ten_updates_are_torchs():
    options = OptimOptions(
        learning_rate=0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, warmup_ratio=0.0, clip_norm=0.5
    )
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = make_optimizer(options, 10_000, {"a": start})
    state = create({"a": jnp.asarray(start)}, optimizer)
    for _ in range(10):
        grad = rng.normal(size=(4, 3)).astype(np.float32)
        state, metrics = apply_gradients(state, {"a": jnp.asarray(grad)}, optimizer)
        theirs.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        adamw.step()
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-6)
    np.testing.assert_allclose(state.params["a"], theirs.detach(), atol=1e-5)
    assert int(state.step) == 10


def test_schedules():
    rate = schedule(OptimOptions(learning_rate=1.0, warmup_ratio=0.1, schedule="linear"), 100)
    rates = [rate(0), rate(4), rate(9), rate(54), rate(99)]
    np.testing.assert_allclose(rates, [0.1, 0.5, 1.0, 46 / 91, 1 / 91], atol=1e-6)
    cosine = schedule(OptimOptions(learning_rate=1.0, warmup_ratio=0.1, schedule="cosine"), 100)
    want = [0.5 + 0.5 * np.cos(np.pi * done / 91) for done in (0, 45, 90)]
    np.testing.assert_allclose([cosine(9), cosine(54), cosine(99)], want, atol=1e-6)
    flat = schedule(OptimOptions(learning_rate=0.3, warmup_ratio=0.0), 10)
    np.testing.assert_allclose([flat(0), flat(9)], [0.3, 0.3], rtol=1e-6)


def test_frozen_parameters_stay_and_have_no_moments():
    _, params = small_model()
    options = OptimOptions(trainable=((r"visual/.*", "freeze"), (r"decoder/embed/.*", "freeze"), (r".*", "train")))
    optimizer = make_optimizer(options, 10, params)
    state = create(params, optimizer)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    decoder = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    decoder -= params["decoder"]["embed"]["embedding"].size
    assert moments == 2 * decoder
    after, _ = apply_gradients(state, jax.tree.map(jnp.ones_like, params), optimizer)
    for path, old, new in zip(param_paths(params), jax.tree.leaves(params), jax.tree.leaves(after.params), strict=True):
        frozen = path.startswith("visual/") or path == "decoder/embed/embedding"
        assert np.array_equal(old, new) == frozen, path


def test_rules_must_cover_all_and_match_something():
    _, params = small_model()
    with pytest.raises(ValueError, match="no rule covers decoder/embed/embedding"):
        trainable_labels(params, [("visual/.*", "freeze")])
    with pytest.raises(ValueError, match="vision/.*cover no parameter"):
        trainable_labels(params, [("vision/.*", "freeze"), (".*", "train")])
