"""AdamW against torch's, schedules by hand, and what may be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import small_model

from qwenla_jax.config.run_options import OptimOptions
from qwenla_jax.model.trainable import VOCABULARY_AXIS, param_paths, trainable_labels
from qwenla_jax.train.optimizer import make_optimizer, schedule
from qwenla_jax.train.train_state import apply_gradients, create


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


TAGS = (("decoder/embed/.*", "tags"), ("decoder/lm_head/.*", "tags"), ("visual/.*", "freeze"), (".*", "train"))
# <REFLECTION> and three more, the first and the last row of the vocabulary among them.
ROWS = (0, 5, 41, 95)


def tied():
    """A model without a head of its own."""
    text = dataclasses.replace(small_model()[0].config.text, tie_word_embeddings=True)
    return small_model(text=text)[1]


def rows_of(path, array):
    """The vocabulary's rows of an embedding or head, as the first axis."""
    return np.asarray(array).T if path == "decoder/lm_head/kernel" else np.asarray(array)


@pytest.mark.parametrize("shared", [False, True])
def test_of_embedding_and_head_only_the_tags_rows_are_trained(shared):
    """Also with weight decay, which would shrink the other rows; their moments stay 0."""
    params = tied() if shared else small_model()[1]
    rules = tuple(rule for rule in TAGS if not (shared and "lm_head" in rule[0]))
    options = OptimOptions(
        learning_rate=0.01,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        warmup_ratio=0.0,
        clip_norm=0.5,
        trainable=rules,
    )
    optimizer = make_optimizer(options, 1000, params, ROWS)
    state = create(params, optimizer)
    rng = np.random.default_rng(0)
    paths = param_paths(params)
    others = np.setdiff1d(np.arange(96), ROWS)
    theirs = {
        path: torch.nn.Parameter(torch.tensor(rows_of(path, leaf)[list(ROWS)] if path in VOCABULARY_AXIS else leaf))
        for path, leaf in zip(paths, jax.device_get(jax.tree.leaves(params)), strict=True)
        if not path.startswith("visual/")
    }
    adamw = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    update = jax.jit(lambda state, grads: apply_gradients(state, grads, optimizer)[0])
    for _ in range(3):
        # The rows that are not trained have the largest gradients: they must count in no norm.
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        for path, grad in zip(paths, jax.tree.leaves(grads), strict=True):
            if path in VOCABULARY_AXIS:
                rows_of(path, grad)[others] *= 100
            if path in theirs:
                theirs[path].grad = torch.tensor(rows_of(path, grad)[list(ROWS)] if path in VOCABULARY_AXIS else grad)
        state = update(state, grads)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        adamw.step()
    moved = 0
    for path, old, new in zip(paths, jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        if path.startswith("visual/"):
            np.testing.assert_array_equal(old, new)
            continue
        want = theirs[path].detach().numpy()
        if path in VOCABULARY_AXIS:
            old, new = rows_of(path, old), rows_of(path, new)
            np.testing.assert_array_equal(old[others], new[others])
            new, moved = new[list(ROWS)], moved + 1
        np.testing.assert_allclose(new, want, atol=1e-5, err_msg=path)
    assert moved == (1 if shared else 2)
    seen = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        name = next((n for n in VOCABULARY_AXIS if "/".join(str(getattr(k, "key", k)) for k in path).endswith(n)), None)
        if name:
            assert not rows_of(name, leaf)[others].any() and rows_of(name, leaf)[list(ROWS)].all()
            seen += 1
    assert seen == 2 * moved  # both moments


def test_the_tags_rule_needs_ids_and_a_vocabulary():
    _, params = small_model()
    with pytest.raises(ValueError, match="'tags' rule needs the ids of the tags"):
        make_optimizer(OptimOptions(trainable=TAGS), 10, params)
    with pytest.raises(ValueError, match="'tags' for decoder/norm/scale; only decoder/embed/embedding"):
        trainable_labels(params, [("decoder/norm/.*", "tags"), (".*", "train")])
    with pytest.raises(ValueError, match="no rule covers decoder/lm_head/kernel"):
        trainable_labels(params, [("decoder/embed/.*", "tags"), ("visual/.*|decoder/(layers|norm)/.*", "train")])
