"""Oracle: hand-computed times under a clock that the test moves, and the exact text."""

import io

import pytest

from qwenla_jax.utils.progress import Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (41.4, "41s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07"), (float("nan"), "?"), (-3, "0s")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_lines_off_a_terminal_and_time_left_without_the_compilation():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, stream=stream, terminal=False, clock=clock)
    for step, took in ((1, 50.0), (2, 2.0), (3, 2.0)):
        clock.now += took
        progress.show(step, {"train/reward": 1.23456, "train/kl": 0.5, "perf/unlisted": 3.0})
    assert progress.eta() == pytest.approx(7 * 2.0)
    assert stream.getvalue().splitlines() == [
        "step 1/10 reward=1.235 kl=0.5",
        "step 2/10 2.00s/step eta 16s reward=1.235 kl=0.5",
        "step 3/10 2.00s/step eta 14s reward=1.235 kl=0.5",
    ]


def test_a_resumed_run_counts_only_its_own_steps():
    clock = Clock()
    progress = Progress(100, start=90, stream=io.StringIO(), terminal=False, clock=clock)
    for step, took in ((91, 30.0), (92, 1.0), (96, 4.0)):
        clock.now += took
        progress.tick(step)
    assert progress.eta() == pytest.approx(4.0)


def test_bar_on_a_terminal_fits_the_width_and_notes_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    clock, stream = Clock(), io.StringIO()
    progress = Progress(4, stream=stream, terminal=True, clock=clock)
    for step in (1, 2):
        clock.now += 1
        progress.show(step, {"train/reward": 1.0, "train/kl": 0.1, "train/loss": 0.1, "train/entropy": 1.0})
    progress.show(2, {"eval/accuracy": 0.75})
    progress.close()
    text = stream.getvalue()
    assert "\r[##########..........] 2/4 1.00s/step eta 2s" in text
    assert all(len(piece) < 60 for piece in text.replace("\n", "\r").split("\r"))
    assert "step 2/4 eval_accuracy=0.75\n" in text
    assert text.endswith("\n")
