"""Our side of `launch/bench/main.py`: the training loop's own BRPO step on given images, timed and counted.

Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from launch.bench.machine import cores
from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import BrpoOptions, DataOptions, OptimOptions, RewardOptions, RunOptions
from qwenla_jax.config.schema import to_dict
from qwenla_jax.data.batching.collate import collate_prompts
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.planner.flops import Work, brpo_step_work
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.brpo.reference import make_reference
from qwenla_jax.train.brpo.trainer import BrpoStage
from qwenla_jax.train.loop import first_state, state_plan
from qwenla_jax.train.train_runtime import build, make_run_source
from qwenla_jax.utils.compile_counter import CompileCounter
from qwenla_jax.weights.hf import save

TAG_BIAS = 12.0  # with re-attention: so likely that most responses reflect, whatever the vocabulary
PHASES = ("data", "rollout", "reward", "update")


def note(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def write_scenes(folder: Path, count: int, seed: int, mixed: bool = False) -> Path:
    """Writes rendered scenes as PNG and a JSONL of their questions; `mixed` gives each image another size and shape.

    The sides of mixed images lie between about 30 and 500 pixels and differ by up to a factor of 3.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    source = SceneSource(seed, "train")
    rows = []
    for index in range(count):
        record = source[index]
        image = record.images[0]
        if mixed:
            side, aspect = np.exp(rng.uniform(np.log(50), np.log(300))), np.exp(rng.uniform(-0.55, 0.55))
            image = image.resize((round(side * aspect), round(side / aspect)), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.png")
        rows.append({"id": str(index), "image": f"{index}.png", "question": record.question, "answer": record.answer})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Ours:
    """The training loop's BRPO step on the questions of a JSONL file, every response of full length."""

    def __init__(
        self, args: argparse.Namespace, source: Path, size: int, run: dict[str, Any] | None = None, **data: Any
    ) -> None:
        settings = {"size": size, "batch_size": args.prompts, "max_response_tokens": args.tokens} | data
        options = RunOptions(
            stage="brpo",
            preset="bench",
            remat="dots",  # as configs/brpo.py
            seed=args.seed,
            init_from=args.checkpoint,
            # No thread prepares data ahead: its work is in the step, and nothing runs while the peer does.
            data=DataOptions(source=str(source), threads=0, **settings),
            optim=OptimOptions(learning_rate=1e-5),
            brpo=BrpoOptions(group_size=args.responses, beta=0.1),
            rewards=RewardOptions(target_length=16.0),
            **(run or {}),
        )
        options = from_config_dict(to_dict(options))
        runtime, params = build(options)
        ids = runtime.tokenizer.ids
        never = (*ids.suppressed(), *ids.stop())
        vocab = runtime.model.config.text.vocab_size
        logit_bias_V = suppression_bias(vocab, runtime.tokenizer.vocab_size, never)
        if options.reattention.mode != "none":
            logit_bias_V[ids.reflection_open] += TAG_BIAS
        self.runtime = dataclasses.replace(runtime, logit_bias_V=logit_bias_V)
        self.source = make_run_source(options, "train")
        self._reference = make_reference(self.runtime, params)
        optimizer, shardings = state_plan(self.runtime, params)
        self.state = first_state(params, optimizer, shardings, keep=self._reference is params)
        self.stage = BrpoStage(self.runtime, optimizer, shardings, self.source, 0, self._reference)
        self.done = 0
        self._seen: set[Any] = set()
        self._batches = self.batches()

    def batches(self) -> Iterator[Any]:
        """The very batches that the steps take, a second time: (vision, prompts, records)."""
        for batch, records, _ in self.runtime.batches(self.runtime.usable(self.source, False), collate_prompts, 0):
            yield *jax.tree.map(lambda x: x[0], batch), records  # the only part: nothing is accumulated

    def export(self, folder: Path) -> Path:
        """Writes what the steps started from in Hugging Face format."""
        r = self.runtime
        return save(folder, r.model, self._reference, tokenizer=r.tokenizer, processor=r.processor)

    def step(self) -> dict[str, Any]:
        """One step: seconds of the whole (`step`), of its phases and of all cores together (`cpu`), compilations, what
        it worked on, and whether a batch of this shape came for the first time (`new_shape`).

        Raises:
          RuntimeError: a response is shorter than it should be.
        """
        vision, prompts, records = next(self._batches)
        with CompileCounter() as counter:
            start, cpu = time.perf_counter(), time.process_time()
            self.state, metrics = self.stage.step(self.state, self.done, lambda doing: None)
            jax.block_until_ready(self.state)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.done += 1
        if (mean := metrics["completions/mean_length"]) != (want := self.runtime.options.data.max_response_tokens):
            raise RuntimeError(f"responses have {mean} tokens on average, want {want} each")
        shape = (vision.patches_IxSxC.shape, vision.gather_IxM.shape, prompts.ids_QxP.shape)
        row = {"vision": vision, "prompts": prompts, "records": records, "new_shape": shape not in self._seen}
        self._seen.add(shape)
        phases = {name: metrics[f"timing_s/{name}"] for name in PHASES}
        phases["other"] = seconds - sum(phases.values())
        row |= {"insertions": float(metrics.get("reattention/inserted_mean", 0.0))}
        return row | {"step": seconds, "cpu": cpu, "compilations": counter.count, **phases}

    def measure(self, steps: int, warmup: int) -> list[dict[str, Any]]:
        """Steps after a warm-up; one whose batch has a new shape, and so compiles, belongs to the warm-up too."""
        for _ in range(warmup):
            self.step()
        rows: list[dict[str, Any]] = []
        while len(rows) < steps:
            row = self.step()
            if not row["new_shape"]:
                rows.append(row)
        return rows

    def work(self, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The mean work of these steps, see `flops.brpo_step_work`."""
        config, options = self.runtime.model.config, self.runtime.options
        num_params = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        total: dict[str, dict[str, Work]] = {}
        for row in rows:
            valid = row["vision"].valid_IxS
            patches_IxW = valid.reshape(len(valid), -1, config.vision.window_slots).sum(-1)
            lengths = row["prompts"].length_Q
            responses = np.full(len(lengths) * options.brpo.group_size, options.data.max_response_tokens)
            for phase, parts in brpo_step_work(config, patches_IxW, lengths, responses, num_params).items():
                for part, work in parts.items():
                    group = total.setdefault(phase, {})
                    group[part] = group.get(part, Work()) + work * (1 / len(rows))
        return total


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe(rows: Sequence[dict[str, Any]], work: dict[str, dict[str, Any]], peak: dict[str, float]) -> dict[str, Any]:
    """Seconds a step and of its phases, with the floors."""
    flops, moved = peak["matrix_gflops"] * 1e9, peak["memory_gb_s"] * 1e9
    detail = lambda w: {"gflop": w.flops / 1e9, "floor_seconds": w.flops / flops, "megabytes": w.bytes / 1e6}  # noqa: E731
    phases: dict[str, Any] = {}
    for name in ("step", *PHASES, "other"):
        phases[name] = {"seconds": summary([row[name] for row in rows])}
        parts = [w for phase, ws in work.items() if name in (phase, "step") for w in ws.values()]
        if parts:
            total = sum(parts[1:], parts[0])
            phases[name] |= detail(total) | {"bytes_floor_seconds": total.bytes / moved}
            phases[name]["floor_share"] = phases[name]["floor_seconds"] / phases[name]["seconds"]["median"]
    return {
        "compilations": sum(row["compilations"] for row in rows),
        "seconds_of_each_step": [round(row["step"], 4) for row in rows],
        "cpu_share": statistics.median(row["cpu"] / (cores() * row["step"]) for row in rows),
        "phases": phases,
        "floor_parts": {phase: {part: detail(w) for part, w in parts.items()} for phase, parts in work.items()},
    }


def mixed_sizes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compilations over images of many sizes: in steps whose shapes are new, and in all others."""
    small = argparse.Namespace(**vars(args) | {"prompts": 4, "responses": 2, "tokens": 16})
    size = small.prompts * args.mixed_steps
    questions = write_scenes(folder, size + size // 4 + 16, args.seed + 1, mixed=True)
    ours = Ours(small, questions, size, min_pixels=56 * 56, max_pixels=224 * 224)
    sizes: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    steps, compilations = {True: 0, False: 0}, {True: 0, False: 0}
    for number in range(args.mixed_steps):
        row = ours.step()
        warm = row["new_shape"]
        if warm:
            note(f"mixed images, step {number + 1} of {args.mixed_steps}: {row['compilations']} compilations")
        steps[warm] += 1
        compilations[warm] += row["compilations"]
        sizes[warm] |= {record.images[0].size for record in row["records"]}
    return {
        "warmup_steps": steps[True],
        "warmup_compilations": compilations[True],
        "steps_after_warmup": steps[False],
        "compilations_after_warmup": compilations[False],
        "image_sizes_after_warmup": len(sizes[False]),
        "of_them_not_in_warmup": len(sizes[False] - sizes[True]),
    }
