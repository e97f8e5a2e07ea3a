"""What a run that can be left alone costs: checkpoints, their checksums, rewards in processes, preflight.

    python launch/bench/main.py --suite=resume [--gigabytes=1]

The state of the embedded default's BRPO run, and one of that many gigabytes, is saved with checksums, checked and
restored; the checkpoint's own thread works while a step would continue, so what the step waits for is told apart.
Memory is the growth of the process's resident set's peak. The rewards of 64 responses are computed in this process and
in the pool.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch.bench.ours import note
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import score
from qwenla_jax.run import checksums
from qwenla_jax.run.checkpoints import Checkpoints
from qwenla_jax.text.response_format import parse
from qwenla_jax.tools.preflight import examine
from qwenla_jax.train.brpo.score import reward_pool, reward_settings
from qwenla_jax.train.loop import first_state, state_plan
from qwenla_jax.train.train_runtime import build


def peak_memory() -> float:
    """The largest resident set so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def checkpoint_cost(state: Any, options: RunOptions, repeats: int) -> dict[str, float]:
    """Medians over `repeats`, in seconds, but for `gigabytes` and `peak_gb`."""
    rows: dict[str, list[float]] = {name: [] for name in ("blocking", "until_done", "checksums", "check", "restore")}
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        for step in range(1, repeats + 1):
            with Checkpoints(workdir, options) as checkpoints:
                begin = time.perf_counter()
                checkpoints.save(step, state)
                rows["blocking"].append(time.perf_counter() - begin)
                checkpoints.wait()
                rows["until_done"].append(time.perf_counter() - begin)
            place = workdir / "checkpoints" / str(step)
            rows["checksums"].append(timed(lambda place=place: checksums.digest(place))[0])
            with Checkpoints(workdir, options) as checkpoints:
                rows["check"].append(timed(checkpoints.latest_step)[0])
                seconds, again = timed(lambda c=checkpoints: jax.block_until_ready(c.restore(state)))
                rows["restore"].append(seconds)
                del again
    result = {name: sorted(values)[len(values) // 2] for name, values in rows.items()}
    return result | {"gigabytes": size, "peak_gb": peak_memory() - before}


def reward_cost(options: RunOptions, repeats: int) -> dict[str, float]:
    """Milliseconds for the rewards of 64 responses, in this process and in the pool, and to start the pool."""
    source = SceneSource(0, "train", 64)
    records = []
    for index in range(64):
        asked = source[index]
        text = asked.response or ""
        lengths = tuple(len(section.text.split()) for section in parse(text).reflections)
        records.append(RewardRecord(asked.id, asked.question, asked.answer, asked.kind, text, lengths, 40, True))
    settings = reward_settings(options)
    own = min(timed(lambda: [score(record, settings) for record in records])[0] for _ in range(repeats))
    begin, pool = timed(lambda: reward_pool(options))
    with pool:
        pooled = min(timed(lambda: pool.score(records))[0] for _ in range(repeats))
    return {"in_process_ms": 1e3 * own, "pool_ms": 1e3 * pooled, "start_ms": 1e3 * begin}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that this suite tells."""
    options = RunOptions(init_from=args.checkpoint, seed=args.seed)
    runtime, params = build(options)
    optimizer, shardings = state_plan(runtime, params)
    state = first_state(params, optimizer, shardings, keep=True)
    note("checkpoints of the embedded default")
    result: dict[str, Any] = {"own": checkpoint_cost(state, options, 5)}
    if args.gigabytes:
        note(f"checkpoints of {args.gigabytes} GB")
        each = int(args.gigabytes * 1e9 / 4 / 8)
        keys = jax.random.split(jax.random.key(0), 8)
        large = {str(i): jax.random.normal(key, (each // 1024, 1024), jnp.float32) for i, key in enumerate(keys)}
        result["large"] = checkpoint_cost(large, options, 3)
        del large
    note("rewards")
    result["rewards"] = reward_cost(options, 20)
    note("preflight")
    before = peak_memory()
    seconds, checks = timed(lambda: examine(options))
    failed = sum(not c.ok for c in checks)
    result["preflight"] = {"seconds": seconds, "failed": failed, "peak_gb": peak_memory() - before}
    return result


def table(result: dict[str, Any]) -> list[str]:
    """The figures as text."""
    lines = [f"machine: {result['machine']}"]
    for name in ("own", "large"):
        if name in result:
            row = result[name]
            lines.append(
                f"state of {row['gigabytes']:.3f} GB: the step waits {row['blocking']:.3f} s for a save; written and "
                f"done after {row['until_done']:.3f} s, of which checksums {row['checksums']:.3f} s; on the way "
                f"back checked in {row['check']:.3f} s, restored in {row['restore']:.3f} s; peak memory "
                f"+{row['peak_gb']:.3f} GB"
            )
    row = result["rewards"]
    lines.append(
        f"rewards of 64 responses: {row['in_process_ms']:.1f} ms in this process, {row['pool_ms']:.1f} ms in the pool, "
        f"which starts in {row['start_ms']:.0f} ms"
    )
    row = result["preflight"]
    lines.append(
        f"preflight: {row['seconds']:.1f} s, {row['failed']} checks failed, peak memory +{row['peak_gb']:.3f} GB"
    )
    return lines
