"""The two stages that train: what one step does, from the batch to the metrics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax

from qwenla_jax.data.collate import collate_sft
from qwenla_jax.data.pipeline import RecordSource
from qwenla_jax.model.lora import adapted_kernels, base_of
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.rewards.total import RewardScores
from qwenla_jax.train.brpo_step import Judged, make_brpo_gradient
from qwenla_jax.train.completions import Completion, write_completions
from qwenla_jax.train.examples import Records
from qwenla_jax.train.optimizer import schedule, trainable_labels, trained_part
from qwenla_jax.train.processes import place
from qwenla_jax.train.resample import Drawn, fill, fit, further_records, join
from qwenla_jax.train.reward_failures import RewardFailures
from qwenla_jax.train.rollout import judge, reward_pool, reward_settings
from qwenla_jax.train.runtime import Runtime, Sampler, insertion_buckets, response_buckets
from qwenla_jax.train.sft_step import Rules, make_sft_gradient
from qwenla_jax.train.sharding import batch_sharding, replicated
from qwenla_jax.train.state import Gradient, TrainState, make_update
from qwenla_jax.types import PromptBatch, Rollout

Pause = Callable[[str], None]  # told what comes next; raises where the run was asked to end


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an update was computed from, beside the state: enough to compute it again.

    Attributes:
      step: counted from 0.
      batch: the batch on the host, as the compiled update takes it.
      rows: texts and rewards of the responses, by row; empty where there are none.
    """

    step: int
    batch: tuple[Any, ...]
    rows: list[dict[str, Any]]


class Stage(Protocol):
    """One way to train."""

    inputs: Inputs | None  # of the last step

    def step(self, state: TrainState, step: int, pause: Pause) -> tuple[TrainState, dict[str, Any]]:
        """Step `step` (counted from 0); the metrics, without prefix, may still be on the device."""

    def show(self, workdir: Path, step: int) -> None:
        """Writes a table of what the last step looked at, where the stage has one."""

    def close(self) -> None:
        """Lets go of processes."""


def make_reference(runtime: Runtime, params: Params) -> Params | None:
    """The frozen reference: the parameters a BRPO run starts from, in the type they are computed in; None if unused.

    With `brpo.reference` host it lies in the host's memory, and each update takes it to the devices for its own time.
    Where that type is the parameters' own, it is the same arrays: they must not be donated. Where the parameters have
    adapters, the reference is the base that the state holds, and only what of it is trained too is copied here.
    """
    if runtime.options.stage != "brpo" or not runtime.options.brpo.beta:
        return None
    if not adapted_kernels(params) and runtime.options.dtype == runtime.options.param_dtype:
        on_host = runtime.options.brpo.reference == "host"
        return jax.device_put(params, kept_reference_layouts(runtime)) if on_host else params
    return reference_program(runtime)(params)


def reference_program(runtime: Runtime) -> Any:
    """What makes the reference of parameters, jitted: a copy of what is not there otherwise, in the computing type."""
    dtype, rules = runtime.options.dtype, runtime.options.optim.trainable

    def copy(params: Params) -> Params:
        if adapted_kernels(params):
            return jax.tree.map(lambda x: x.astype(dtype) + 0, _moving_base(params, rules))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return jax.jit(copy, out_shardings=kept_reference_layouts(runtime))


def _moving_base(tree: Any, rules: Rules) -> Any:
    """Of a tree shaped as parameters with adapters: what is trained of the base."""
    return base_of(trained_part(tree, trainable_labels(tree, rules)))


def _reference_layouts(runtime: Runtime) -> Any:
    if adapted_kernels(runtime.layouts):
        return _moving_base(runtime.layouts, runtime.options.optim.trainable)
    return runtime.layouts


def kept_reference_layouts(runtime: Runtime) -> Any:
    """Where the reference lies between updates."""
    layouts = _reference_layouts(runtime)
    if runtime.options.brpo.reference == "device":
        return layouts
    return jax.tree.map(lambda layout: layout.with_memory_kind("pinned_host"), layouts)


class SftStage:
    """Supervised training on responses, with or without the pictures in them again (paper, stages 1 and 4)."""

    def __init__(
        self,
        runtime: Runtime,
        optimizer: optax.GradientTransformation,
        layouts: TrainState,
        source: RecordSource,
        first_step: int,
        note: Callable[[str], None] | None = None,
    ) -> None:
        options = runtime.options
        collate = runtime.collate_responses if runtime.look().inserts else collate_sft
        self._runtime = runtime
        self._step = update_program(runtime, optimizer, layouts)
        self._rate = schedule(options.optim, options.steps)
        self._batches = runtime.batches(runtime.usable(source, True, note), collate, first_step)
        self._rows = batch_sharding(runtime.mesh, leading=1)
        self.inputs: Inputs | None = None

    def step(self, state: TrainState, step: int, pause: Pause) -> tuple[TrainState, dict[str, Any]]:
        """One update; dispatch only, nothing is waited for but the data."""
        pause("data")
        begin = time.perf_counter()
        batch, records, broken = next(self._batches)
        waited = time.perf_counter() - begin
        pause("update")
        self.inputs = Inputs(step, batch, [{"id": record.id} for record in records])
        with self._runtime.context():
            state, metrics = self._step(state, *place(batch, self._rows), self._runtime.bias_V)
        own = {"learning_rate": float(self._rate(step)), "timing_s/data": waited, "data/broken": broken}
        return state, metrics | own

    def show(self, workdir: Path, step: int) -> None:
        """There are no completions to show."""

    def close(self) -> None:
        """There are no processes."""


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
        note: Callable[[str], None] | None = None,
    ) -> None:
        options = runtime.options
        self._runtime, self._reference = runtime, reference
        self._step = update_program(runtime, optimizer, layouts)
        self._sampler = brpo_sampler(runtime)
        self._rate = schedule(options.optim, options.steps * options.brpo.inner_updates)
        self._settings = reward_settings(options)
        self._rows = batch_sharding(runtime.mesh, leading=1)
        self._lengths = response_buckets(options.data.max_response_tokens)
        examples = runtime.usable(source, False, note)
        self._source: RecordSource = Records(examples)
        self._asked_rows = options.brpo.rollout_batch
        self._batches: Iterator[Any] = runtime.batches(examples, runtime.collate_prompts, first_step, self._asked_rows)
        self._encoder = runtime.encoder() if tower_is_frozen(runtime) else None
        self._last: Drawn | None = None
        self._failures = RewardFailures(note, first_step)
        self.inputs: Inputs | None = None
        self._pool = reward_pool(options)

    def _draw(self, params: Params, batch: Any, records: list[Any], step: int, turn: int, clock: Clock) -> Drawn:
        """Samples and judges G responses to each question; `turn` counts the step's samplings."""
        group = self._runtime.options.brpo.group_size
        rollout = sample_parts(self._sampler, params, batch, step, turn, len(records) * group)
        clock("reward")
        tokenizer, options = self._runtime.tokenizer, self._runtime.options.brpo
        verdicts = judge([rollout], records, tokenizer, self._pool, self._settings, options)
        self._failures.look_at(step, verdicts.scores)
        return Drawn(records, rollout, verdicts)

    def _see(self, params: Params, batch: Any) -> Any:
        """The batch with its pictures' visual tokens, where a step's programs may share them: the tower is frozen."""
        if self._encoder is None:
            return batch
        vision, *rest = batch
        return self._encoder(params, vision), *rest

    def step(self, state: TrainState, step: int, pause: Pause) -> tuple[TrainState, dict[str, Any]]:
        """Samples G responses to each question of the batch, rewards them, and updates.

        Raises:
          RewardsFailed: no response has rewards.
        """
        run, options = self._runtime.options, self._runtime.options.brpo
        clock = Clock(pause)
        clock("data")
        batch, records, broken = next(self._batches)
        batch, asked = (batch, batch) if self._asked_rows is None else batch
        clock("rollout")
        seen = self._see(state.params, batch)
        asked = seen if asked is batch else self._see(state.params, asked)
        first = drawn = self._draw(state.params, asked, records, step, 0, clock)
        resampled: dict[str, float] = {}
        if options.resample_rounds:

            def again(turn: int) -> Drawn:
                rounds = options.resample_rounds
                found = further_records(self._source, run.seed, step, turn, rounds, len(records))
                other = self._runtime.stack(found, self._runtime.collate_prompts, False, self._asked_rows)
                clock("rollout")
                return self._draw(state.params, self._see(state.params, other), found, step, turn + 1, clock)

            drawn, rounds = fill(first, again, options.resample_rounds)
            if rounds:
                batch = self._runtime.stack(drawn.records, self._runtime.collate_prompts, False)
                seen = self._see(state.params, batch)
            resampled = {"resample/rounds": rounds, "resample/missing": drawn.verdicts.equal_Q.mean()}
        self._last = drawn
        judged = self._judged(drawn, batch)
        self.inputs = Inputs(step, (*batch, judged), _rows(drawn))
        clock("update")
        updates = []
        placed = place((*seen, judged), self._rows)
        with self._runtime.context():
            for _ in range(options.inner_updates):
                state, metrics = self._step(state, self._reference, *placed, self._runtime.bias_V)
                updates.append(metrics)
        updates = jax.device_get(updates)
        # The first update is the one on policy: only there is a difference to the sampler a sign of something wrong.
        once = ("sampling_logp_difference", "ratio_mean", "kl")
        metrics = {name: np.mean([m[name] for m in updates]) for name in updates[0]}
        metrics |= {f"first_update/{name}": updates[0][name] for name in once} if options.inner_updates > 1 else {}
        timing = clock.seconds()
        rate = float(self._rate(step * options.inner_updates))
        own = first.verdicts.metrics() | resampled | {"data/broken": broken}
        own["perf/sampled_tokens_per_s"] = float(first.verdicts.length_B.sum()) / timing["timing_s/rollout"]
        if self._runtime.look().inserts:
            own["reattention/inserted_mean"] = first.rollout.inserted_B.mean()
            own["reattention/refused_mean"] = first.rollout.refused_B.mean()
        return state, own | metrics | timing | {"learning_rate": rate}

    def _judged(self, drawn: Drawn, batch: Any) -> Judged:
        """The update's view of the responses, in the batch's parts, cut to what they need."""
        rollout, verdicts = drawn.rollout, drawn.verdicts
        longest = next(n for n in self._lengths if n >= verdicts.length_B.max())
        kept = None
        if self._runtime.look().inserts:
            turns = insertion_buckets(rollout.kept_BxExX.shape[1])
            most = next((n for n in turns if n >= rollout.inserted_B.max()), 0)
            kept = fit(rollout.kept_BxExX[:, :most], block_slots(batch[1]))
        parts = len(batch[1].ids_QxP)
        judged = Judged(
            ids_BxR=rollout.ids_BxR[:, :longest],
            logp_BxR=rollout.logp_BxR[:, :longest],
            length_B=rollout.length_B,
            advantage_B=verdicts.advantage_B,
            counted_B=verdicts.counted_B,
            trained_B=verdicts.trained_B,
            kept_BxExX=kept,
        )
        return jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), judged)

    def show(self, workdir: Path, step: int) -> None:
        """Writes the last step's completions as HTML."""
        if self._last is None:
            return
        records, verdicts = self._last.records, self._last.verdicts
        group = self._runtime.options.brpo.group_size
        rows = []
        for row in range(min(self._runtime.options.log.completions_rows, len(verdicts.texts))):
            record, earned = records[row // group], verdicts.scores[row]
            scored = isinstance(earned, RewardScores)
            cut = "" if verdicts.stopped_B[row] else f"cut off at {verdicts.length_B[row]} tokens"
            rows.append(
                Completion(
                    images=record.images,
                    prompt=record.question,
                    answer=record.answer,
                    response=verdicts.texts[row],
                    rewards=dict(earned.components) if scored else {},
                    reward=earned.total if scored else float("nan"),
                    advantage=float(verdicts.advantage_B[row]),
                    note=cut if scored else f"no rewards: {earned.name} {earned.kind}: {earned.message}",
                )
            )
        write_completions(workdir, step, rows)

    def close(self) -> None:
        """Ends the processes of the rewards."""
        self._pool.close()


class Clock:
    """Seconds by phase of a step; each phase begins with a safe point."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._spent: dict[str, float] = {}
        self._phase: str | None = None
        self._begin = 0.0

    def __call__(self, phase: str) -> None:
        """From here on `phase`; a phase may come several times."""
        self._end()
        self._pause(phase)
        self._phase, self._begin = phase, time.perf_counter()

    def _end(self) -> None:
        if self._phase is not None:
            now = time.perf_counter()
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._begin

    def seconds(self) -> dict[str, float]:
        """`timing_s/PHASE` of all phases; the last one ends here."""
        self._end()
        self._phase = None
        return {f"timing_s/{name}": value for name, value in self._spent.items()}


def gradient_of(runtime: Runtime) -> Gradient:
    """The gradient of a run's stage."""
    options = runtime.options
    rules, look = options.optim.trainable, runtime.look()
    if options.stage == "sft":
        return make_sft_gradient(runtime.model, rules, look)
    gradient = make_brpo_gradient(runtime.model, options.brpo, options.data.max_response_tokens, rules, look)
    if options.brpo.reference == "device" or not options.brpo.beta:
        return gradient
    layouts = _reference_layouts(runtime)
    return lambda params, kept, *rest: gradient(params, jax.device_put(kept, layouts), *rest)


def tower_is_frozen(runtime: Runtime) -> bool:
    """Whether nothing of the vision tower and its merger is trained, so that a picture has one set of tokens."""
    labels = trainable_labels(runtime.layouts, runtime.options.optim.trainable)
    return all(label == "freeze" for label in jax.tree.leaves(labels["visual"]))


def update_program(runtime: Runtime, optimizer: optax.GradientTransformation, layouts: TrainState) -> Any:
    """The jitted update of a run's stage: (state, batch ...) -> new state, metrics. The old state is overwritten."""
    return jax.jit(
        make_update(gradient_of(runtime), optimizer),
        in_shardings=(layouts, *batch_layouts(runtime)),
        out_shardings=(layouts, replicated(runtime.mesh)),
        donate_argnums=0,
    )


def batch_layouts(runtime: Runtime) -> tuple[Any, ...]:
    """Layouts of what a stage's gradient takes after the parameters.

    For BRPO reference, pictures, prompts, responses, bias; for supervised training the batch and the bias.
    """
    rows, whole = batch_sharding(runtime.mesh, leading=1), replicated(runtime.mesh)
    if runtime.options.stage == "sft":
        return *(rows,) * (3 if runtime.look().inserts else 2), whole
    return kept_reference_layouts(runtime) if runtime.options.brpo.beta else None, rows, rows, rows, whole


def brpo_sampler(runtime: Runtime) -> Sampler:
    """The sampler of a BRPO run's rollouts."""
    options = runtime.options.brpo
    return runtime.sampler(runtime.sample_options(options.group_size, options.temperature, options.top_p))


def sample_parts(sampler: Sampler, params: Params, batch: Any, step: int, turn: int, rows: int) -> Rollout:
    """Responses to a batch in parts, on the host, all rows below each other.

    Sample numbers go on from turn to turn, so that no two rows of a step share their random keys.
    """
    parts = len(batch[1].ids_QxP)
    numbers = np.arange(turn * rows, (turn + 1) * rows, dtype=np.uint32).reshape(parts, -1)
    cut = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(parts)]
    rollouts = [sampler(params, *part, step, number) for part, number in zip(cut, numbers, strict=True)]
    return join(jax.device_get(rollouts))


def block_slots(prompts: PromptBatch) -> int:
    """X, the slots of the pictures' blocks of a batch in parts."""
    return prompts.block.pos_QxXx3.shape[2]


def _rows(drawn: Drawn) -> list[dict[str, Any]]:
    verdicts = drawn.verdicts
    group = len(verdicts.texts) // len(drawn.records)
    return [
        {
            "id": drawn.records[row // group].id,
            "response": text,
            "rewards": dataclasses.asdict(verdicts.scores[row]),
            "advantage": float(verdicts.advantage_B[row]),
        }
        for row, text in enumerate(verdicts.texts)
    ]
