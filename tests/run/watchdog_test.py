"""A process that hangs is ended with its stacks; one that moves is not."""

import subprocess
import sys

HEAD = """
import sys, time
from pathlib import Path
from qwenla_jax.run.watchdog import Watchdog
def the_place_where_it_hangs():
    time.sleep(60)
"""


def run(body, tmp_path):
    code = HEAD + body.replace("WORKDIR", repr(str(tmp_path)))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


def test_a_stall_is_reported_and_ended(tmp_path):
    done = run("""
with Watchdog(Path(WORKDIR), 0.5) as dog:
    dog.heartbeat("rollout")
    the_place_where_it_hangs()
""", tmp_path)  # fmt: skip
    assert done.returncode == 75
    for text in (done.stderr, (tmp_path / "stalled.txt").read_text()):
        assert "busy with: rollout" in text and "config.guard.stall_s=0.5" in text
        assert "the_place_where_it_hangs" in text


def test_what_moves_is_left_alone(tmp_path):
    done = run("""
with Watchdog(Path(WORKDIR), 0.5) as dog:
    for _ in range(12):
        time.sleep(0.1)
        dog.heartbeat("step")
print("fine")
with Watchdog(Path(WORKDIR), None) as dog:
    time.sleep(0.8)
print("unwatched")
""", tmp_path)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "fine\nunwatched\n"), done.stderr
    assert not (tmp_path / "stalled.txt").exists()
