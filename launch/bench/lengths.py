"""What continuous batching gains where responses differ in length: an engine that refills its slots, and one that waits
for the longest response of a batch.

Called by `main.py --suite=lengths`: `--prompts` slots of `--responses` rows, of the model of suite `model`. Each row
ends at a length of its own: lognormal, half below 200 tokens and one in twenty above 1,000, at most `--tokens`. The
gain that the lengths alone allow is the ratio of the two ways' numbers of steps; a step's cost differs too."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from launch.bench.model import Model
from launch.bench.shapes import STOP, shape_of
from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias

BATCHES = 4
MEDIAN, HIGH = 200, 1000  # tokens: half are below the one, 95% below the other


def draw_lengths(questions: int, rows: int, most: int, seed: int) -> np.ndarray:
    """Lengths of responses, int [questions, rows], 4 to `most`."""
    spread = np.log(HIGH / MEDIAN) / statistics.NormalDist().inv_cdf(0.95)
    drawn = np.exp(np.log(MEDIAN) + spread * np.random.default_rng(seed).normal(size=(questions, rows)))
    return np.clip(np.round(drawn), 4, most).astype(int)


def steps_of(length_QxG: np.ndarray, slots: int) -> tuple[int, int]:
    """Steps that all responses take: batch by batch, and with slots that are refilled in the questions' order."""
    longest_Q = length_QxG.max(1)
    waiting = sum(int(longest_Q[i : i + slots].max()) for i in range(0, len(longest_Q), slots))
    busy = [0] * slots
    for length in longest_Q.tolist():
        busy[busy.index(min(busy))] += length
    return waiting, max(busy)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turn, `--rounds` times, on the same questions and lengths."""
    small, slots, rows = args.small, args.prompts, args.responses
    shape = shape_of("model", small, "float32")
    most = shape.new_tokens if small else args.tokens
    model = Model(shape, None)
    length_QxG = draw_lengths(BATCHES * slots, rows, most, args.seed)
    vision, prompts = model.inputs(1, shape.prompt)
    (I, S, C), M, P = vision.patches_IxSxC.shape, vision.gather_IxM.shape[1], prompts.ids_QxP.shape[1]
    vocab = shape.config.text.vocab_size
    engine = Engine(
        model.model,
        model.params,
        SampleOptions(rows, most, 1.0, 1.0, (STOP,)),
        Buckets((I,), (S,), (M,), (P,), (P + most,), patch_values=C),
        slots,
        suppression_bias(vocab, vocab, model.never),
    )
    warm_up = engine.warm_up()
    # Of another image each, since an engine computes equal ones once.
    images = [
        vision.replace(patches_IxSxC=np.asarray(vision.patches_IxSxC) * (1 + q / 100)) for q in range(len(length_QxG))
    ]
    requests = [
        Request(image, prompts, np.arange(rows) + q * rows, temperature=1.0, max_new_tokens=length_QxG[q])
        for q, image in enumerate(images)
    ]

    def tokens(asked: list[Request]) -> int:
        return sum(int(rollout.length_B.sum()) for _, _, rollout in engine.run(asked))

    seconds: dict[str, list[float]] = {"waiting": [], "refilled": []}
    for _ in range(args.rounds):
        begin = time.perf_counter()
        count = sum(tokens(requests[i : i + slots]) for i in range(0, len(requests), slots))
        seconds["waiting"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        assert count == tokens(requests) == length_QxG.sum()
        seconds["refilled"].append(time.perf_counter() - begin)
    waiting, refilled = steps_of(length_QxG, slots)
    return {
        "at_once": slots * rows,
        "tokens": int(length_QxG.sum()),
        "longest": most,
        "steps": {"waiting": waiting, "refilled": refilled},
        "seconds": seconds,
        "predicted": waiting / refilled,
        "gain": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "warm_up_s": warm_up,
        "state_bytes": engine.state_bytes,
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    yield f"{result['at_once']} rows, {result['tokens']:,} tokens, at most {result['longest']} a response"
    for name, times in result["seconds"].items():
        second = statistics.median(times)
        yield f"{name:<12}{result['steps'][name]:>8} steps{second:>10.1f} s{result['tokens'] / second:>10.0f} tokens/s"
    yield f"gain {result['gain']:.2f}; by the lengths alone {result['predicted']:.2f}"
    yield f"warm-up {result['warm_up_s']:.1f} s; state {result['state_bytes'] / 1e9:.2f} GB"
