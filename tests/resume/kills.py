"""Ends a run at random moments, starts it again, and compares it with one that was left alone.

    python tests/resume/kills.py --kills=100 --seed=0

Every kill is SIGKILL, SIGTERM, or SIGTERM twice, in one of the phases of a run. A run that comes to its end must have
the parameters, the optimizer's state, the sampled tokens and the rewards of the one that was left alone, to the last
bit, and no checkpoint may ever be found corrupt.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")
ROOT = Path(__file__).resolve().parents[2]
# The most seconds to wait in a phase before the kill: a compilation takes long, everything else is over soon.
PHASES = {
    "start": 6.0,
    "compile": 10.0,
    "data": 0.05,
    "rollout": 0.1,
    "reward": 0.02,
    "update": 0.2,
    "checkpoint": 0.15,
    "evaluation": 0.2,
    "export": 0.3,
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """When and how: in the `occurrence`-th time of a phase, `delay` seconds in."""

    phase: str
    occurrence: int
    delay: float
    how: str  # SIGKILL, SIGTERM or SIGTERM twice


def draw(rng: random.Random) -> Kill:
    phase = rng.choice(list(PHASES))
    occurrence = 1 if phase in ("start", "compile", "export") else rng.randint(1, 6)
    how = rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGTERM twice"])
    return Kill(phase, occurrence, rng.uniform(0, PHASES[phase]), how)


def launch(workdir: Path, cache: Path | None, kill: Kill | None) -> tuple[int, list[str], bool]:
    """Runs the child, kills it where asked; returns its status, its lines, and whether it was killed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    if cache is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(workdir)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    lines, seen, killed = [], collections.Counter(), False
    assert child.stdout is not None
    for line in child.stdout:
        lines.append(line.strip())
        word, _, phase = lines[-1].partition(" ")
        if word != "phase":
            continue
        seen[phase] += 1
        # The first rollout of a process compiles.
        here = "compile" if phase == "rollout" and seen[phase] == 1 else phase
        if kill and not killed and here == kill.phase and (seen[phase] >= kill.occurrence):
            time.sleep(kill.delay)
            killed = child.poll() is None
            for number in range(2 if kill.how == "SIGTERM twice" else 1):
                if number:
                    time.sleep(0.01)
                if child.poll() is None:
                    child.send_signal(signal.SIGKILL if kill.how == "SIGKILL" else signal.SIGTERM)
    status = child.wait()
    reader.join()
    if status not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        raise AssertionError(f"the run ended with {status} after {kill}:\n{''.join(errors)[-4000:]}\n{lines[-5:]}")
    return status, lines, killed


def trace(workdir: Path) -> dict[int, dict]:
    """The steps of a run; one that was computed several times must have come out the same."""
    result: dict[int, dict] = {}
    for text in (workdir / "trace.jsonl").read_text().splitlines():
        row = json.loads(text)
        assert result.setdefault(row["step"], row) == row, f"step {row['step']} came out in two ways in {workdir}"
    return result


def final_arrays(workdir: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, by name, read without this project's code."""
    import orbax.checkpoint as ocp

    last = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((workdir / "checkpoints" / str(last) / "state").absolute())
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): jax.device_get(x).tobytes() for path, x in leaves} | {"": str(last).encode()}


def same(workdir: Path, alone: Path) -> None:
    """Raises AssertionError where two runs differ."""
    assert trace(workdir) == trace(alone), f"tokens or rewards of {workdir} differ"
    one, two = final_arrays(workdir), final_arrays(alone)
    assert one.keys() == two.keys()
    different = [name for name in one if one[name] != two[name]]
    assert not different, f"{workdir} differs in {different[:5]}"
    for name in ("model.safetensors", "config.json"):
        assert (workdir / "hf" / name).read_bytes() == (alone / "hf" / name).read_bytes(), f"{workdir}: hf/{name}"
    assert not (workdir / "corrupt").exists(), f"{workdir}: a checkpoint was found corrupt"


def torture(kills: int, seed: int, base: Path, note=print) -> collections.Counter:
    """Ends runs until `kills` kills have hit; returns how often by phase and signal."""
    rng = random.Random(seed)
    cache, alone = base / "cache", base / "alone"
    status, _, _ = launch(alone, cache, None)
    assert status == 0
    hits: collections.Counter = collections.Counter()
    number = finished = 0
    workdir = base / "run_0"
    while sum(hits.values()) < kills:
        kill = draw(rng)
        fresh = kill.phase == "compile"  # without the cache there is something to compile
        status, lines, killed = launch(workdir, None if fresh else cache, kill)
        note(f"{workdir.name}: {kill}: {'hit' if killed else 'missed'}, status {status}, {lines[-1]}")
        if killed:
            hits[kill.phase, kill.how] += 1
        if lines[-1] == "done":
            same(workdir, alone)
            shutil.rmtree(workdir)
            finished, number = finished + 1, number + 1
            workdir = base / f"run_{number}"
    status, lines, _ = launch(workdir, cache, None)
    assert status == 0, lines
    same(workdir, alone)
    note(f"{sum(hits.values())} kills, {finished + 1} runs brought to their end, all equal to the one left alone")
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        hits = torture(args.kills, args.seed, Path(base), lambda text: print(text, flush=True))
    for (phase, how), count in sorted(hits.items()):
        print(f"{phase:<12}{how:<15}{count}")


if __name__ == "__main__":
    main()
