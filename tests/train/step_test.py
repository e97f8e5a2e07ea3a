"""The update steps: accumulation, what they descend, and the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import IMAGE, VOCAB, questions, small_model

from qwenla_jax.config.run_options import BrpoOptions, OptimOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.brpo.update import RolloutBatch, make_brpo_gradient
from qwenla_jax.train.logprobs import response_logprobs
from qwenla_jax.train.optimizer import make_optimizer
from qwenla_jax.train.sft.update import make_sft_gradient, sft_loss
from qwenla_jax.train.train_runtime import stack_microbatches
from qwenla_jax.train.train_state import create, make_update
from qwenla_jax.types import TokenBatch

BIAS = suppression_bias(VOCAB, VOCAB, [IMAGE])


@functools.cache
def model():
    return small_model()


@functools.cache
def sft_gradient():
    """Compiled once for each number of microbatches: (parameters, batch, bias) -> gradient and metrics."""
    return jax.jit(make_sft_gradient(model()[0]))


@functools.cache
def score():
    """Compiled: (parameters, vision, prompts, ids, bias) -> log-probabilities and entropies."""
    return jax.jit(functools.partial(response_logprobs, model()[0], temperature=1.0))


def sft_batch(rows, seed=0):
    vision, prompts = questions(rows, seed)
    rng = np.random.default_rng(seed)
    target_BxR = np.minimum(rng.integers(8, 14, rows)[:, None] + np.arange(8), 15).astype(np.int32)
    loss = (np.diff(target_BxR, prepend=0) > 0) & (target_BxR < prompts.length_Q[:, None])
    return vision, TokenBatch(
        prompts.ids_QxP, prompts.pos_QxPx3, prompts.visual_QxP, prompts.length_Q, target_BxR, loss.astype(np.float32)
    )


def judged_batch(questions_, group=2, tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = questions_ * group
    return RolloutBatch(
        ids_BxR=rng.integers(0, IMAGE, (rows, tokens)).astype(np.int32),
        logp_BxR=(-rng.random((rows, tokens))).astype(np.float32),
        length_B=rng.integers(1, tokens + 1, rows).astype(np.int32),
        advantage_B=rng.normal(size=rows).astype(np.float32),
        counted_B=np.ones(rows, np.float32),
        trained_B=np.ones(rows, np.float32),
    )


def brpo_gradient(**options):
    return make_brpo_gradient(model()[0], BrpoOptions(group_size=2, **options), 8)


def take(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def split(vision, text, parts):
    """Equal parts, each with its own images."""
    rows = len(vision.valid_IxS) // parts
    name = "visual_BxT" if hasattr(text, "visual_BxT") else "visual_QxP"
    batches = []
    for i in range(parts):
        here = slice(i * rows, (i + 1) * rows)
        part = take(text, here)
        index = getattr(part, name)
        moved = np.where(index >= 0, index - i * rows * vision.gather_IxM.shape[1], -1)
        batches.append((take(vision, here), part.replace(**{name: moved})))
    return stack_microbatches(batches)


def assert_close(one, two, atol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_sft_gradient_does_not_depend_on_the_parts():
    _, params = model()
    vision, tokens = sft_batch(4)
    (whole, metrics), *cuts = (sft_gradient()(params, *split(vision, tokens, n), BIAS) for n in (1, 2, 4))
    for cut, cut_metrics in cuts:
        assert_close(whole, cut, 1e-5)
        np.testing.assert_allclose(metrics["loss"], cut_metrics["loss"], rtol=1e-5)
    plain = jax.grad(lambda p: sft_loss(model()[0], p, vision, tokens, BIAS)[0] / tokens.loss_BxR.sum())
    assert_close(whole, jax.jit(plain)(params), 1e-5)


def test_sft_learns_and_only_from_the_response():
    net, params = model()
    optimizer = make_optimizer(OptimOptions(learning_rate=1e-2, warmup_ratio=0.0), 60, params)
    step, state = jax.jit(make_update(make_sft_gradient(net), optimizer)), create(params, optimizer)
    vision, tokens = sft_batch(4)
    batch = split(vision, tokens, 1)
    losses = []
    for _ in range(60):
        state, metrics = step(state, *batch, BIAS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.05 * losses[0]
    blind = tokens.replace(loss_BxR=np.zeros_like(tokens.loss_BxR))
    grads, metrics = sft_gradient()(params, *split(vision, blind, 1), BIAS)
    assert all(not np.any(g) for g in jax.tree.leaves(grads)) and float(metrics["loss"]) == 0


@pytest.mark.parametrize(("norm", "parts"), [("sequence", (8,)), ("token", (2, 8)), ("constant", (8,))])
def test_brpo_gradient_does_not_depend_on_the_parts(norm, parts):
    """One part of 8 questions, 2 of 4, 8 of 1, of ragged lengths; some responses count but are not trained on."""
    _, params = model()
    gradient = jax.jit(brpo_gradient(norm=norm))
    reference = jax.tree.map(lambda x: x * 1.01, params)
    vision, prompts = questions(8)
    rollout_batch = judged_batch(8)
    rollout_batch = rollout_batch.replace(trained_B=np.tile(np.array([1, 1, 0, 1], np.float32), 4))
    assert len(set(rollout_batch.length_B.tolist())) > 3
    results = []
    for n in (1, *parts):
        cut = jax.tree.map(lambda x, n=n: x.reshape(n, len(x) // n, *x.shape[1:]), rollout_batch)
        grads, metrics = gradient(params, reference, *split(vision, prompts, n), cut, BIAS)
        metrics.pop("sampling_logp_difference")
        results.append((grads, metrics))
    one_by_one = jax.jit(brpo_gradient(norm=norm, group_parts=2))
    cut = jax.tree.map(lambda x: x.reshape(2, len(x) // 2, *x.shape[1:]), rollout_batch)
    results.append(one_by_one(params, reference, *split(vision, prompts, 2), cut, BIAS))
    results[-1][1].pop("sampling_logp_difference")
    for grads, metrics in results[1:]:
        assert_close(results[0][0], grads, 1e-5)
        assert_close(results[0][1], metrics, 1e-4)


def test_on_policy_ratio_is_one_and_kl_zero_and_the_reference_counts():
    _, params = model()
    gradient = jax.jit(brpo_gradient())
    vision, prompts = questions(4)
    rollout_batch = judged_batch(4)
    logp, _ = score()(params, vision, prompts, rollout_batch.ids_BxR, BIAS)
    rollout_batch = rollout_batch.replace(logp_BxR=np.asarray(logp))
    batch = (*split(vision, prompts, 1), jax.tree.map(lambda x: x[None], rollout_batch))
    _, same = gradient(params, params, *batch, BIAS)
    assert abs(float(same["ratio_mean"]) - 1) < 1e-5 and abs(float(same["kl"])) < 1e-9
    assert float(same["sampling_logp_difference"]) < 1e-5
    moved = jax.tree.map(lambda x: x * 1.02, params)
    _, other = gradient(params, moved, *batch, BIAS)
    ref_logp, _ = score()(moved, vision, prompts, rollout_batch.ids_BxR, BIAS)
    mask = np.arange(6) < rollout_batch.length_B[:, None]
    d = np.asarray(ref_logp - logp, np.float64)
    np.testing.assert_allclose(other["kl"], ((np.expm1(d) - d) * mask).sum() / mask.sum(), rtol=1e-3)


def test_an_update_raises_what_had_an_advantage():
    _, params = model()
    optimizer = make_optimizer(OptimOptions(learning_rate=1e-3, warmup_ratio=0.0), 10, params)
    step = jax.jit(make_update(brpo_gradient(beta=0.0), optimizer))
    state = create(params, optimizer)
    vision, prompts = questions(4)
    rollout_batch = judged_batch(4)
    rollout_batch = rollout_batch.replace(advantage_B=np.tile(np.array([1.0, -1.0], np.float32), 4))
    before = np.asarray(score()(params, vision, prompts, rollout_batch.ids_BxR, BIAS)[0])
    rollout_batch = rollout_batch.replace(logp_BxR=before)
    batch = (*split(vision, prompts, 1), jax.tree.map(lambda x: x[None], rollout_batch))
    state, _ = step(state, None, *batch, BIAS)
    after = np.asarray(score()(state.params, vision, prompts, rollout_batch.ids_BxR, BIAS)[0])
    mask = np.arange(6) < rollout_batch.length_B[:, None]
    change = ((after - before) * mask).sum(1)
    assert change[0::2].sum() > 0 > change[1::2].sum()


def test_parts_in_different_buckets_are_padded_alike():
    """The stacked visual indexes must name the same images' tokens as before."""
    one, two = questions(2, 0, tokens=4), questions(2, 1, tokens=2)
    vision, prompts = stack_microbatches([one, two])
    assert vision.gather_IxM.shape == (2, 2, 4) and jnp.shape(prompts.visual_QxP) == (2, 2, 16)
    assert (
        prompts.visual_QxP[1].tolist()
        == np.where(two[1].visual_QxP >= 0, two[1].visual_QxP // 2 * 4 + two[1].visual_QxP % 2, -1).tolist()
    )


def test_runs_of_frames_stay_apart_when_parts_are_padded_alike():
    """Each part's embeddings are those that it has alone, with all its images in one run."""
    net, params = model()
    encode = jax.jit(lambda vision: net.apply({"params": params}, vision, method="encode"))
    embed = functools.partial(net.apply, {"params": params}, method="embed")

    def embedded(vision, prompts):
        return embed(prompts.ids_QxP, prompts.visual_QxP, encode(vision), vision.shards)

    one, two = questions(4, 0, tokens=4), questions(4, 1, tokens=2)
    # The second has room for another image behind each of its own.
    spread = jax.tree.map(lambda x: np.stack([x, np.zeros_like(x)], axis=1).reshape(8, *x.shape[1:]), two[0])
    index = two[1].visual_QxP
    moved = np.where(index >= 0, index // 2 * 4 + index % 2, -1)
    parts = [(one[0].replace(shards=2), one[1]), (spread.replace(shards=2), two[1].replace(visual_QxP=moved))]
    stacked = stack_microbatches(parts)
    assert stacked[0].gather_IxM.shape == (2, 8, 4) and stacked[0].shards == 2
    for number, alone in enumerate((one, two)):
        result = embedded(*take(stacked, number))
        np.testing.assert_allclose(result, embedded(*alone), rtol=1e-5, atol=1e-5)
    # An index that leaves its row's run shows: below and above.
    for row, first in ((0, 16), (3, 0)):
        index = parts[1][1].visual_QxP.copy()
        index[row, 1] = first
        result = np.isnan(embedded(parts[1][0], parts[1][1].replace(visual_QxP=index))).any(-1)
        assert result[row, 1] and result.sum() == 1
