"""What looking again costs while sampling: tokens a second with COPY and ROUTE beside text-only reflection.

Called by `main.py --suite=reattention`. Every mode samples the same prompts to responses of the same length, in turn,
round by round. The tag's logit is raised so that nearly every response reflects; the cap is one insertion; rows reach
it at different tokens, because their captions differ in length. Stop tokens are forbidden."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwenla_jax.config.run_options import BrpoOptions, DataOptions, EvalOptions, RunOptions
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.config import TextConfig
from qwenla_jax.planner.flops import decoder_forward, head
from qwenla_jax.train.train_runtime import build, make_run_source
from qwenla_jax.utils.compile_counter import CompileCounter

TAG_BIAS = 4.0
# The decoder of Qwen2.5-VL-7B, for the arithmetic alone: an image of 334 visual tokens (262,144 pixels, the paper's
# most in stage 4), 64 further tokens of prompt, a response of 1,024 tokens that looks again halfway.
DECODER_7B = TextConfig(152_064, 3584, 18_944, 28, 28, 4, 128, 1e-6, 1e6, (16, 24, 24), tie_word_embeddings=False)
MODES: tuple[tuple[str, ReattentionOptions], ...] = (
    ("text only", ReattentionOptions(mode="none")),
    ("copy, 1 row at once", ReattentionOptions(mode="copy", max_insertions=1, rows_at_once=1)),
    ("copy, 8 rows at once", ReattentionOptions(mode="copy", max_insertions=1, rows_at_once=8)),
    ("copy, 16 rows at once", ReattentionOptions(mode="copy", max_insertions=1, rows_at_once=16)),
    ("copy, all rows at once", ReattentionOptions(mode="copy", max_insertions=1, rows_at_once=1 << 16)),
    ("route 50%, compact, 8 rows", ReattentionOptions(mode="route", keep_ratio=0.5, max_insertions=1, rows_at_once=8)),
    (
        "route 50%, bias, 8 rows",
        ReattentionOptions(mode="route", keep_ratio=0.5, form="bias", max_insertions=1, rows_at_once=8),
    ),
)
SMALL_MODES = (MODES[0], MODES[2], MODES[5])  # each kind once


def insertion_work(config: TextConfig, prompt: float, before: float, rest: float, slots: float) -> dict[str, float]:
    """FLOPs and bytes that one insertion adds to one response, by arithmetic.

    Args:
      config: the decoder.
      prompt, before, rest: tokens of the prompt, of the response up to the tag, and behind it.
      slots: inserted tokens.

    Returns:
      `flops`: of the block's own tokens and of the attention that later tokens pay to it; `share`: over the FLOPs of a
      text-only response; `cache_bytes`: keys and values that it adds, in float32.
    """
    own = decoder_forward(config, slots, slots * (prompt + before) + slots * (slots + 1) / 2, prompt + before + slots)
    later = 4.0 * rest * slots * config.num_heads * config.head_dim * config.num_layers
    length = before + rest
    text = decoder_forward(config, length, length * prompt + length * (length + 1) / 2, prompt + length)
    text = text + head(config, length)
    kept = 2.0 * 4 * slots * config.num_kv_heads * config.head_dim * config.num_layers
    return {"flops": own.flops + later, "share": (own.flops + later) / text.flops, "cache_bytes": kept}


def _runtime(args: argparse.Namespace, reattention: ReattentionOptions, dtype: str, prompt: int) -> tuple[Runtime, Any]:
    options = RunOptions(
        init_from="tiny" if args.checkpoint.endswith("assets/tiny") else args.checkpoint,
        seed=args.seed,
        dtype=dtype,
        param_dtype=dtype,
        data=DataOptions(batch_size=args.prompts, max_response_tokens=args.tokens, max_prompt_tokens=prompt),
        brpo=BrpoOptions(group_size=args.responses),
        eval=EvalOptions(batch_size=args.prompts),
        reattention=reattention,
    )
    runtime, params = build(options)
    ids = runtime.tokenizer.ids
    logit_bias_V = runtime.logit_bias_V.copy()
    logit_bias_V[list(ids.stop())] = -1e30
    logit_bias_V[ids.reflection_open] += TAG_BIAS
    return dataclasses.replace(runtime, logit_bias_V=logit_bias_V), params


def measure(
    args: argparse.Namespace,
    dtype: str = "float32",
    modes: Sequence[tuple[str, ReattentionOptions]] = MODES,
    prompt: int = 0,
) -> dict[str, Any]:
    """Rounds of all modes in turn, the first of them text only; the model is kept and computed in `dtype`.

    `prompt`: tokens that a prompt may have, where that is more than the default.
    """
    prompt = max(prompt, DataOptions.max_prompt_tokens)
    rows = args.prompts * args.responses
    prepared = []
    for name, reattention in modes:
        runtime, own = _runtime(args, reattention, dtype, prompt)
        params = prepared[0][2] if prepared else own  # equal for all modes: a large model fits the device once
        del own
        sampler = Sampler(runtime, runtime.sample_options(args.responses, 1.0), args.prompts)
        source, to_example = make_run_source(runtime.options, "train"), runtime.example(with_response=False)
        batches = []
        for round_number in range(args.rounds + 1):
            examples = [to_example(source[round_number * args.prompts + i]) for i in range(args.prompts)]
            batches.append(runtime.collate_prompts(examples, runtime.buckets(args.prompts)))
        prepared.append((name, runtime, params, sampler, batches))
    numbers = np.arange(rows, dtype=np.uint32)
    result: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "inserted": [], "compilations": 0} for name, *_ in prepared
    }
    for round_number in range(args.rounds + 1):
        for name, _, params, sampler, batches in prepared:
            with CompileCounter() as counter:
                times = []
                for step in range(args.steps if round_number else 1):
                    begin = time.perf_counter()
                    rollout = sampler(params, *batches[round_number], step, numbers)
                    times.append(time.perf_counter() - begin)
                    assert (rollout.length_B == args.tokens).all()
            if round_number:  # round 0 compiles
                result[name]["seconds"].append(statistics.median(times))
                result[name]["inserted"].append(float(rollout.inserted_B.mean()))
                result[name]["compilations"] += counter.count
    text = result["text only"]["seconds"]
    for row in result.values():
        row["tokens_per_s"] = rows * args.tokens / statistics.median(row["seconds"])
        row["ratio"] = statistics.median(a / b for a, b in zip(row["seconds"], text, strict=True))
        row["inserted"] = statistics.mean(row["inserted"])
    _, runtime, _, _, batches = prepared[1]
    prompts = batches[0][1]
    block = float(np.mean(prompts.block.length_Q))
    visual = float(np.mean(np.asarray(prompts.block.tokens_QxN).sum(1)))
    config = runtime.model.config.text
    at = args.tokens / 2  # roughly where the tag comes
    prompt = float(np.mean(prompts.length_Q))
    work = {
        "copy": insertion_work(config, prompt, at, args.tokens - at, block),
        "route 50%": insertion_work(config, prompt, at, args.tokens - at, block - visual + np.ceil(visual / 2)),
    }
    work["7B, copy"] = insertion_work(DECODER_7B, 400, 512, 512, 336)
    work["7B, route 50%"] = insertion_work(DECODER_7B, 400, 512, 512, 169)
    return {"modes": result, "arithmetic": work, "block": block, "prompt": prompt}


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    yield f"prompts of {result['prompt']:.1f} tokens, images of {result['block']:.1f} slots with their delimiters"
    yield f"{'mode':<30}{'tokens/s':>10}{'time / text only':>18}{'insertions':>12}{'compilations':>14}"
    for name, row in result["modes"].items():
        numbers = f"{row['tokens_per_s']:>10.0f}{row['ratio']:>18.3f}{row['inserted']:>12.2f}{row['compilations']:>14}"
        yield f"{name:<30}{numbers}"
    yield "one insertion by arithmetic (decoder's products, attention, head)"
    for name, row in result["arithmetic"].items():
        yield (
            f"  {name:<28}{row['flops'] / 1e6:>8.2f} MFLOP, {row['share']:.1%} of a text-only response, "
            f"{row['cache_bytes'] / 1e3:.1f} kB of cache"
        )
