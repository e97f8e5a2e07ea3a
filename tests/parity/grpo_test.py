"""The objective beside TRL's GRPO trainer: its own loss and its own advantages, on the same numbers.

TRL's code runs as it is. Its loss is called without a model, on a stand-in that hands it log-probabilities; its
advantages are a block within a long method, whose lines are taken from the source and executed.
"""

import collections
import inspect
import itertools
import math
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

from qwenla_jax.train.brpo.loss import advantages, brpo_loss, denominator, importance_ratio

LONGEST = 9  # the most tokens that a response may have
LOW, HIGH = 0.15, 0.3
NORMS = {"grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"}
# TRL warns that a sequence's ratio belongs to "grpo" alone, and computes the others all the same.
BATCHES = ["ragged", "truncated", "holes", "on policy"]
VARIANTS = list(itertools.product(NORMS, ["token", "sequence"], [0.0, 0.3], BATCHES))


def batch(seed, kind):
    """Ragged responses, and what TRL calls the tool mask: which of their tokens the policy wrote.

    "truncated": two responses are masked whole, as mask_truncated_completions does; "holes": some tokens were not the
    policy's; "on policy": the sampler's log-probabilities are the policy's own.
    """
    rng = np.random.default_rng(seed)
    rows, tokens = 8, 7
    logp, noise, drift = -3 * rng.random((rows, tokens)), *rng.normal(size=(2, rows, tokens))
    length = np.array([7, 1, 4, 3, 7, 2, 5, 6])
    mask = (np.arange(tokens) < length[:, None]).astype(np.float64)
    tool = np.ones_like(mask)
    if kind == "truncated":
        mask[[1, 4]] = 0
    if kind == "holes":
        tool = (rng.random(mask.shape) < 0.6).astype(np.float64)
    old = logp if kind == "on policy" else logp + 0.6 * noise
    return logp, old, logp + 0.5 * drift, rng.normal(size=rows), mask, tool


def trl_loss(loss_type, level, beta, logp, old, ref, adv, mask, tool, *, parts=1, items=None, importance=None):
    """TRL's loss and its gradient in the log-probabilities, and its metrics.

    `parts`: how many such batches TRL would sum to one update, and `items` the tokens of all of them.
    `importance`: the ratios of `trl_importance`, for a sampler that is not the policy.
    """
    leaf = torch.tensor(logp, requires_grad=True)
    entropies = torch.zeros_like(leaf)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (leaf, entropies, None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=parts),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=parts,
        epsilon_high=HIGH,
        epsilon_low=LOW,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=importance is not None,
        vllm_importance_sampling_correction=importance is not None,
    )
    rows, tokens = logp.shape
    inputs = {
        "prompt_ids": torch.zeros((rows, 1), dtype=torch.long),
        "prompt_mask": torch.ones((rows, 1), dtype=torch.long),
        "completion_ids": torch.zeros((rows, tokens), dtype=torch.long),
        "completion_mask": torch.tensor(mask),
        "tool_mask": torch.tensor(tool),
        "advantages": torch.tensor(adv),
        "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(ref),
        "num_items_in_batch": torch.tensor((mask * tool).sum() if items is None else items),
        "importance_sampling_ratio": importance,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), leaf.grad.numpy(), metrics


def our_loss(loss_type, level, beta, logp, old, ref, adv, mask, tool):
    """Our loss and its gradient in the log-probabilities, and the metrics that TRL has too."""
    norm = NORMS[loss_type]
    with jax.enable_x64(True):
        rest = [jnp.asarray(x, jnp.float64) for x in (old, ref, adv, mask * tool)]
        tokens = rest[-1].sum()

        def objective(x):
            value, sums = brpo_loss(x, *rest, beta=beta, clip_low=LOW, clip_high=HIGH, norm=norm, ratio=level, kl="k3")
            return value / denominator(norm, float(len(adv)), tokens, LONGEST), sums

        (value, sums), grad = jax.value_and_grad(objective, has_aux=True)(jnp.asarray(logp, jnp.float64))
        return float(value), np.asarray(grad), {name: float(x / tokens) for name, x in sums.items()}


@pytest.mark.parametrize("loss_type, level, beta, kind", VARIANTS)
def test_loss_and_gradient(loss_type, level, beta, kind):
    clipped = {"low": 0.0, "high": 0.0}
    for seed in range(3):
        numbers = batch(seed, kind)
        want, want_grad, metrics = trl_loss(loss_type, level, beta, *numbers)
        value, grad, ours = our_loss(loss_type, level, beta, *numbers)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(grad, want_grad, atol=1e-7)
        assert np.abs(want_grad).max() > 1e-2
        if beta:
            np.testing.assert_allclose(ours["kl"], metrics["kl"], rtol=1e-6)
        if level == "token":
            for side in ("low", "high"):
                np.testing.assert_allclose(ours[f"clip_{side}"], metrics[f"clip_ratio/{side}_mean"], rtol=1e-6)
                clipped[side] += metrics[f"clip_ratio/{side}_mean"]
    if level == "token":  # else these draws would not see the clip
        assert all((share > 0) == (kind != "on policy") for share in clipped.values())


def trl_importance(mode, low, high, logp, sampler, mask, tool):
    """TRL's own lines from the sampler's log-probabilities to the ratios."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    first, last = (
        "                per_token_logps_diff = (old",
        "            # Compute the per-token log probabilities for the",
    )
    assert source.count(first) == source.count(last) == 1, "TRL's method changed: find its ratios anew"
    names = {
        "torch": torch,
        "math": math,
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low or None,
            vllm_importance_sampling_clip_max=high,
        ),
        "old_per_token_logps": torch.tensor(logp),
        "sampling_per_token_logps": torch.tensor(sampler),
        "mask": torch.tensor(mask * tool),
    }
    exec(textwrap.dedent(source[source.index(first) : source.index(last)]), names)
    return names["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize("low", [0.0, 0.7])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_sampling(mode, low):
    """Of a sampler that is not the policy: ratios, and the loss and its gradient on policy."""
    high, beyond = 1.6, 0
    for seed, (loss_type, norm) in enumerate(NORMS.items()):
        logp, sampler, ref, adv, mask, tool = batch(seed, "holes")
        want = trl_importance(mode, low, high, logp, sampler, mask, tool)
        with jax.enable_x64(True):
            given = jnp.asarray(logp), jnp.asarray(ref), jnp.asarray(adv), jnp.asarray(mask * tool)
            got = importance_ratio(given[0], jnp.asarray(sampler), given[3], mode, low, high)
            np.testing.assert_allclose(got, want, rtol=1e-6)
            rest = {"beta": 0.3, "clip_low": LOW, "clip_high": HIGH, "norm": norm, "importance": got}

            def objective(x, given=given, rest=rest, norm=norm):
                value, _ = brpo_loss(x, given[0], *given[1:], **rest)
                return value / denominator(norm, float(len(given[2])), given[3].sum(), LONGEST)

            value, grad = jax.value_and_grad(objective)(given[0])
        numbers = logp, logp, ref, adv, mask, tool
        loss, want_grad, _ = trl_loss(loss_type, "token", 0.3, *numbers, importance=want)
        np.testing.assert_allclose(value, loss, rtol=1e-6)
        np.testing.assert_allclose(grad, want_grad, atol=1e-7)
        beyond += int(((want == 0) | (want == high) | (want == low)).sum())
    assert beyond > 5  # else these draws would not see the bounds


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_two_parts_make_one_update(loss_type):
    """TRL adds up the losses of its parts, each divided for itself; "bnpo" then weighs a part's tokens by its own
    number of them, and ours does not: it is not the same when the lengths differ."""
    numbers = batch(0, "truncated")
    items = (numbers[-2] * numbers[-1]).sum()
    parts = [
        trl_loss(loss_type, "token", 0.3, *(x[rows] for x in numbers), parts=2, items=items)
        for rows in (slice(0, 4), slice(4, 8))
    ]
    value, grad, _ = our_loss(loss_type, "token", 0.3, *numbers)
    np.testing.assert_allclose(value, sum(part[0] for part in parts), rtol=1e-6)
    np.testing.assert_allclose(grad, np.concatenate([part[1] for part in parts]), atol=1e-7)


def trl_advantages(rewards_BxN, weights, group_size, scale, total):
    """TRL's own lines from the rewards to the advantages; nan: a reward that a response does not have."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    first, last = "        unscorable_mask = torch.isnan(", "        # Slice to keep only the local part of the data"
    assert source.count(first) == source.count(last) == 1, "TRL's method changed: find its advantages anew"
    block = source[source.index(first) : source.index(last)]
    assert block.count("advantages = ") == 4, "TRL's advantages changed: read them anew"
    rewards = torch.tensor(rewards_BxN)
    names = {
        "torch": torch,
        "nanstd": grpo_trainer.nanstd,
        "self": SimpleNamespace(
            multi_objective_aggregation={"raw": "sum_then_normalize", "normalised": "normalize_then_sum"}[total],
            scale_rewards=scale,
            reward_weights=torch.tensor(weights),
            reward_funcs=[None] * len(weights),
        ),
        "rewards_per_func": rewards,
        "num_generations": group_size,
        "device": "cpu",
    }
    exec(textwrap.dedent(block), names)
    return names["advantages"].numpy(), names["is_std_zero"].numpy()


@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("scale, total", [("group", "raw"), ("batch", "raw"), ("none", "raw"), ("group", "normalised")])
def test_advantages(scale, total, invalid):
    """Three rewards of different spread, groups of 4, one of them of equal rewards, one with few or no rewards."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rewards = rng.normal(size=(20, 3)) * [1.0, 10.0, 0.1]
        rewards[4:8] = rewards[4]
        weights = np.array([1.0, 0.5, 2.0])
        valid = np.ones(20, bool)
        if invalid:
            valid[[1, 6, 9, 13, 14, 15, 16, 17, 18, 19]] = False  # of the last two groups one response, and none
            rewards[~valid] = np.nan
        want, zero = trl_advantages(rewards, weights, 4, scale, total)
        got, zero_std_Q = advantages(rewards, weights, valid, 4, std_eps=1e-4, scale=scale, total=total)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        assert np.abs(want).max() > 0.5 and not got[~valid].any()
        assert zero_std_Q.tolist() == [False, True, False, invalid, invalid]
        if scale == "group" and total == "raw":
            # TRL's deviation of fewer than two rewards is nan, ours 0; its flag is for the log alone.
            assert np.array_equal(np.repeat(zero_std_Q[:3], 4), zero[:12])
