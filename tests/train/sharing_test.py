"""What a BRPO step may share or move to save memory changes nothing that it computes.

Oracle: the plain arrangement of the same step, in which every program has the vision tower to itself, the reference is
on the devices, and as much is sampled at once as is updated at once.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from qwenla_jax.config.checks import relations
from qwenla_jax.config.run_options import BrpoOptions, DataOptions, EvalOptions, OptimOptions, RunOptions
from qwenla_jax.train.brpo import reference as reference_model
from qwenla_jax.train.brpo import trainer
from qwenla_jax.train.loop import first_state, state_plan
from qwenla_jax.train.programs import tower_is_frozen
from qwenla_jax.train.train_runtime import build, make_run_source
from qwenla_jax.types import VisionBatch, VisualTokens

PLAIN = RunOptions(
    data=DataOptions(batch_size=4),
    eval=EvalOptions(every=0, final_size=0, batch_size=4),
    optim=OptimOptions(accumulation=2, learning_rate=1e-3, trainable=(("visual/.*", "freeze"), (".*", "train"))),
    brpo=BrpoOptions(group_size=4),
)
SHARED = replace(PLAIN, brpo=replace(PLAIN.brpo, reference="host", rollout_batch=4))


def two_steps(options, monkeypatch, encoder):
    """Token ids and rewards of two steps, their metrics, the parameters after them, and what the update was handed."""
    handed = []
    if not encoder:
        monkeypatch.setattr(trainer, "tower_is_frozen", lambda runtime: False)
    runtime, params = build(options)
    reference = reference_model.make_reference(runtime, params)
    optimizer, shardings = state_plan(runtime, params)
    state = first_state(params, optimizer, shardings, keep=reference is params)
    stage = trainer.BrpoStage(runtime, optimizer, shardings, make_run_source(options, "train"), 0, reference)
    step = stage._step
    stage._step = lambda *args: (handed.append(args), step(*args))[1]
    result = []
    try:
        for number in range(2):
            state, metrics = stage.step(state, number, lambda doing: None)
            rollout = stage._last.rollout
            result.append((rollout.ids_BxR, [row["rewards"] for row in stage.inputs.rows], metrics))
    finally:
        stage.close()
    monkeypatch.undo()
    return result, jax.device_get(state.params), handed


@pytest.mark.slow
def test_shared_images_a_reference_on_the_host_and_other_rollout_batches(monkeypatch):
    plain, params, handed = two_steps(PLAIN, monkeypatch, encoder=False)
    shared, others, other_handed = two_steps(SHARED, monkeypatch, encoder=True)
    assert all(isinstance(args[2], VisionBatch) for args in handed)
    assert all(isinstance(args[2], VisualTokens) for args in other_handed)
    kinds = {leaf.sharding.memory_kind for args in other_handed for leaf in jax.tree.leaves(args[1])}
    assert kinds == {"pinned_host"} and jax.tree.leaves(handed[0][1])[0].sharding.memory_kind != "pinned_host"
    for (ids, rewards, metrics), (other_ids, other_rewards, other_metrics) in zip(plain, shared, strict=True):
        np.testing.assert_array_equal(ids, other_ids)
        assert rewards == other_rewards
        for name in ("loss", "kl", "grad_norm", "entropy", "ratio_mean"):
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)


def test_a_rollout_batch_divides_the_batch():
    wrong = replace(PLAIN, brpo=replace(PLAIN.brpo, rollout_batch=3))
    assert [text for text in relations(wrong) if "rollout_batch" in text] == [
        "config.brpo.rollout_batch: got 3, expected a divisor of config.data.batch_size (4)"
    ]


@pytest.mark.parametrize(
    "rules, frozen",
    [
        ((("visual/.*", "freeze"), (".*", "train")), True),
        ((("visual/merger/.*", "train"), ("visual/.*", "freeze"), (".*", "train")), False),
        (((".*", "train"),), False),
    ],
)
def test_a_tower_is_frozen_only_with_its_merger(rules, frozen):
    runtime, _ = build(replace(PLAIN, optim=replace(PLAIN.optim, trainable=rules)))
    assert tower_is_frozen(runtime) == frozen
