"""A run from its first step to its last: resume, train, evaluate, save."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax

from qwenla_jax.model.hf_io import save
from qwenla_jax.train import state as train_state
from qwenla_jax.train.checkpoint import Checkpoints
from qwenla_jax.train.evaluate import Evaluation, evaluate
from qwenla_jax.train.intervals import paired
from qwenla_jax.train.metrics import MetricWriter
from qwenla_jax.train.optimizer import make_optimizer
from qwenla_jax.train.options import RunOptions
from qwenla_jax.train.progress import Progress, duration
from qwenla_jax.train.runtime import Runtime, build
from qwenla_jax.train.stages import BrpoStage, SftStage, Stage

EXPORT_FOLDER = "hf"


def run(options: RunOptions, workdir: Path) -> dict[str, Any]:
    """Trains to `options.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Writes to `workdir`: `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `completions/`, `evaluations/`, and at the end
    `hf/`, the trained model in Hugging Face format.

    Args:
      options: checked settings.
      workdir: the run's folder.

    Returns:
      a summary: `accuracy_before` and `accuracy_after` (where evaluated), `seconds`, and the folder `export`.

    Raises:
      CheckpointError: the folder's checkpoint belongs to other settings.
      ValueError, FileNotFoundError: settings, files or records that cannot be used.
    """
    begin = time.perf_counter()
    runtime = build(options)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, options))
        done = checkpoints.latest_step() or 0
        if done:
            checkpoints.check()
        progress = Progress(options.steps, done)
        writer = stack.enter_context(MetricWriter(workdir, resume_step=done or None, progress=progress))
        progress.note(_headline(runtime, workdir, done))
        state, layouts, optimizer = first_state(runtime)
        if done:
            state = checkpoints.restore(state)
        evaluator = Evaluator(runtime, workdir, writer, progress)
        if not done and options.eval.final_size:
            evaluator(state.params, 0, options.eval.final_size)
        kind = {"sft": SftStage, "brpo": BrpoStage}[options.stage]
        stage: Stage = kind(runtime, optimizer, layouts, done)
        state = _train(options, workdir, state, done, stage, writer, checkpoints, evaluator)
        summary = evaluator.compare(options.steps)
        export = save(
            workdir / EXPORT_FOLDER,
            runtime.model,
            state.params,
            tokenizer=runtime.tokenizer,
            processor=runtime.processor,
            overwrite=True,
        )
        seconds = time.perf_counter() - begin
        progress.note(f"done in {duration(seconds)}; the model is in {export}")
    return summary | {"seconds": seconds, "export": export}


def first_state(runtime: Runtime) -> tuple[train_state.TrainState, train_state.TrainState, Any]:
    """State before the first update, its layouts, and the optimizer. The state's buffers are the run's to donate."""
    options = runtime.options
    updates = options.steps * (options.brpo.inner_updates if options.stage == "brpo" else 1)
    optimizer = make_optimizer(options.optim, updates, runtime.first_params)
    layouts = train_state.state_shardings(runtime.first_params, runtime.layouts, optimizer, runtime.mesh)
    # Copied: the first parameters stay as the reference while the state's are overwritten in place.
    make = jax.jit(
        lambda params: train_state.create(jax.tree.map(lambda x: x + 0, params), optimizer), out_shardings=layouts
    )
    return make(runtime.first_params), layouts, optimizer


def _train(
    options: RunOptions,
    workdir: Path,
    state: train_state.TrainState,
    done: int,
    stage: Stage,
    writer: MetricWriter,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
) -> train_state.TrainState:
    waiting: tuple[int, dict[str, Any]] | None = None
    last = time.perf_counter()
    for step in range(done, options.steps):
        state, metrics = stage.step(state, step)
        number = step + 1
        # Metrics are read one step late, when the device has them, so that the next step is dispatched meanwhile.
        if waiting is not None:
            _write(writer, *waiting)
        now = time.perf_counter()
        waiting, last = (number, metrics | {"timing_s/step": now - last}), now
        log, cadence = options.log, options.eval.every
        if number % log.every and number != options.steps:
            waiting = None
        if log.completions_every and number % log.completions_every == 0:
            stage.show(workdir, number)
        final = number == options.steps
        if final or (cadence and number % cadence == 0) or checkpoints.due(number):
            if waiting is not None:
                _write(writer, *waiting)
                waiting = None
            if final and options.eval.final_size:
                evaluator(state.params, number, options.eval.final_size)
            elif cadence and number % cadence == 0:
                evaluator(state.params, number, options.eval.size)
            if checkpoints.due(number):
                checkpoints.save(number, state)
            last = time.perf_counter()
    if waiting is not None:
        _write(writer, *waiting)
    return state


def _write(writer: MetricWriter, step: int, metrics: dict[str, Any]) -> None:
    writer.write(step, {f"train/{name}": value for name, value in jax.device_get(metrics).items()})


class Evaluator:
    """Evaluates, and remembers on disk what each question's answer was, so that before and after can be paired."""

    def __init__(self, runtime: Runtime, workdir: Path, writer: MetricWriter, progress: Progress) -> None:
        self._runtime = runtime
        self._folder = workdir / "evaluations"
        self._writer, self._progress = writer, progress
        self._source = runtime.source("held_out")
        self._sampler = runtime.sampler(runtime.sample_options(group_size=1, temperature=0.0))

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.json"

    def __call__(self, params: Any, step: int, size: int) -> None:
        """Evaluates after `step` steps on the first `size` held-out questions."""
        begin = time.perf_counter()
        result = evaluate(self._runtime, self._sampler, params, self._source, size)
        seconds = time.perf_counter() - begin
        result.write(self._path(step))
        self._writer.write(step, result.metrics() | {"eval/timing_s": seconds})
        kinds = ", ".join(f"{kind} {part.share:.1%}" for kind, part in result.by_kind().items())
        self._progress.note(f"held out, {len(result.right)} questions: accuracy {result.accuracy} ({kinds})")

    def compare(self, steps: int) -> dict[str, Any]:
        """Before and after on the same questions, where both were evaluated."""
        first, last = self._path(0), self._path(steps)
        if not (first.is_file() and last.is_file()):
            return {}
        before, after = Evaluation.read(first), Evaluation.read(last)
        if before.ids != after.ids:
            return {}
        test = paired(before.right, after.right)
        self._progress.note(
            f"accuracy before {before.accuracy}, after {after.accuracy}: {test.difference:+.1%}, "
            f"{test.gained} gained, {test.lost} lost, McNemar p = {test.p_value:.2g}"
        )
        return {"accuracy_before": before.accuracy, "accuracy_after": after.accuracy, "paired": test}


def _headline(runtime: Runtime, workdir: Path, done: int) -> str:
    options = runtime.options
    size = sum(leaf.size for leaf in jax.tree.leaves(runtime.first_params))
    shape = "x".join(str(n) for n in runtime.mesh.shape.values())
    resumed = f", going on after step {done}" if done else ""
    return (
        f"{options.stage}: {size / 1e6:.2f}M parameters from {options.init_from}, {options.data.source}, "
        f"{options.steps} steps, mesh {shape} on {jax.devices()[0].platform}, workdir {workdir}{resumed}"
    )
