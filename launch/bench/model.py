"""One model beside transformers on the same shapes: training's forward and backward, prefill, and greedy decoding.

Called by `main.py`. Suite model: 120M parameters in float32 on the CPU. Suite gpu: first a tiny model in float32, whose
losses and greedy tokens must be the peer's; then Qwen2.5-VL-7B's shape in bfloat16 with random weights on one GPU:
prefill, decoding, training, whole BRPO steps, and COPY and ROUTE beside text-only. Each result goes to stderr when it
is there, and no work begins after `--minutes`. With `--small` both run their whole path on a tiny model, on whatever
device there is.

A row of the table is a kind of work. Its floor is the larger of its operations at the matrix peak (`train.flops`),
and of the bytes that cannot be avoided at the memory's rate, both measured in this run (the peak by XLA and by torch,
of which the larger counts); the share is the floor over the median. The peer (`transformers_peer.py`, with
--peer_python) is timed in turn with ours, round by round, and never at the same time. In float32 both have the same
weights: the losses must agree to 1e-4.

A turn is one piece of work that is not counted and then two that are. Where the system takes free memory away in the
other's turn, a first piece pays for getting it again (on a virtual machine up to a third of a training step), which
steps that follow each other never do. Beside the seconds stands the share of all cores that each side had: where it is
far below that of a quiet machine, somebody else was computing and the row says nothing.

Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench.machine import cores, machine, peaks
from launch.bench.ours import Ours, note, write_scenes
from launch.bench.shapes import RANK, STOP, Shape, floors, make_image, shape_of, tokens_of
from qwenla_jax.config.run_options import DataOptions, LoraOptions
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.model import lora
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import QwenVL, init_params, logits_of
from qwenla_jax.planner.published import published_processor
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.prefill import encode_prompts
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.sft.update import make_sft_gradient
from qwenla_jax.types import PromptBatch, TokenBatch, VisionBatch
from qwenla_jax.utils.compile_counter import CompileCounter
from qwenla_jax.weights.hf import load, save

ROOT = Path(__file__).resolve().parents[2]
AGREE = 1e-4  # nats a token, between our loss and the peer's
IN_A_ROW = 2  # counted pieces of work of a turn
NO_TIME = "no time left"
# BRPO steps of suite gpu: rank of the adapters (0: all parameters) and re-attention in the rollouts.
STEPS = {
    "BRPO step, LoRA": (RANK, ReattentionOptions()),
    "BRPO step, LoRA, COPY": (RANK, ReattentionOptions(mode="copy", max_insertions=1)),
    "BRPO step, LoRA, ROUTE": (RANK, ReattentionOptions(mode="route", keep_ratio=0.5, max_insertions=1)),
    "BRPO step, full": (0, ReattentionOptions()),
}
# What --small makes of the command line: the whole path, quickly.
SMALL = {"rounds": 1, "steps": 1, "warmup": 1, "prompts": 2, "responses": 2, "tokens": 8}


class Model:
    """Our side: each method makes a function of no arguments that works once and waits for the device."""

    def __init__(self, shape: Shape, folder: Path | None) -> None:
        self.shape, config = shape, shape.config
        if folder is None:
            self.params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
        else:
            self.params = load(folder, dtype=config.dtype).params
        self.model = QwenVL(config)
        self.image, self.patches = make_image(shape)
        self.ids = tokens_of(shape)
        self.never = (
            STOP, config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id
        )  # fmt: skip

    def inputs(self, rows: int, tokens: int) -> tuple[VisionBatch, PromptBatch]:
        """The first tokens of the sequence in every row, on the device."""
        ids, M = self.ids[:tokens], self.shape.grid[0] * self.shape.grid[1]
        pos, next_pos = visual_positions(ids, self.shape.config.image_token_id, -1, [self.shape.grid], 1)
        visual = np.full((rows, tokens), -1, np.int32)
        visual[:, ids == self.shape.config.image_token_id] = np.arange(rows * M).reshape(rows, M)
        vision = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), self.image)
        same = lambda x: np.repeat(np.asarray(x, np.int32)[None], rows, axis=0)  # noqa: E731
        return jax.device_put((vision, PromptBatch(same(ids), same(pos), visual, same(tokens), same(next_pos))))

    def train(self, rank: int = 0) -> Callable[[], float]:
        """Forward and backward; gives the mean loss."""
        shape, params = self.shape, self.params
        vision, p = self.inputs(shape.train_rows, len(self.ids))
        target_BxR = jnp.tile(jnp.arange(shape.prompt, len(self.ids)), (shape.train_rows, 1))
        loss_BxR = jnp.ones(target_BxR.shape, jnp.float32)
        tokens = TokenBatch(p.ids_QxP, p.pos_QxPx3, p.visual_QxP, p.length_Q, target_BxR, loss_BxR)
        batch = jax.tree.map(lambda x: x[None], (vision, tokens))
        logit_bias_V = jnp.zeros(shape.config.text.vocab_size, jnp.float32)
        if rank:
            kernels = lora.kernels_for(shape.config, LoraOptions().modules)
            key, dtype = jax.random.key(1), shape.config.dtype
            added = jax.jit(lambda k: lora.adapters(self.params, kernels, rank, 16, k, dtype))(key)
            params = lora.joined(params, added)
        gradient = jax.jit(make_sft_gradient(self.model))

        def work() -> float:
            _, metrics = jax.block_until_ready(gradient(params, *batch, logit_bias_V))
            return float(metrics["loss"])

        return work

    def prefill(self, rows: int) -> Callable[[], None]:
        """Images and prompts, to the logits behind them."""
        vision, prompts = self.inputs(rows, self.shape.prompt)

        @jax.jit
        def run(params: Any, vision: VisionBatch, prompts: PromptBatch) -> Any:
            hidden_QxD, prefix, _ = encode_prompts(self.model, params, vision, prompts)
            return logits_of(params, hidden_QxD), prefix

        return lambda: (jax.block_until_ready(run(self.params, vision, prompts)), None)[1]

    def generate(self, rows: int, tokens: int) -> Callable[[], list[list[int]]]:
        """Greedy tokens, exactly so many."""
        vision, prompts = self.inputs(rows, self.shape.prompt)
        vocab = self.shape.config.text.vocab_size
        (I, S, C), (_, M) = vision.patches_IxSxC.shape, vision.gather_IxM.shape
        P = prompts.ids_QxP.shape[1]
        sizes = Buckets((I,), (S,), (M,), (P,), (P + tokens,), patch_values=C)
        bias_V = suppression_bias(vocab, vocab, self.never)
        options = SampleOptions(1, tokens, 0.0, 1.0, (STOP,))
        engine = Engine(self.model, self.params, options, sizes, rows, bias_V, questions=rows)

        def work() -> list[list[int]]:
            request = Request(vision, prompts, np.arange(rows))
            responses = {question: rollout for _, question, rollout in engine.run([request])}
            return [responses[question].ids_BxR[0].tolist() for question in range(rows)]

        return work


def write_inputs(model: Model, folder: Path) -> Path:
    """What `launch/bench/transformers_peer.py` works on: the same image and tokens as ours, for one row."""
    shape, c = model.shape, model.shape.config
    content = {"pixel_values": model.patches, "never": np.array(model.never)}
    content["image_grid_thw"] = np.array([[1, *(n * c.vision.spatial_merge_size for n in shape.grid)]])
    content["labels"] = np.where(np.arange(len(model.ids)) < shape.prompt, -100, model.ids).astype(np.int64)
    for kind, ids in (("whole", model.ids), ("prompt", model.ids[: shape.prompt])):
        content |= {f"{kind}_ids": ids.astype(np.int64), f"{kind}_types": (ids == c.image_token_id).astype(np.int32)}
    np.savez(folder / "inputs.npz", **content)
    return folder / "inputs.npz"


class Peer:
    """transformers in a process of its own; see `launch/bench/transformers_peer.py`."""

    def __init__(self, python: Path, inputs: Path, folder: Path, dtype: str, device: str) -> None:
        command = [str(python), str(ROOT / "launch" / "bench" / "transformers_peer.py"), f"--config={folder}"]
        command += [f"--dtype={dtype}", f"--inputs={inputs}", f"--threads={cores()}", f"--device={device}"]
        command.append(f"--in_a_row={IN_A_ROW}")
        self._log = (folder / "peer.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self.versions = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        raise RuntimeError(
            f"launch/bench/transformers_peer.py ended with status {self._process.wait()}:\n{self._log.read()[-3000:]}"
        )

    def ask(self, *words: object) -> dict[str, Any]:
        """One piece of work; waits for it."""
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()
        self._log.close()


def in_turn(rounds: int, ours: Callable[[], Any], ask: Callable[[], Any] | None) -> dict[str, Any]:
    """Turns of ours and the peer's (see above). A work that does not fit the device reports it."""
    row: dict[str, Any] = {"seconds": [], "cpu_seconds": [], "compilations": 0}
    row |= {"peer_seconds": [], "peer_cpu_seconds": []}
    for _ in range(rounds):
        for piece in range(0 if "none" in row else IN_A_ROW + 1):
            try:
                with CompileCounter() as counter:
                    start, cpu = time.perf_counter(), time.process_time()
                    row["result"] = ours()
                    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row["none"] = "does not fit"
                break
            if piece:
                row["seconds"].append(seconds)
                row["cpu_seconds"].append(cpu)
                row["compilations"] += counter.count
        if ask is not None and "peer_none" not in row:
            row["peer"] = answer = ask()
            if "none" in answer:
                row["peer_none"] = answer["none"]
            else:
                row["peer_seconds"] += answer["seconds"]
                row["peer_cpu_seconds"] += answer["cpu_seconds"]
    return row


def compare(args: argparse.Namespace, shape: Shape, folder: Path, device: str, side: int) -> dict[str, Any]:
    """All rows of the table that have a peer, and the peer's rate in products of matrices of `side`."""
    exact = shape.config.dtype == "float32"
    folder = folder / "model"
    if exact:
        save(folder, shape.config, init_params(shape.config, jax.random.key(0)))
    else:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shape.config.to_hf()))
    model = Model(shape, folder if exact else None)
    peer = None
    if args.peer_python is not None:
        peer = Peer(args.peer_python, write_inputs(model, folder), folder, shape.config.dtype, device)
    rows: dict[str, dict[str, Any]] = {}
    B = shape.train_rows
    asking = lambda *words: None if peer is None else lambda: peer.ask(*words)  # noqa: E731
    works: list[tuple[str, Callable[[], Callable[[], Any]], Any]] = [
        ("train", model.train, asking("train", B)),
        ("train, LoRA", lambda: model.train(RANK), asking("lora", B, RANK)),
    ]
    for n in shape.decode_rows:
        works.append((f"prefill, batch {n}", lambda n=n: model.prefill(n), asking("prefill", n)))
        words = ("generate", n, shape.new_tokens)
        works.append((f"generate, batch {n}", lambda n=n: model.generate(n, shape.new_tokens), asking(*words)))
    if shape.config.dtype != "float32":  # what people wait for first
        works = works[2:] + works[:2]
    for name, make, ask in works:
        if no_time(args, name):
            rows[name] = {"seconds": [], "peer_seconds": [], "none": NO_TIME}
            continue
        rows[name] = row = in_turn(args.rounds, make(), ask)
        result, answer = row.pop("result", None), row.pop("peer", {})
        if exact and "loss" in answer and not abs(result - answer["loss"]) <= AGREE:  # nor where one is not a number
            raise RuntimeError(f"{name}: our loss is {result}, transformers' {answer['loss']}; want {AGREE} at most")
        if "loss" in answer:
            row |= {"loss": result, "peer_loss": answer["loss"]}
        if result is not None and "ids" in answer:
            row["equal_tokens"] = float(np.mean(np.array(result) == np.array(answer["ids"])))
        note(f"{name}: ours {row['seconds']} s, peer {row['peer_seconds']} s")
        jax.clear_caches()
    output: dict[str, Any] = {"rows": rows, "peer_versions": None, "peer_peak": None}
    if peer is not None:
        output |= {"peer_versions": peer.versions, "peer_peak": peer.ask("peak", side)["matrix_gflops"]}
        peer.close()
    return output


def no_time(args: argparse.Namespace, name: str) -> bool:
    """Whether the time of suite gpu is over; says which work begins, or is left out."""
    late = time.monotonic() > getattr(args, "deadline", float("inf"))
    note(f"{name}: {NO_TIME}" if late else name)
    return late


def parity(args: argparse.Namespace, folder: Path, device: str) -> dict[str, Any]:
    """A tiny model in float32 beside the peer's on the same device.

    Raises:
      RuntimeError: losses differ by more than `AGREE`, or greedy tokens differ.
    """
    small = argparse.Namespace(**vars(args) | SMALL)
    folder.mkdir()
    with jax.default_matmul_precision("highest"):
        rows = compare(small, shape_of("gpu", True, "float32"), folder, device, 64)["rows"]
    equal = [row["equal_tokens"] for row in rows.values() if "equal_tokens" in row]
    if equal and min(equal) < 1:
        raise RuntimeError(f"parity: only {min(equal):.1%} of greedy tokens are the peer's")
    note("parity: losses and greedy tokens are the peer's" if equal else "parity: no peer to compare with")
    return {name: row["loss"] - row["peer_loss"] for name, row in rows.items() if "loss" in row}


def fill(result: dict[str, Any], shape: Shape) -> None:
    """Adds medians, floors, shares and ratios to the rows."""
    peak = result["peaks"]
    rows = result["rows"]
    for row in rows.values():
        for side in ("", "peer_"):
            if times := row[f"{side}seconds"]:
                row[f"{side}seconds_median"] = statistics.median(times)
                shares = [cpu / t / cores() for cpu, t in zip(row[f"{side}cpu_seconds"], times, strict=True)]
                row[f"{side}cpu_share"] = statistics.median(shares)
    for n in shape.decode_rows:  # what is left of generation without its prefill
        whole, before = rows[f"generate, batch {n}"], rows[f"prefill, batch {n}"]
        row = rows[f"decode, batch {n}"] = {"tokens": n * (shape.new_tokens - 1)}
        for key in ("seconds_median", "peer_seconds_median"):
            rest = whole.get(key, 0.0) - before.get(key, 0.0)
            if rest > 0:  # not so where both are too short to be told apart
                row[key] = rest
        whole["tokens"] = n * shape.new_tokens
    for name, (flops, moved) in floors(shape).items():
        parts = flops / peak["matrix_gflops"] / 1e9, moved / peak["memory_gb_s"] / 1e9
        rows[name] |= {"flops_floor": parts[0], "bytes_floor": parts[1]}
        if "seconds_median" in rows[name]:
            rows[name]["share"] = max(parts) / rows[name]["seconds_median"]
    for row in rows.values():
        if "seconds_median" in row and "peer_seconds_median" in row:
            row["speed"] = row["peer_seconds_median"] / row["seconds_median"]


def brpo(
    args: argparse.Namespace, shape: Shape, folder: Path, rank: int, reattention: ReattentionOptions
) -> dict[str, Any]:
    """Seconds of a whole BRPO step of the training loop, with adapters or with all parameters."""
    checkpoint = checkpoint_of(shape, folder)
    own = argparse.Namespace(**vars(args) | {"checkpoint": f"random:{checkpoint}"})
    size = args.prompts * (args.warmup + args.steps)
    questions = folder / "scenes" / "questions.jsonl"
    if not questions.is_file():
        questions = write_scenes(questions.parent, size + size // 4 + 16, args.seed)
    dtype = shape.config.dtype
    run = {"dtype": dtype, "param_dtype": dtype, "lora": LoraOptions(rank=rank or None)}
    run |= {"reattention": reattention}
    try:
        data = {"max_prompt_tokens": max(shape.prompt, DataOptions.max_prompt_tokens)}
        rows = Ours(own, questions, size, run=run, **data).measure(args.steps, args.warmup)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"none": "does not fit"}
    times = {name: statistics.median(row[name] for row in rows) for name in ("step", "rollout", "update")}
    return times | {"insertions": statistics.mean(row["insertions"] for row in rows)}


def checkpoint_of(shape: Shape, folder: Path) -> Path:
    """A folder that a run can start from: the shape's config with the embedded tokenizer's ids, and no weights."""
    folder = folder / "start"
    tiny = ROOT / "qwenla_jax" / "assets" / "tiny"
    if not folder.is_dir():
        folder.mkdir()
        ids = ModelConfig.from_hf(tiny)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        vocab = max(shape.config.text.vocab_size, ids.text.vocab_size)
        text = dataclasses.replace(shape.config.text, vocab_size=vocab)
        config = dataclasses.replace(shape.config, text=text, **{name: getattr(ids, name) for name in names})
        (folder / "config.json").write_text(json.dumps(config.to_hf()))
        for path in tiny.iterdir():
            if path.name not in ("config.json", "preprocessor_config.json") and path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        pixels = np.prod(shape.grid) * (shape.config.vision.patch_size * 2) ** 2
        settings = dataclasses.replace(published_processor(), min_pixels=int(pixels * 0.9), max_pixels=int(pixels))
        (folder / "preprocessor_config.json").write_text(json.dumps(settings.to_dict()))
    return folder


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the suite has."""
    if args.small:
        args = argparse.Namespace(**vars(args) | {name: min(most, getattr(args, name)) for name, most in SMALL.items()})
    gpu = args.suite == "gpu"
    if gpu:
        args = argparse.Namespace(**vars(args) | {"deadline": time.monotonic() + 60 * args.minutes})
    on_gpu = jax.default_backend() == "gpu"
    shape = shape_of(args.suite, args.small, "bfloat16" if gpu and on_gpu else "float32")
    sides = (4096, 8192) if on_gpu else (1024, 2048)
    kind = {"dtype": shape.config.dtype, "matrix": sides} | ({"line": 2**28} if on_gpu else {})
    before = peaks(**kind)
    with tempfile.TemporaryDirectory() as temporary:
        folder, device = Path(temporary), "cuda" if on_gpu else "cpu"
        result = {"parity": parity(args, folder / "parity", device)} if gpu else {}
        result |= compare(args, shape, folder, device, sides[-1])
        result["peaks"] = {name: max(value, before[name]) for name, value in peaks(**kind).items()}
        # The machine can do what either of the two does.
        result["our_peak"] = result["peaks"]["matrix_gflops"]
        result["peaks"]["matrix_gflops"] = max(result["our_peak"], result["peer_peak"] or 0.0)
        fill(result, shape)
        result["shape"] = dataclasses.asdict(shape)
        if gpu:
            from launch.bench import reattention

            for name, (rank, reattention_options) in STEPS.items():
                gc.collect()  # what went before leaves its memory
                row = {"none": NO_TIME}
                if not no_time(args, name):
                    row = brpo(args, shape, folder, rank, reattention_options)
                    note(f"{name}: {row}")
                result.setdefault("steps", {})[name] = row
            if no_time(args, "COPY and ROUTE"):
                return result
            gc.collect()
            start = argparse.Namespace(**vars(args) | {"checkpoint": f"random:{folder / 'start'}"})
            modes = reattention.SMALL_MODES if args.small else reattention.MODES
            result["reattention"] = reattention.measure(start, shape.config.dtype, modes, shape.prompt)
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    where, peak, shape = machine(), result["peaks"], result["shape"]
    yield f"{where['cpu']}, {where['cores']} cores, {', '.join(where['devices'])}, load {os.getloadavg()[0]:.1f}"
    versions = where["versions"] | (result["peer_versions"] or {})
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    rates = f"matrix peak {peak['matrix_gflops']:.1f} GFLOP/s, memory {peak['memory_gb_s']:.1f} GB/s, in this run"
    peer = result["peer_peak"]
    yield rates + (f"; products by XLA {result['our_peak']:.1f}, by torch {peer:.1f}" if peer else "")
    yield (
        f"{shape['config']['dtype']}, prompt {shape['prompt']} with {np.prod(shape['grid'])} visual tokens, training "
        f"{shape['train_rows']} x {shape['prompt'] + shape['response']} tokens, {shape['new_tokens']} new tokens"
    )
    columns = ("FLOP floor", "byte floor", "ours s", "share", "CPU", "tokens/s", "peer s", "CPU", "peer/ours", "same")
    yield f"{'':<22}" + "".join(f"{name:>12}" for name in columns)
    for name, row in result["rows"].items():
        number = lambda key, spec, row=row: format(row[key], spec) if key in row else "-"  # noqa: E731
        rate = f"{row['tokens'] / row['seconds_median']:.1f}" if {"tokens", "seconds_median"} <= set(row) else "-"
        cells = (
            number("flops_floor", ".4f"), number("bytes_floor", ".4f"),
            row.get("none") or number("seconds_median", ".4f"), number("share", ".1%"), number("cpu_share", ".0%"),
            rate, row.get("peer_none") or number("peer_seconds_median", ".4f"), number("peer_cpu_share", ".0%"),
            number("speed", ".2f"), number("equal_tokens", ".1%"),
        )  # fmt: skip
        yield f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells)
    units = {"insertions": " a response"}
    for name, row in result.get("steps", {}).items():
        yield f"{name:<22}" + (
            row.get("none") or ", ".join(f"{part} {row[part]:.3f}{units.get(part, ' s')}" for part in row)
        )
    if again := result.get("reattention"):
        from launch.bench import reattention

        yield from reattention.table(again)
