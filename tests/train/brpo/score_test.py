"""From responses to advantages: which of them count, and which are trained on. Rewards are given by hand."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.config.run_options import BrpoOptions
from qwenla_jax.data.datasets.jsonl import jsonl
from qwenla_jax.data.record import Record
from qwenla_jax.rewards import RewardError, RewardPool, RewardRecord, RewardSettings, score
from qwenla_jax.train.brpo.score import judge
from qwenla_jax.types import Rollout
from qwenla_jax.utils.progress import Progress

HEAD = "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>"
RIGHT, WRONG = f"{HEAD}<CONCLUSION>3</CONCLUSION>", f"{HEAD}<CONCLUSION>4</CONCLUSION>"
INSERTIONS = f"{HEAD}<REFLECTION>a b</REFLECTION><CONCLUSION>3</CONCLUSION>"
SETTINGS = RewardSettings(target_length=4.0)
# Three questions, G = 2; tokens are pieces of text.
PIECES = ["", RIGHT, WRONG, f"{HEAD}<REFLECTION>", "a", " b", "</REFLECTION><CONCLUSION>3</CONCLUSION>", "nothing"]
ROWS = [[1, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]


class Pool:
    def __init__(self, fail=()):
        self.fail, self.seen = fail, []

    def score(self, records):
        self.seen = records
        return [
            RewardError("timeout", "slow", "5 s") if row in self.fail else score(record, SETTINGS)
            for row, record in enumerate(records)
        ]


RECORDS = [Record(name, (), f"question {name}", "3", None, "count", options=(name, "3")) for name in "abc"]


def rollout_batch(pool, records=RECORDS, settings=SETTINGS, **options):
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(PIECES[i] for i in ids))
    length = np.array([3, 3, 3, 3, 5, 4])
    rollout = Rollout(
        ids_BxR=np.array([[*row, 0] for row in ROWS]),
        logp_BxR=np.zeros((6, 4), np.float32),
        length_B=length,
        stopped_B=np.array([1, 1, 1, 1, 1, 0], bool),
        inserted_B=np.zeros(6, int),
        skipped_B=np.zeros(6, int),
        selected_BxExX=np.zeros((6, 0, 1), bool),
    )
    return judge([rollout], records, tokenizer, pool, settings, BrpoOptions(group_size=2, **options))


def test_what_a_reward_is_handed():
    pool = Pool()
    rollout_batch(pool)
    assert pool.seen[4] == RewardRecord("c", "question c", "3", "count", INSERTIONS, (2,), 5, True, ("c", "3"))
    assert [record.id for record in pool.seen] == list("aabbcc") and not pool.seen[5].finished


def test_further_columns_of_a_file_reach_a_users_reward(tmp_path, monkeypatch):
    (tmp_path / "hardness.py").write_text(
        "def hard(record):\n"
        "    assert sorted(record.columns) == ['difficulty', 'tags'], sorted(record.columns)\n"
        "    return record.columns['difficulty'] + len(record.columns['tags']['é'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "?", "answer": "3", "kind": "k", "options": ["3", "4"], "response": RIGHT}
    left_out = {"thumbnail": "data:image/png;base64," + "A" * 10_000, "image_path": "b.png"}
    rows = [row | left_out | {"id": str(n), "difficulty": n / 4, "tags": {"é": [None, True][:n]}} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = jsonl(tmp_path / "a.jsonl")
    assert [dataset[n].columns for n in range(3)] == [{key: r[key] for key in ("difficulty", "tags")} for r in rows]
    settings = RewardSettings(target_length=4.0, extra=(("hardness:hard", 1.0),))
    with RewardPool(settings, workers=1) as pool:
        result = rollout_batch(pool, [dataset[n] for n in range(3)], settings)
    assert [s.extra["hard"] for s in result.scores] == [0, 0, 1.25, 1.25, 2.5, 2.5]
    message = result.metrics()
    assert message["rewards/hard/mean"] == 1.25
    console = io.StringIO()
    Progress(1, stream=console, terminal=False).show(1, {f"train/{name}": value for name, value in message.items()})
    shown = "reward=2.833 format=0.8333 accuracy=0.6667 balance=0.08333 overlong=0 hard=1.25"
    assert shown in console.getvalue()


def test_totals_advantages_and_metrics():
    result = rollout_batch(Pool())
    assert [s.total for s in result.scores] == [2, 1, 2, 2, 2.5, 0]
    half = math.sqrt(0.5)
    np.testing.assert_allclose(result.advantage_B, [half, -half, 0, 0, half, -half], rtol=1e-3)
    assert result.zero_std_Q.tolist() == [False, True, False]
    assert result.counted_B.tolist() == result.trained_B.tolist() == [1] * 6
    message = result.metrics()
    assert message["reward"] == pytest.approx(9.5 / 6) and message["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert message["rewards/accuracy/mean"] == pytest.approx(4 / 6) and message["rewards/balance/mean"] == 0.5 / 6
    assert message["completions/clipped_ratio"] == pytest.approx(1 / 6) and message["completions/max_length"] == 5
    assert message["reflection/count_mean"] == pytest.approx(1 / 6)
    assert message["reward_std"] == pytest.approx((half + 0 + 2.5 * half) / 3)


def test_equal_groups_are_left_out_on_request():
    result = rollout_batch(Pool(), drop_zero_std_groups=True)
    assert result.counted_B.tolist() == result.trained_B.tolist() == [1, 1, 0, 0, 1, 1]


def test_truncated_responses_earn_but_are_not_trained_on_on_request():
    result = rollout_batch(Pool(), mask_truncated=True)
    assert result.counted_B.tolist() == [1] * 6 and result.trained_B.tolist() == [1, 1, 1, 1, 1, 0]
    np.testing.assert_allclose(result.advantage_B, rollout_batch(Pool()).advantage_B)


def test_a_response_without_rewards_is_out_of_the_step():
    result = rollout_batch(Pool(fail=(1, 4, 5)))
    assert result.counted_B.tolist() == result.trained_B.tolist() == [1, 0, 1, 1, 0, 0]
    assert not result.advantage_B.any() and result.zero_std_Q.tolist() == [True, True, True]
    message = result.metrics()
    assert message["reward_errors/timeout"] == 3 and message["reward_errors/crash"] == 0 and message["reward"] == 2
    nothing = rollout_batch(Pool(fail=range(6))).metrics()
    assert math.isnan(nothing["reward"]) and nothing["reward_errors/timeout"] == 6
