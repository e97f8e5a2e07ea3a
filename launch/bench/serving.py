"""What HTTP costs: tokens a second and time to first token of `qwenla serve`, beside its engine alone and transformers.

Called by `main.py --suite=serving`: the model of suite `model`, `--prompts` slots (the server's --max-num-seqs), one
image a prompt, greedy answers of `--tokens` tokens. The output matrix is 0 for stop tokens, tags and whatever is not
ASCII, so that every side writes as many tokens and streams them as text. Every image is another one, since an engine
computes equal ones once.

1. The engine alone: the requests as arrays, in this process, as many at once as there are clients. "As they arrive":
   one, and the others after its first step, since no server gets all of them in the same instant, and a step costs
   about as much with one live slot as with all.
2. `qwenla serve` in a process of its own, over loopback. Its clients, in this process, each stream one answer after
   another, and share the processor with it. HTTP's share is 1 - (its tokens a second) / (the engine's, as they arrive),
   in the same round; images are decoded and cut within it. "Of CPU" is the same of the seconds of all cores, the
   clients' included, which other work on the machine changes less. It should write the engine's tokens.
3. With --peer_python, `transformers serve` with the same clients, and `generate` on one batch of as many prompts as
   clients, from arrays; its time to first token is the time of generating one. `transformers serve` needs fastapi,
   openai and, for this model's processor, torchvision; without them its rows give the reason.

All take turns, round by round, and wait while another is measured. Times to first token are from sending a request to
its first text, those in the queue included. Paper silent: the paper reports no such measurement."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import jax
import numpy as np
from PIL import Image

import qwenla_jax
from launch.bench.machine import cores
from launch.bench.model import ROOT, SMALL, Peer, checkpoint_of
from launch.bench.ours import note
from launch.bench.shapes import Shape, shape_of
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.inference.ask import check_checkpoint
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import head_matrix, init_params
from qwenla_jax.serve.chat_prompt import to_example
from qwenla_jax.serve.engine_loop import Question, build, to_question
from qwenla_jax.serve.protocol import parse_request
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.utils.compile_counter import CompileCounter
from qwenla_jax.weights.hf import save

LEAST = 2  # requests of a round, be there fewer clients
WORDS = "How many objects of the same color are there, and which of them is the largest?"
START_SECONDS = 300
OURS = {"return_token_ids": True, "stream_options": {"include_usage": True}}  # transformers refuses the first


class Answer(NamedTuple):
    """Seconds to the first text, tokens, and their ids where they are known."""

    first: float
    tokens: int
    ids: list[int]


class Run(NamedTuple):
    """Seconds, seconds of all cores, and the answers in the requests' order."""

    seconds: float
    cpu: float
    answers: list[Answer]


def make_checkpoint(shape: Shape, folder: Path) -> Path:
    """A random model that only ever writes printable ASCII, and never ends."""
    start = checkpoint_of(shape, folder)
    config, tok = ModelConfig.from_hf(start), Tokenizer.from_folder(start)
    processor = ProcessorSettings.from_json(start / "preprocessor_config.json")
    writes = [i for i in range(tok.vocab_size) if (text := tok.decode([i])).isascii() and text.isprintable()]
    special = {*tok.ids.suppressed(), *tok.ids.stop(), *tok.ids.tags.values()}
    keep_V = np.zeros(config.text.vocab_size, np.float32)
    keep_V[[i for i in writes if i not in special and not tok.decode([i]).startswith("<")]] = 1
    params = init_params(config, jax.random.key(0))
    params["decoder"]["lm_head"]["kernel"] *= keep_V
    return save(folder / "model", config, params, tokenizer=tok, processor=processor)


def make_body(shape: Shape, tokens: int, seed: Sequence[int]) -> dict[str, Any]:
    """A request with an image of its own, which no resizing changes."""
    rows, cols = shape.grid
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), np.uint8)
    side = 2 * shape.config.vision.patch_size
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((cols * side, rows * side), Image.Resampling.BICUBIC).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": WORDS}]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_completion_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }


class EngineAlone:
    """The server's engine in this process, compiled."""

    def __init__(self, folder: Path, options: ServeOptions) -> None:
        self.options, self.served = options, build(qwenla_jax.load(folder), options)
        self.served.engine.warm_up()

    def question(self, body: dict[str, Any]) -> Question:
        """A request as arrays."""
        chat = parse_request(json.dumps(body).encode(), self.options)
        parts = (self.served.tok, self.served.processor, self.served.layout, 1)
        return to_question(chat, to_example(chat.messages, *parts), self.served, random.Random(0))

    def cpu_seconds(self) -> float:
        """Of this process so far."""
        return time.process_time()

    def run(self, questions: Sequence[Question], clients: int, arriving: bool) -> tuple[float, list[Answer]]:
        """Seconds, and the answers in the questions' order; as many at once as there are clients, or as they arrive."""
        engine, left = self.served.engine, iter(range(len(questions)))
        numbers: dict[int, int] = {}
        sent, first = [0.0] * len(questions), [0.0] * len(questions)
        ids: list[list[int]] = [[] for _ in questions]

        def submit() -> None:
            if (number := next(left, None)) is not None:
                sent[number] = time.perf_counter()
                numbers[engine.submit(questions[number].requests[0])] = number

        start, here = time.perf_counter(), 1 if arriving else clients
        for _ in range(here):
            submit()
        while engine.busy:
            updates = engine.step()
            for _ in range(clients - here):
                submit()
            here = clients
            for update in updates:
                number = numbers[update.ticket]
                if update.ids[0] and not ids[number]:
                    first[number] = time.perf_counter() - sent[number]
                ids[number] += update.ids[0]
                if update.rollout is not None:
                    submit()
        seconds = time.perf_counter() - start
        return seconds, [Answer(f, len(i), i) for f, i in zip(first, ids, strict=True)]


class HttpServer:
    """A server in a process of its own, and clients of it in this one.

    Raises:
      RuntimeError: it ended before it was ready; the message is the last line of its log.
    """

    def __init__(self, command: Sequence[str], log: Path, extra: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._extra, self._url = extra, f"http://127.0.0.1:{port}"
        env = {name: value for name, value in os.environ.items() if name != "QWENLA_API_KEY"}
        env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        env["OMP_NUM_THREADS"] = str(cores())
        with log.open("w") as output:
            self._process = subprocess.Popen([*command, f"--port={port}"], env=env, stdout=output, stderr=output)
        end = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise RuntimeError((log.read_text().strip() or "it wrote nothing").splitlines()[-1])
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            return httpx2.get(f"{self._url}/health").status_code == 200
        except httpx2.TransportError:
            return False

    def cpu_seconds(self) -> float:
        """Of the server and of this process, in which its clients are, so far; not a number where /proc has none."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.is_file():
            return math.nan
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") + time.process_time()

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def run(self, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[Answer]]:
        """Seconds, and the answers in the requests' order."""
        return asyncio.run(self._run([json.dumps(body | self._extra).encode() for body in bodies], clients))

    async def _run(self, bodies: Sequence[bytes], clients: int) -> tuple[float, list[Answer]]:
        answers: dict[int, Answer] = {}
        left = iter(range(len(bodies)))
        async with httpx2.AsyncClient(base_url=self._url, timeout=None, trust_env=False) as client:

            async def one() -> None:
                for number in left:
                    answers[number] = await self._ask(client, bodies[number])

            start = time.perf_counter()
            await asyncio.gather(*[one() for _ in range(clients)])
            return time.perf_counter() - start, [answers[number] for number in range(len(bodies))]

    async def _ask(self, client: httpx2.AsyncClient, body: bytes) -> Answer:
        first, tokens, ids = 0.0, 0, []
        start, headers = time.perf_counter(), {"Content-Type": "application/json"}
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            async for line in response.aiter_lines():
                if response.status_code != 200 or line.startswith('data: {"error"'):
                    raise RuntimeError(f"status {response.status_code}: {line[:1000]}")
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                for choice in event["choices"]:
                    if not first and any(choice["delta"].get(name) for name in ("content", "reasoning")):
                        first = time.perf_counter() - start
                    ids = choice.get("token_ids", ids)
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        return Answer(first, tokens, ids)


def write_inputs(example: Example, config: ModelConfig, folder: Path, never: Sequence[int]) -> Path:
    """What `launch/bench/transformers_peer.py` generates from: a prompt's tokens, and its patches in their order."""
    frame, m = example.frames[0], config.vision.spatial_merge_size
    h_N, w_N = frame.hw_Sx2[frame.valid_S].T
    order = (h_N // m * frame.cols + w_N // m) * m * m + h_N % m * m + w_N % m
    patches = np.empty((len(order), config.vision.patch_values), np.float32)
    patches[order] = frame.patches_SxC[frame.valid_S]
    content = {"pixel_values": patches, "never": np.array(never), "prompt_ids": example.ids_T.astype(np.int64)}
    content["image_grid_thw"] = np.array([[1, frame.rows * m, frame.cols * m]])
    content["prompt_types"] = (example.ids_T == config.image_token_id).astype(np.int32)
    np.savez(folder / "inputs.npz", **content)
    return folder / "inputs.npz"


def run_side(side: EngineAlone | HttpServer, work: Sequence[Any], clients: int, **options: bool) -> Run:
    """What a side does with requests."""
    cpu = side.cpu_seconds()
    seconds, answers = side.run(work, clients, **options)
    return Run(seconds, side.cpu_seconds() - cpu, answers)


def generate(peer: Peer, rows: int, tokens: int) -> Run:
    """`generate` on a batch, whose first tokens all come when one is generated."""
    first = statistics.median(peer.ask("generate", rows, 1)["seconds"])
    answer = peer.ask("generate", rows, tokens)
    seconds, cpu = (statistics.median(answer[name]) for name in ("seconds", "cpu_seconds"))
    return Run(seconds, cpu, [Answer(first, len(ids), ids) for ids in answer["ids"]])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, `--rounds` times."""
    if args.small:
        args = argparse.Namespace(**vars(args) | {name: min(most, getattr(args, name)) for name, most in SMALL.items()})
    shape, tokens = shape_of("model", args.small, "float32"), args.tokens
    servers: dict[str, HttpServer] = {}
    peer = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = make_checkpoint(shape, folder)
        loaded = qwenla_jax.load(checkpoint)
        tok, processor = check_checkpoint(loaded)
        first = make_body(shape, tokens, [args.seed])
        example = to_example(first["messages"], tok, processor, layout_of(loaded.config), 1)
        options = ServeOptions(
            model=str(checkpoint),
            served_model_name=("random",),
            max_model_len=max(64, len(example.ids_T) + tokens),
            limit_mm_per_prompt=1,
            mm_processor_kwargs=processor.max_pixels,
            max_num_seqs=args.prompts,
            reattention="none",
        )
        note("the engine alone compiles")
        alone = EngineAlone(checkpoint, options)
        result: dict[str, Any] = {"rows": {}, "missing": {}, "peer_versions": None}
        facts = {"prompt": len(example.ids_T), "visual": example.frames[0].num_visual_tokens, "tokens": tokens}
        result["work"] = facts | {"slots": args.prompts, "rounds": args.rounds}
        result["work"]["params"] = sum(x.size for x in jax.tree.leaves(loaded.params))
        try:
            note("qwenla serve starts")
            command = [sys.executable, "-m", "qwenla_jax", "serve", f"--model={checkpoint}", "--reattention=none"]
            command += [f"--max-model-len={options.max_model_len}", f"--max-num-seqs={args.prompts}"]
            command.append(f'--mm-processor-kwargs={{"max_pixels": {processor.max_pixels}}}')
            command.append('--limit-mm-per-prompt={"image": 1}')
            servers["qwenla serve"] = HttpServer(command, folder / "ours.log", OURS)
            if args.peer_python is not None:
                start = "from transformers.cli.transformers import main; main()"
                command = [str(args.peer_python), "-c", start, "serve", str(checkpoint), "--device=cpu"]
                try:
                    servers["transformers serve"] = HttpServer([*command, "--dtype=float32"], folder / "peer.log", {})
                except RuntimeError as error:
                    result["missing"]["transformers serve"] = str(error)
                never = np.flatnonzero(~np.asarray(head_matrix(loaded.params)).any(0)).tolist()
                inputs = write_inputs(example, loaded.config, folder, never)
                peer = Peer(args.peer_python, inputs, checkpoint, "float32", "cpu")
                result["peer_versions"] = peer.versions
            for server in servers.values():
                server.run([first], 1)
            for number in range(args.rounds):
                take_turn(args, shape, alone, servers, peer, number, result["rows"])
        finally:
            for server in servers.values():
                server.close()
            if peer is not None:
                peer.close()
    fill(result["rows"])
    return result


def take_turn(
    args: argparse.Namespace,
    shape: Shape,
    alone: EngineAlone,
    servers: dict[str, HttpServer],
    peer: Peer | None,
    number: int,
    rows: dict[str, Any],
) -> None:
    """One round of all sides, added to `rows`."""
    for clients in sorted({min(clients, 3) for clients in args.clients} if args.small else set(args.clients)):
        note(f"round {number + 1} of {args.rounds}: {clients} clients")
        seeds = [[args.seed, number, clients, i] for i in range(max(clients, LEAST))]
        bodies = [make_body(shape, args.tokens, seed) for seed in seeds]
        questions = [alone.question(body) for body in bodies]
        others = [alone.question(make_body(shape, args.tokens, [*seed, 1])) for seed in seeds]
        with CompileCounter() as counter:
            sides = {"engine alone": run_side(alone, questions, clients, arriving=False)}
            sides["as they arrive"] = run_side(alone, others, clients, arriving=True)
        want = [answer.ids for answer in sides["engine alone"].answers]
        sides |= {name: run_side(server, bodies, clients) for name, server in servers.items()}
        if peer is not None:
            sides["generate"] = generate(peer, clients, args.tokens)
        for name, (seconds, cpu, answers) in sides.items():
            if wrong := [answer.tokens for answer in answers if answer.tokens != args.tokens]:
                raise RuntimeError(f"{name}: {wrong[0]} tokens, want {args.tokens}")
            none: dict[str, Any] = {"rates": [], "cpu": [], "first": [], "same": [], "compilations": 0}
            row = rows.setdefault(f"{name}, {clients}", none)
            total = sum(answer.tokens for answer in answers)
            row["rates"].append(total / seconds)
            row["cpu"].append(cpu / total)
            row["first"] += [answer.first for answer in answers]
            note(f"{name}: {total / seconds:.1f} tokens/s, {cpu / total:.4f} CPU s a token, {answers[0].first:.3f} s")
            if name == "qwenla serve":
                row["same"] += [a.ids == ids for a, ids in zip(answers, want, strict=True)]
        rows[f"engine alone, {clients}"]["compilations"] += counter.count


def fill(rows: dict[str, Any]) -> None:
    """Adds medians, percentiles, and HTTP's share, the median over the rounds."""
    for name, row in rows.items():
        engine = rows[f"engine alone, {name.rpartition(', ')[2]}"]
        row["tokens_per_second"] = statistics.median(row["rates"])
        row["cpu_per_token"] = statistics.median(row["cpu"])
        row["first_p50"], row["first_p99"] = np.percentile(row["first"], (50, 99)).tolist()
        row["of_engine"] = statistics.median(a / b for a, b in zip(row["rates"], engine["rates"], strict=True))
        if name.startswith("qwenla serve"):
            alone = rows[f"as they arrive, {name.rpartition(', ')[2]}"]
            row["http_share"] = 1 - statistics.median(a / b for a, b in zip(row["rates"], alone["rates"], strict=True))
            row["http_cpu_share"] = 1 - statistics.median(a / b for a, b in zip(alone["cpu"], row["cpu"], strict=True))


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    where, work = result["machine"], result["work"]
    yield f"{where['cpu']}, {where['cores']} cores, load {where['load_average_1min']} before the start"
    yield ", ".join(
        f"{name} {version}" for name, version in (where["versions"] | (result["peer_versions"] or {})).items()
    )
    yield (
        f"{work['params'] / 1e6:.1f}M parameters, float32, prompts of {work['prompt']} tokens, {work['visual']} of "
        f"them visual, {work['tokens']} new tokens, {work['slots']} slots, {work['rounds']} rounds"
    )
    columns = (
        "tokens/s",
        "of engine",
        "HTTP's share",
        "CPU ms/token",
        "of CPU",
        "first, p50 s",
        "p99 s",
        "same answers",
    )
    yield f"{'side, clients':<24}" + "".join(f"{name:>14}" for name in columns)
    for name, row in result["rows"].items():
        cells = [f"{row['tokens_per_second']:.1f}", f"{row['of_engine']:.1%}"]
        shares = [f"{row[key]:.1%}" if key in row else "-" for key in ("http_share", "http_cpu_share")]
        cells += [shares[0], f"{row['cpu_per_token'] * 1000:.1f}", shares[1]]
        cells += [f"{row['first_p50']:.3f}", f"{row['first_p99']:.3f}"]
        cells.append(f"{sum(row['same'])}/{len(row['same'])}" if row["same"] else "-")
        yield f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells)
    for name, reason in result["missing"].items():
        yield f"{name}: {reason}"
