"""Evaluation of the embedded checkpoint, which must be a trained one, and the counting by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from qwenla_jax.config.run_options import EvalOptions, RewardOptions, RunOptions
from qwenla_jax.data.record import Record
from qwenla_jax.inference.sample_batches import Answered
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.train import evaluation as module
from qwenla_jax.train.evaluation import Evaluation, evaluate
from qwenla_jax.train.train_runtime import build, make_run_source
from qwenla_jax.types import Rollout


def test_counts_by_hand(tmp_path):
    result = Evaluation(
        ids=list("abcd"),
        kinds=["count", "count", "compare", "count"],
        right=[True, False, True, True],
        well_formed=[True, True, True, False],
        lengths=[4, 6, 8, 2],
        responses=["a", "b", "c", "d"],
        inserted=[1, 0, 2, 0],
        skipped=[0, 0, 1, 0],
    )
    metrics = result.metrics()
    assert metrics["eval/accuracy"] == 0.75 and metrics["eval/accuracy/count"] == pytest.approx(2 / 3)
    assert metrics["eval/format"] == 0.75 and metrics["eval/completions/mean_length"] == 5
    # Wilson's interval of 3 of 4, as statsmodels' proportion_confint(3, 4, method="wilson") gives it.
    np.testing.assert_allclose(
        [metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]], [0.300642, 0.954413], atol=1e-6
    )
    result.write(tmp_path / "deep" / "e.json")
    assert Evaluation.read(tmp_path / "deep" / "e.json") == result
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["e.json"] and json.loads(
        (tmp_path / "deep" / "e.json").read_text()
    )


@pytest.mark.parametrize("match, right", [("normalized", [True, True, False]), ("exact", [False, True, False])])
def test_answers_are_matched_as_the_rewards_match_them(monkeypatch, match, right):
    texts = ["<CONCLUSION>red</CONCLUSION>", "<CONCLUSION>B</CONCLUSION>", "<CONCLUSION>blue</CONCLUSION>"]
    records = [Record(name, (), "q", "B", None, "k", options=("blue", "red")) for name in "xyz"]
    none = np.zeros(3, np.int32)
    rollout = Rollout(
        ids_BxR=np.arange(3)[:, None],
        logp_BxR=np.zeros((3, 1)),
        length_B=none + 1,
        stopped_B=none.astype(bool),
        inserted_B=none,
        skipped_B=none,
        selected_BxExX=np.zeros((3, 0, 1), bool),
    )
    monkeypatch.setattr(module, "answer", lambda *args: iter([Answered(records, None, None, rollout, texts)]))
    runtime = SimpleNamespace(
        options=RunOptions(rewards=RewardOptions(match=match)),
        tokenizer=SimpleNamespace(decode=lambda ids: texts[ids[0]]),
    )
    assert evaluate(runtime, None, None, None, 3).right == right


def test_the_embedded_checkpoint_is_trained():
    """Far above what guessing gives (below 40%); 100 scenes in batches of 64, so that the last one is padded."""
    options = RunOptions(eval=EvalOptions(batch_size=64))
    runtime, params = build(options)
    sampler = Sampler(runtime, runtime.sample_options(1, 0.0))
    result = evaluate(runtime, sampler, params, make_run_source(options, "held_out"), 100)
    assert len(result.ids) == len(set(result.ids)) == 100
    assert np.mean(result.well_formed) > 0.95
    assert result.accuracy.share > 0.55
    again = evaluate(runtime, sampler, params, make_run_source(options, "held_out"), 20)
    assert again.right == result.right[:20]
