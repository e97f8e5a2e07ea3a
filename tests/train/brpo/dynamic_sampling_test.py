"""Questions that teach nothing give way to others; rows stay with their questions."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest

from qwenla_jax.config.run_options import (
    BrpoOptions,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    OptimOptions,
    PoolOptions,
    RewardOptions,
    RunOptions,
)
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.train.brpo.dynamic_sampling import SampledGroups, fill, fit, further_records, join
from qwenla_jax.train.brpo.score import ScoredRollout
from qwenla_jax.train.loop import run
from qwenla_jax.types import Rollout

G = 2


def groups(names, equal, slots=3):
    """Questions by name; every row carries its question's number times 10 plus its place in the group."""
    rows = len(names) * G
    mark = np.repeat([ord(name) for name in names], G) * 10 + np.tile(np.arange(G), len(names))
    rollout = Rollout(
        ids_BxR=np.repeat(mark[:, None], 4, axis=1),
        logp_BxR=np.repeat(mark[:, None], 4, axis=1).astype(np.float32),
        length_B=np.full(rows, 4),
        stopped_B=np.ones(rows, bool),
        inserted_B=np.zeros(rows, int),
        skipped_B=np.zeros(rows, int),
        selected_BxExX=np.ones((rows, 1, slots), bool),
    )
    zero_std_Q = np.array(equal)
    counted = (~np.repeat(zero_std_Q, G)).astype(np.float32)
    scored = ScoredRollout(
        [str(m) for m in mark], [None] * rows, mark.astype(np.float32), counted, counted, zero_std_Q,
        rollout.length_B, rollout.stopped_B,
    )  # fmt: skip
    return SampledGroups(list(names), rollout, scored)


def consistent(result):
    want = np.repeat([ord(name) for name in result.records], G) * 10 + np.tile(np.arange(G), len(result.records))
    return (
        np.array_equal(result.rollout.ids_BxR[:, 0], want)
        and result.scored.texts == [str(m) for m in want]
        and np.array_equal(result.scored.advantage_B, want)
    )


def test_nothing_is_drawn_where_all_teach():
    first = groups("abc", [False] * 3)
    result, rounds = fill(first, lambda turn: pytest.fail("drawn"), 4)
    assert result is first and rounds == 0


def test_those_that_teach_come_first_and_in_order():
    further = [groups("def", [True, False, True], slots=5), groups("ghi", [False, False, True])]
    result, rounds = fill(groups("abc", [True, False, True]), further.__getitem__, 4)
    assert result.records == ["b", "e", "g"] and rounds == 2
    assert consistent(result) and result.scored.counted_B.tolist() == [1] * 6
    assert result.rollout.selected_BxExX.shape == (6, 1, 5)
    assert result.rollout.selected_BxExX.sum(axis=(1, 2)).tolist() == [3, 3, 5, 5, 3, 3]


def test_where_the_rounds_are_spent_the_rest_counts_in_nothing():
    turns = []
    result, rounds = fill(
        groups("abc", [True, False, True]), lambda turn: turns.append(turn) or groups("def", [True] * 3), 2
    )
    assert turns == [0, 1] and rounds == 2 and result.records == ["b", "a", "c"] and consistent(result)
    assert result.scored.counted_B.tolist() == [1, 1, 0, 0, 0, 0]


def test_what_an_insertion_shows_keeps_its_slots():
    selected = np.arange(12).reshape(2, 2, 3) % 2 == 0
    assert np.array_equal(fit(fit(selected, 7), 3), selected) and not fit(selected, 7)[:, :, 3:].any()
    assert join([groups("a", [False]).rollout]).ids_BxR.shape == (2, 4)


def test_further_questions_are_a_function_of_seed_step_and_round():
    source = SceneSource(0, "train", 1000)
    ids = lambda *args: [record.id for record in further_records(source, *args)]  # noqa: E731
    assert ids(0, 5, 1, 3, 4) == ids(0, 5, 1, 3, 4)
    drawn_ids = [name for step in range(5) for turn in range(3) for name in ids(0, step, turn, 3, 4)]
    assert len(set(drawn_ids)) == len(drawn_ids) and ids(1, 0, 0, 3, 4) != ids(0, 0, 0, 3, 4)


REWARD = """
def by_length(record):  # every third question earns the same for all its responses
    return 1.0 if int(record.id.rsplit("-", 1)[1]) % 3 == 0 else float(hash_of(record.response))

def hash_of(text):
    return sum(map(ord, text)) % 97
"""


def test_a_run_trains_on_questions_that_teach(tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    options = RunOptions(
        stage="brpo",
        steps=3,
        data=DataOptions(batch_size=4, max_response_tokens=12),
        optim=OptimOptions(learning_rate=1e-5, accumulation=2),
        brpo=BrpoOptions(group_size=4, drop_zero_std_groups=True, resample_rounds=3, mask_truncated=True),
        rewards=RewardOptions(
            format=0.0, accuracy=0.0, balance=0.0, extra=("lengths:by_length",), pool=PoolOptions(workers=1)
        ),
        eval=EvalOptions(every=0, final_size=0),
        checkpoint=CheckpointOptions(every=0),
    )
    assert dataclasses.asdict(options)["brpo"]["resample_rounds"] == 3
    run(options, tmp_path / "with")
    run(replace(options, brpo=replace(options.brpo, resample_rounds=0)), tmp_path / "without")
    message = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    }
    # The first round is the same questions; what is trained on is not.
    assert message["with"][0]["train/reward"] == message["without"][0]["train/reward"]
    assert 0 < message["without"][0]["train/frac_reward_zero_std"] < 1
    for row in message["with"]:
        assert row["train/resample/missing"] < row["train/frac_reward_zero_std"] or not row["train/resample/rounds"]
    assert any(row["train/resample/rounds"] for row in message["with"])
    # Responses are cut off at 12 tokens here, so with masking no token counts, and nothing is updated.
    assert all(row["train/completions/clipped_ratio"] == 1 and row["train/skipped"] == 1 for row in message["without"])
