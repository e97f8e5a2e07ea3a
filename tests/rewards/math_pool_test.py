r"""Math equivalence in the pool. Oracles: mathematics, the clock, /proc."""

import os
import time

import pytest
from rewards.records import record

from qwenla_jax.rewards import RewardError, RewardPool, RewardScores, RewardSettings, score

pytest.importorskip("math_verify")

MATH = RewardSettings(math=True)
DEADLINE = 3.0
# Expanded they have thousands of terms of thousands of digits; the library tries.
HANGS = [
    (r"(x+1)^{5000}(x-1)^{5000}", r"(x^2-1)^{5000}"),
    (r"((9^{9999})^{9999})^{999}", "3"),
]


def concludes(text, answer, **fields):
    return record(f"<CONCLUSION>{text}</CONCLUSION>", answer, **fields)


def test_same_as_in_this_process():
    records = [
        concludes(r"\sqrt{12}", r"2\sqrt{3}"),
        concludes(r"\sqrt{12}", r"2\sqrt{5}"),
        concludes(r"\sqrt{12}", "B", options=(r"\sqrt{2}", r"2\sqrt{3}")),
        concludes("red", "B", options=("blue", "red")),
        concludes("3 or 4", "3"),
        concludes("3", "3"),
    ]
    with RewardPool(MATH, workers=1) as pool:
        scores = pool.score(records)
    assert scores == [score(one, MATH) for one in records]
    assert [one.accuracy for one in scores] == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert [score(one, RewardSettings()).accuracy for one in records] == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(("text", "answer"), HANGS)
def test_a_hang_is_killed_and_costs_its_own_record_only(text, answer):
    records = [concludes("3", "3"), concludes(text, answer), concludes(r"\sqrt{12}", r"2\sqrt{3}")]
    others = set(_descendants(os.getpid()))  # of what other tests have started
    with RewardPool(MATH, workers=1, deadline_s=DEADLINE) as pool:
        start = time.perf_counter()
        first, hung, last = pool.score(records)
        assert time.perf_counter() - start < 5 * DEADLINE + 3
        children = set(_descendants(os.getpid())) - others
    assert isinstance(first, RewardScores) and first.accuracy == last.accuracy == 1.0
    assert isinstance(hung, RewardError) and hung.kind == "timeout"
    assert children and not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def test_the_library_is_imported_before_the_deadline_counts():
    with RewardPool(MATH, workers=1, deadline_s=0.8) as pool:
        for _ in range(3):
            assert pool.score([concludes(r"\sqrt{12}", r"2\sqrt{3}")])[0].accuracy == 1.0


def test_without_the_library_the_pool_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('not here')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="pip install"):
        RewardPool(MATH, workers=1)


def _descendants(pid):
    result = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            result += [int(name), *_descendants(int(name))]
    return result
