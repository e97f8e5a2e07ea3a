"""Seconds a BRPO step, where they go, what they could be at least, and how TRL does on the same work.

    python launch/bench/main.py --suite=cpu
    python launch/bench/main.py --suite=cpu --peer_python=PATH  (an environment with the extra `bench`: torch, trl, ...)
    python launch/bench/main.py --suite=reattention             (what looking again costs; see reattention.py)
    python launch/bench/main.py --suite=model                   (beside transformers: see model.py)
    python launch/bench/main.py --suite=gpu                     (the same at 7B on a GPU; with --small on anything)
    python launch/bench/main.py --suite=lengths                 (continuous batching: see lengths.py)
    python launch/bench/main.py --suite=serving                 (what HTTP costs, and transformers; see serving.py)
    python launch/bench/main.py --suite=resume                  (checkpoints, rewards, preflight; see resume.py)

Suite cpu: one step is 8 questions with a 112x112 image each, 8 responses of exactly 64 tokens to each question,
rewards, the reference model's log-probabilities, loss, gradient and AdamW, in float32. It is the training loop's own
step (`BrpoStage`); stop tokens are forbidden so that every response has its full length. What is printed:

1. Seconds a step and of its phases beside the floor: the phase's matrix products, counted from the configuration
   (`qwenla_jax.planner.flops`), at the matrix peak that large float32 products reach in this run.
2. With --peer_python, TRL's step (`trl_peer.py`) on the same checkpoint, images and questions, in turn with ours:
   a round of ours, a round of TRL's, and so on; the two never run at the same time. TRL is measured at its best:
   a round in which its threads did not get the processor (CPU seconds below 0.8 of threads x seconds) is rejected and
   tried again. Ours computes real rewards (TRL's are random numbers), and reads and cuts a step's images within the
   step as TRL does; TRL may sample any token but the stop tokens, ours no vision token either.
3. Compilations while the same step runs over images of many sizes: each shape of batch may compile when it first
   comes, and never again. Any compilation after that ends the program with status 1.

The table goes to stdout, progress to stderr; with --json one line of JSON goes to stdout and the table to stderr.
Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenla_jax.utils.libtpu import skip_without_tpu

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the suites import each other as launch.bench.NAME

if TYPE_CHECKING:
    from launch.bench.ours import Ours

ROOT = Path(__file__).resolve().parents[2]
LEAST_CPU_SHARE = 0.8
SMALL_SUITES = ("model", "gpu", "lengths", "serving")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line (`None`: that of the process). Bad values end the process with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = ("cpu", "model", "gpu", "lengths", "reattention", "resume", "serving")
    parser.add_argument("--suite", choices=suites, required=True, help="what to measure")
    parser.add_argument("--small", action="store_true", help="suites model, gpu, lengths, serving: a tiny model")
    parser.add_argument(
        "--checkpoint",
        default=str(ROOT / "qwenla_jax" / "assets" / "tiny"),
        help="Hugging Face folder of a Qwen2.5-VL with a tokenizer, or random:tiny (default: the embedded one)",
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed, in every round (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those, not counted (default: 2)")
    parser.add_argument("--prompts", type=int, default=8, help="questions of a step, or slots (default: 8)")
    parser.add_argument("--responses", type=int, default=8, help="responses to a question (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response (default: 64)")
    parser.add_argument(
        "--peer_python", type=Path, help="interpreter with torch, and trl 1.16 for suite cpu; none: no peer"
    )
    parser.add_argument("--rounds", type=int, default=3, help="with a peer, or of each way to look (default: 3)")
    parser.add_argument("--mixed_steps", type=int, default=40, help="steps over mixed images; 0: none (default: 40)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of a large state, in suite resume; 0: none")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at once, in suite serving")
    parser.add_argument("--minutes", type=float, default=10.0, help="no work begins after, in suite gpu (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON; the table goes to stderr")
    args = parser.parse_args(argv)
    for name, least in dict(steps=1, warmup=1, prompts=1, responses=2, tokens=2, rounds=1, mixed_steps=0).items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if min(args.clients) < 1:
        parser.error(f"--clients must be at least 1, got {min(args.clients)}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    if args.small and args.suite not in SMALL_SUITES:
        parser.error(f"--small: suite {args.suite} has no small form; {', '.join(SMALL_SUITES)} have")
    if args.peer_python is not None and not os.access(args.peer_python, os.X_OK):
        parser.error(f"--peer_python: {args.peer_python} is no interpreter that can be run")
    if args.checkpoint != "random:tiny" and not (Path(args.checkpoint) / "config.json").is_file():
        parser.error(f"--checkpoint: no config.json in {args.checkpoint}; random:tiny needs no checkpoint")
    return args


def run_peer(args: argparse.Namespace, checkpoint: Path, examples: Path, threads: int) -> dict[str, Any]:
    """One round of TRL in a process of its own.

    Raises:
      RuntimeError: it failed (the message ends with what it wrote last), or its responses are not of full length.
    """
    command = [str(args.peer_python), str(ROOT / "launch" / "bench" / "trl_peer.py"), "--beta=0.1"]
    command += [f"--checkpoint={checkpoint}", f"--examples={examples}", f"--threads={threads}"]
    command += [
        f"--{name}={getattr(args, name)}" for name in ("steps", "warmup", "prompts", "responses", "tokens", "seed")
    ]
    idle = time.process_time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if result["tokens_per_step"] != (want := args.prompts * args.responses * args.tokens):
        raise RuntimeError(f"TRL sampled {result['tokens_per_step']} tokens a step, want {want}")
    seconds, cpu = result["seconds_per_step"]["median"], result["cpu_seconds_per_step"]["median"]
    result["cpu_share"] = cpu / (result["threads"] * seconds)
    result["our_cpu_seconds_meanwhile"] = time.process_time() - idle
    return result


def take_turns(
    args: argparse.Namespace, ours: Ours, folder: Path, questions: Path, size: int, threads: int
) -> dict[str, Any]:
    """Rounds of ours and TRL's in turn, on the same checkpoint, images and questions."""
    from launch.bench.ours import note

    checkpoint = ours.export(folder / "checkpoint") if args.checkpoint == "random:tiny" else Path(args.checkpoint)
    # Exactly what our source serves: it keeps a part of the file for evaluation.
    insert_rows = [ours.source[index] for index in range(size)]
    lines = [json.dumps({"image": f"{record.id}.png", "question": record.question}) + "\n" for record in insert_rows]
    examples = questions.with_name("examples.jsonl")
    examples.write_text("".join(lines), encoding="utf-8")
    rounds: list[dict[str, Any]] = []
    rejected: list[float] = []
    while len(rounds) < args.rounds:
        own = ours.measure(args.steps, 1)
        note(f"round {len(rounds) + 1} of {args.rounds}: TRL")
        peer = run_peer(args, checkpoint, examples, threads)
        if peer["cpu_share"] < LEAST_CPU_SHARE:
            note(f"rejected: TRL's threads had {peer['cpu_share']:.0%} of the processor, want {LEAST_CPU_SHARE:.0%}")
            rejected.append(peer["cpu_share"])
            if len(rejected) > 2 * args.rounds:
                break
            continue
        seconds = statistics.median(row["step"] for row in own)
        ratio = seconds / peer["seconds_per_step"]["median"]
        late = sum(row["compilations"] for row in own)
        rounds.append({"ours": seconds, "ours_compilations": late, "peer": peer, "ratio": ratio})
    result: dict[str, Any] = {"rounds": rounds, "rejected_cpu_shares": rejected}
    if rounds:
        result["ours_seconds"] = statistics.median(r["ours"] for r in rounds)
        result["peer_seconds"] = statistics.median(r["peer"]["seconds_per_step"]["median"] for r in rounds)
        result["ratio"] = statistics.median(r["ratio"] for r in rounds)
        names = rounds[0]["peer"]["parts"]
        result["peer_parts"] = {name: statistics.median(r["peer"]["parts"][name] for r in rounds) for name in names}
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    where, peak, ours = result["machine"], result["peaks"], result["ours"]
    yield f"{where['cpu']}, {where['cores']} cores, load average {where['load_average_1min']} before the start"
    yield ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    yield result["work"]
    yield (
        f"matrix peak {peak['matrix_gflops']:.1f} GFLOP/s (float32), memory {peak['memory_gb_s']:.1f} GB/s, "
        f"our CPU share {ours['cpu_share']:.0%} of all cores, {ours['compilations']} compilations in the measured steps"
    )
    yield ""
    yield "seconds a step          median      min      max    GFLOP   floor s  floor/median       MB  bytes s"
    for name, row in ours["phases"].items():
        text = f"  {name:<20}" + "".join(f"{row['seconds'][key]:9.4f}" for key in ("median", "min", "max"))
        if "gflop" in row:
            text += f"{row['gflop']:9.2f}{row['floor_seconds']:10.4f}{row['floor_share']:14.1%}"
            text += f"{row['megabytes']:9.0f}{row['bytes_floor_seconds']:9.4f}"
        yield text
    yield "the floor's parts"
    for phase, parts in ours["floor_parts"].items():
        for part, row in parts.items():
            yield f"  {phase + ': ' + part:<47}{row['gflop']:9.2f}{row['floor_seconds']:10.4f}{row['megabytes']:23.0f}"
    if peer := result.get("peer"):
        yield ""
        yield "in turn with TRL    ours s/step   TRL s/step    ours/TRL   TRL's CPU share   ours meanwhile, CPU s"
        for number, row in enumerate(peer["rounds"], 1):
            theirs, seconds = row["peer"], row["peer"]["seconds_per_step"]["median"]
            yield (
                f"  round {number:<10}{row['ours']:13.4f}{seconds:13.4f}{row['ratio']:12.3f}"
                f"{theirs['cpu_share']:18.0%}{theirs['our_cpu_seconds_meanwhile']:24.2f}"
            )
        if peer["rounds"]:
            yield f"  {'median':<16}{peer['ours_seconds']:13.4f}{peer['peer_seconds']:13.4f}{peer['ratio']:12.3f}"
            yield "  TRL's parts, s: " + ", ".join(f"{name} {s:.4f}" for name, s in peer["peer_parts"].items())
            last = peer["rounds"][-1]["peer"]
            facts = {name: last.get(name) for name in ("prompt_tokens", "patches", "visual_tokens_a_prompt", "threads")}
            yield "  TRL's work: " + ", ".join(f"{name} {value}" for name, value in facts.items())
            yield "  " + ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        shares = ", ".join(f"{share:.0%}" for share in peer["rejected_cpu_shares"]) or "none"
        yield f"  rounds rejected because TRL's threads lacked the processor (CPU shares): {shares}"
    if mixed := result.get("mixed_sizes"):
        yield ""
        yield (
            f"compilations over mixed image sizes: {mixed['warmup_compilations']} in warm-up "
            f"({mixed['warmup_steps']} shapes of batch, a step each), {mixed['compilations_after_warmup']} in the "
            f"{mixed['steps_after_warmup']} steps after it ({mixed['image_sizes_after_warmup']} image sizes, "
            f"{mixed['of_them_not_in_warmup']} of them not seen in warm-up)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit status: 1 where something compiled after warm-up."""
    args = parse_arguments(argv)
    skip_without_tpu()
    if args.suite == "gpu":  # the peer's model lies on the same device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax  # and the rest after the check: a wrong flag is refused at once

    from launch.bench.machine import machine

    if args.suite != "gpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu" and not args.small:
        print(f"bench: --suite=gpu needs a GPU, JAX has {jax.devices()[0].platform}; or --small", file=sys.stderr)
        return 2
    suite = sys.modules[__name__]
    if args.suite != "cpu":
        suite = importlib.import_module(f"launch.bench.{'model' if args.suite == 'gpu' else args.suite}")
    result = {"suite": args.suite, "machine": machine()} | suite.measure(args)
    print("\n".join(suite.table(result)), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(result), flush=True)
    if args.suite == "cpu":
        late = result["ours"]["compilations"] + result.get("mixed_sizes", {}).get("compilations_after_warmup", 0)
        return 1 if late + sum(turn["ours_compilations"] for turn in result.get("peer", {}).get("rounds", ())) else 0
    modes = result.get("reattention", result).get("modes", {})
    return 1 if any(row.get("compilations") for row in [*modes.values(), *result.get("rows", {}).values()]) else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that suite cpu has."""
    import jax

    from launch.bench.machine import cores, peaks
    from launch.bench.ours import Ours, describe, mixed_sizes, note, write_scenes

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = args.prompts * (args.warmup + args.steps)
        questions = write_scenes(folder / "scenes", size + size // 4 + 16, args.seed)
        before = peaks()
        ours = Ours(args, questions, size)
        note("warm-up and measured steps of ours")
        rows = ours.measure(args.steps, args.warmup)
        peak = {name: max(value, before[name]) for name, value in peaks().items()}
        lengths = [int(n) for row in rows for n in row["prompts"].length_Q]
        params = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
        result["work"] = (
            f"a step: {args.prompts} prompts of {min(lengths)} to {max(lengths)} tokens with an image each, "
            f"{args.responses} responses of {args.tokens} tokens, reference model, {params / 1e6:.2f}M parameters, "
            f"float32; {args.steps} steps"
        )
        result |= {"peaks": peak, "ours": describe(rows, ours.work(rows), peak)}
        if args.peer_python is not None:
            result["peer"] = take_turns(args, ours, folder, questions, size, cores())
        if args.mixed_steps:
            result["mixed_sizes"] = mixed_sizes(args, folder / "mixed")
    return result


if __name__ == "__main__":
    sys.exit(main())
