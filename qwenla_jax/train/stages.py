"""The two stages that train: what one step does, from the batch to the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax

from qwenla_jax.data.collate import collate_sft
from qwenla_jax.data.pipeline import RecordSource
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.train.brpo_step import Judged, make_brpo_step
from qwenla_jax.train.completions import Completion, write_completions
from qwenla_jax.train.optimizer import schedule
from qwenla_jax.train.rollout import Verdicts, judge, reward_settings
from qwenla_jax.train.runtime import Runtime, insertion_buckets, response_buckets
from qwenla_jax.train.sft_step import make_sft_step
from qwenla_jax.train.sharding import batch_sharding, replicated
from qwenla_jax.train.state import TrainState


class Stage(Protocol):
    """One way to train."""

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Step `step` (counted from 0); the metrics, without prefix, may still be on the device."""

    def show(self, workdir: Path, step: int) -> None:
        """Writes a table of what the last step looked at, where the stage has one."""


def make_reference(runtime: Runtime, params: Params) -> Params | None:
    """The frozen reference: the parameters a BRPO run starts from, in the type they are computed in; None if unused.

    Where that type is the parameters' own, it is the same arrays: they must not be donated.
    """
    if runtime.options.stage != "brpo" or not runtime.options.brpo.beta:
        return None
    dtype = runtime.options.dtype
    if dtype == runtime.options.param_dtype:
        return params
    return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p), out_shardings=runtime.layouts)(params)


class SftStage:
    """Supervised training on responses, with or without the pictures in them again (paper, stages 1 and 4)."""

    def __init__(
        self,
        runtime: Runtime,
        optimizer: optax.GradientTransformation,
        layouts: TrainState,
        source: RecordSource,
        first_step: int,
    ) -> None:
        options = runtime.options
        rows, whole = batch_sharding(runtime.mesh, leading=1), replicated(runtime.mesh)
        look = runtime.look()
        collate = runtime.collate_responses if look.inserts else collate_sft
        batch = (rows,) * (3 if look.inserts else 2)
        self._runtime = runtime
        self._step = jax.jit(
            make_sft_step(runtime.model, optimizer, options.optim.trainable, look),
            in_shardings=(layouts, *batch, whole),
            out_shardings=(layouts, whole),
            donate_argnums=0,
        )
        self._rate = schedule(options.optim, options.steps)
        self._batches = runtime.batches(source, collate, True, first_step)

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One update; dispatch only, nothing is waited for but the data."""
        begin = time.perf_counter()
        batch, _ = next(self._batches)
        waited = time.perf_counter() - begin
        with self._runtime.context():
            state, metrics = self._step(state, *batch, self._runtime.bias_V)
        return state, metrics | {"learning_rate": float(self._rate(step)), "timing_s/data": waited}

    def show(self, workdir: Path, step: int) -> None:
        """There are no completions to show."""


class BrpoStage:
    """BRPO: sample, reward, update (paper, section BRPO)."""

    def __init__(
        self,
        runtime: Runtime,
        optimizer: optax.GradientTransformation,
        layouts: TrainState,
        source: RecordSource,
        first_step: int,
        reference: Params | None,
    ) -> None:
        options = runtime.options
        rows, whole = batch_sharding(runtime.mesh, leading=1), replicated(runtime.mesh)
        self._runtime = runtime
        self._reference = reference
        self._step = jax.jit(
            make_brpo_step(runtime.model, optimizer, options.brpo, options.optim.trainable, runtime.look()),
            in_shardings=(layouts, runtime.layouts if options.brpo.beta else None, rows, rows, rows, whole),
            out_shardings=(layouts, whole),
            donate_argnums=0,
        )
        self._sampler = runtime.sampler(
            runtime.sample_options(options.brpo.group_size, options.brpo.temperature, options.brpo.top_p)
        )
        self._rate = schedule(options.optim, options.steps * options.brpo.inner_updates)
        self._settings = reward_settings(options.rewards)
        self._lengths = response_buckets(options.data.max_response_tokens)
        self._batches: Iterator[Any] = runtime.batches(source, runtime.collate_prompts, False, first_step)
        self._last: tuple[list[Any], Verdicts] | None = None

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Samples G responses to each question of the batch, rewards them, and updates."""
        options = self._runtime.options.brpo
        clock = [time.perf_counter()]
        batch, records = next(self._batches)
        clock.append(time.perf_counter())
        parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch[1].ids_QxP))]
        rows = len(records) // len(parts) * options.group_size
        numbers = np.arange(rows * len(parts), dtype=np.uint32).reshape(len(parts), rows)
        rollouts = jax.device_get(
            [self._sampler(state.params, *part, step, number) for part, number in zip(parts, numbers, strict=True)]
        )
        clock.append(time.perf_counter())
        verdicts = judge(rollouts, records, self._runtime.tokenizer, self._settings, options.std_eps)
        clock.append(time.perf_counter())
        self._last = records, verdicts
        longest = next(n for n in self._lengths if n >= verdicts.length_B.max())
        inserted_B = np.concatenate([r.inserted_B for r in rollouts])
        refused_B = np.concatenate([r.refused_B for r in rollouts])
        looks = self._runtime.look().inserts
        turns = next((n for n in insertion_buckets(rollouts[0].kept_BxExX.shape[1]) if n >= inserted_B.max()), 0)
        judged = Judged(
            ids_BxR=np.stack([r.ids_BxR[:, :longest] for r in rollouts]),
            logp_BxR=np.stack([r.logp_BxR[:, :longest] for r in rollouts]),
            length_B=np.stack([r.length_B for r in rollouts]),
            advantage_B=verdicts.advantage_B.reshape(len(parts), rows),
            counted_B=np.ones((len(parts), rows), np.float32),
            kept_BxExX=np.stack([r.kept_BxExX[:, :turns] for r in rollouts]) if looks else None,
        )
        with self._runtime.context():
            updates = []
            for _ in range(options.inner_updates):
                state, metrics = self._step(state, self._reference, *batch, judged, self._runtime.bias_V)
                updates.append(metrics)
        updates = jax.device_get(updates)
        # The first update is the one on policy: only there is a difference to the sampler a sign of something wrong.
        first = "sampling_logp_difference"
        metrics = {name: np.mean([m[name] for m in updates]) for name in updates[0]} | {first: updates[0][first]}
        clock.append(time.perf_counter())
        names = ("data", "rollout", "reward", "update")
        timing = {f"timing_s/{name}": b - a for name, a, b in zip(names, clock, clock[1:], strict=False)}
        rate = float(self._rate(step * options.inner_updates))
        own = verdicts.metrics(options.group_size)
        speed = {"perf/sampled_tokens_per_s": float(verdicts.length_B.sum()) / timing["timing_s/rollout"]}
        if looks:
            own |= {"reattention/inserted_mean": inserted_B.mean(), "reattention/refused_mean": refused_B.mean()}
        return state, own | metrics | timing | speed | {"learning_rate": rate}

    def show(self, workdir: Path, step: int) -> None:
        """Writes the last step's completions as HTML."""
        if self._last is None:
            return
        records, verdicts = self._last
        group = self._runtime.options.brpo.group_size
        rows = []
        for row in range(min(self._runtime.options.log.completions_rows, len(verdicts.texts))):
            record, earned = records[row // group], verdicts.scores[row]
            cut = "" if verdicts.stopped_B[row] else f"cut off at {verdicts.length_B[row]} tokens"
            rows.append(
                Completion(
                    images=record.images,
                    prompt=record.question,
                    answer=record.answer,
                    response=verdicts.texts[row],
                    rewards={name: getattr(earned, name) for name in ("format", "accuracy", "balance")},
                    reward=earned.total,
                    advantage=float(verdicts.advantage_B[row]),
                    note=cut,
                )
            )
        write_completions(workdir, step, rows)
