"""The whole gradient of BRPO and of supervised training, vision tower included, against torch's autograd through
transformers.

BRPO's objective is written here a second time, from the paper's formula and on transformers' logits: G responses of
each question, in which the images stand again, under a policy, the one that sampled, and a reference of other weights.
"""

import copy
import dataclasses

import jax
import numpy as np
import plain
import pytest
import torch
from official import CAP, Ids, Official, ids_of, responses, with_block

import qwenla_jax
from qwenla_jax.config.run_options import BrpoOptions
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.brpo.loss import advantages
from qwenla_jax.train.brpo.update import RolloutBatch, make_brpo_gradient
from qwenla_jax.train.sft.update import make_sft_gradient
from qwenla_jax.types import TokenBatch

G, R = 3, 14
OPTIONS = BrpoOptions(group_size=G, temperature=0.8, beta=0.2, clip_low=0.15, clip_high=0.3)
# Of every parameter's gradient: the norm of the difference over the norm. Rounding leaves 1e-5 at most.
TOLERANCE = 5e-5


def objective(logp_BxR, old_BxR, ref_BxR, reward_B, length_B, trained_B):
    """The paper's objective, negated; lists of tensors, one a response."""
    loss = 0.0
    for b, (logp_R, old_R, ref_R) in enumerate(zip(logp_BxR, old_BxR, ref_BxR, strict=True)):
        group = reward_B[b // G * G : b // G * G + G]
        advantage = (reward_B[b] - group.mean()) / (group.std(ddof=1) + 1e-4)
        ratio_R = torch.exp(logp_R - old_R)
        clipped_R = ratio_R.clamp(1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
        kl_R = torch.exp(ref_R - logp_R) - (ref_R - logp_R) - 1
        token_R = torch.minimum(ratio_R * advantage, clipped_R * advantage) - OPTIONS.beta * kl_R
        loss = loss - trained_B[b] * token_R[: length_B[b]].mean()
    return loss / len(logp_BxR)


def random_kept(prompts, grids_Q, share, rng):
    """What each insertion shows: visual tokens as sets [B][E], and the same by slots of the block, bool [B, E, X].

    At random, as nothing in the gradient may depend on why they were chosen: what a rollout recorded is replayed.
    """
    block = prompts.block
    selected, selected_BxExX = [], np.zeros((len(grids_Q) * G, CAP, block.source_QxX.shape[1]), bool)
    for b, kept_ExX in enumerate(selected_BxExX):
        q = b // G
        x = block.length_Q[q]
        visual = np.flatnonzero(prompts.visual_QxP[q][block.source_QxX[q, :x]] >= 0)
        count = plain.share_of(share, sum(r * c for r, c in grids_Q[q]))
        selected.append([set(rng.permutation(len(visual))[:count].tolist()) for _ in range(CAP)])
        kept_ExX[:, :x] = True
        for own, selected_X in zip(selected[b], kept_ExX, strict=True):
            selected_X[[slot for n, slot in enumerate(visual) if n not in own]] = False
    return selected, selected_BxExX


def changed(model, seed):
    """A copy of transformers' model whose weights are all a little different."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in other.parameters():
            value += 0.06 * value.abs().mean() * torch.randn(value.shape, generator=generator)
    return other


@pytest.mark.parametrize("mode, share, seed", [("copy", 1.0, 5), ("route", 0.5, 12), ("route", 0.5, 104)])
def test_every_parameters_gradient(oracle, tmp_path, mode, share, seed):
    arch = oracle.architecture(seed)
    policy = oracle.build(arch)
    models = {"policy": policy, "old": changed(policy, 1), "ref": changed(policy, 2)}
    batch = oracle.inputs(arch)
    prompts = with_block(batch, arch, oracle)
    B = len(prompts.length_Q) * G
    rng = np.random.default_rng(seed)
    suppressed = [7, *range(arch.vocab - 4, arch.vocab)]
    ids_BxR = responses(arch, B, R, seed)
    ids_BxR[ids_BxR == 7] = 8
    length_B = rng.integers(R - 4, R + 1, B).astype(np.int32)
    trained_B = np.ones(B, np.float32)
    trained_B[1] = 0  # cut off: it counts as a response, and its tokens do not
    reward_B = rng.normal(size=B)
    selected, selected_BxExX = random_kept(prompts, oracle.cases[arch.case], share, rng)

    def official(name):
        """Log-probabilities of each response, a list of tensors [length]."""
        one, result = Official(models[name], Ids.of(arch), batch, oracle.cases[arch.case]), []
        for b, ids_R in enumerate(ids_BxR):
            ids = ids_R[: length_B[b]].tolist()
            logits = one.logits(b // G, ids) if mode == "copy" else one.kept_logits(b // G, ids, selected[b])[0]
            logits = logits[:-1].index_fill(1, torch.tensor(suppressed), -torch.inf) / OPTIONS.temperature
            result.append(logits.log_softmax(-1)[torch.arange(len(ids)), ids])
        return result

    with torch.no_grad():
        old, ref = official("old"), official("ref")
    loss = objective(official("policy"), old, ref, reward_B, length_B, trained_B)
    loss.backward()

    params = {}
    for name in ("policy", "ref"):
        models[name].save_pretrained(tmp_path / name)
        model, params[name] = qwenla_jax.load(tmp_path / name)
    open_id, close_id = ids_of(arch)
    reattention = ReattentionConfig(mode, keep_ratio=share, max_insertions=CAP, open_id=open_id, close_id=close_id)
    everyone_B = np.ones(B, bool)
    rollout_batch = RolloutBatch(
        ids_BxR=ids_BxR,
        logp_BxR=np.stack([np.pad(logp_R.numpy(), (0, R - len(logp_R))) for logp_R in old]),
        length_B=length_B,
        advantage_B=advantages(reward_B[:, None], np.ones(1), everyone_B, G, std_eps=OPTIONS.std_eps)[0],
        counted_B=everyone_B.astype(np.float32),
        trained_B=trained_B,
        selected_BxExX=selected_BxExX,
    )
    one_part = jax.tree.map(lambda x: np.asarray(x)[None], (batch.vision, prompts, rollout_batch))
    options = dataclasses.replace(OPTIONS, group_parts=G if share < 1 else 1)
    gradient = jax.jit(make_brpo_gradient(model, options, R, reattention=reattention))
    logit_bias_V = suppression_bias(arch.vocab, arch.vocab, suppressed)
    grads, metrics = gradient(params["policy"], params["ref"], *one_part, logit_bias_V)
    np.testing.assert_allclose(metrics["loss"], loss.item(), atol=2e-6)
    # Both sides of the clip, and a reference that matters.
    assert min(metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) > 0 and metrics["kl"] > 1e-3

    assert_gradient(policy, model, grads, tmp_path)


@pytest.mark.parametrize("seed", [5, 104])
def test_supervised_training(oracle, tmp_path, seed):
    """Against the loss that transformers computes from labels: of each row the last 1 to 4 tokens."""
    arch = oracle.architecture(seed)
    official, batch = oracle.build(arch), oracle.inputs(arch)
    length_Q = batch.length_Q
    labels = torch.full_like(batch.hf["input_ids"], -100)
    target_BxR, loss_BxR = np.ones((len(length_Q), 5), np.int32), np.zeros((len(length_Q), 5), np.float32)
    for row, length in enumerate(length_Q):
        n = row % 4 + 1
        labels[row, -n:] = batch.hf["input_ids"][row, -n:]
        target_BxR[row, :n], loss_BxR[row, :n] = np.arange(length - n, length), 1
    loss = official(**batch.hf, labels=labels).loss
    loss.backward()
    official.save_pretrained(tmp_path / "official")
    model, params = qwenla_jax.load(tmp_path / "official")
    asked = batch.prompts
    tokens = TokenBatch(asked.ids_QxP, asked.pos_QxPx3, asked.visual_QxP, length_Q, target_BxR, loss_BxR)
    one_part = jax.tree.map(lambda x: np.asarray(x)[None], (batch.vision, tokens))
    grads, metrics = jax.jit(make_sft_gradient(model))(params, *one_part, np.zeros(arch.vocab, np.float32))
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    assert_gradient(official, model, grads, tmp_path)


def assert_gradient(official, model, grads, folder):
    """Written as a checkpoint, so that transformers says which of its parameters each is."""
    qwenla_jax.save(folder / "gradient", model, grads)
    named = type(official).from_pretrained(folder / "gradient", dtype=torch.float32)
    ours = {name: value.detach() for name, value in named.named_parameters()}
    assert ours.keys() == dict(official.named_parameters()).keys()
    for name, value in official.named_parameters():
        assert value.grad.norm() > 0, name
        error = float((ours[name] - value.grad).norm() / value.grad.norm())
        assert error < TOLERANCE, f"{name}: {error}"
