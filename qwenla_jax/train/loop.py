"""A run from its first step to its last: resume, train, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import to_dict, to_json
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.sources.skip_invalid import TooManyInvalid
from qwenla_jax.model.kernels import describe, kernel_here
from qwenla_jax.model.lora import only_adapters
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.parallel.distributed import is_multiprocess, is_primary, together
from qwenla_jax.run.checkpoints import CheckpointError, Checkpoints, SaveError
from qwenla_jax.run.metrics import METRICS_FILE, MetricWriter, whole_lines
from qwenla_jax.run.model_card import model_card
from qwenla_jax.run.signals import Interrupt, Stopped
from qwenla_jax.run.watchdog import Watchdog
from qwenla_jax.run.workdir import SETTINGS_FILE, Hold, WorkdirError, opened
from qwenla_jax.train import train_state
from qwenla_jax.train.brpo.reference import make_reference
from qwenla_jax.train.brpo.reward_failures import RewardsFailed
from qwenla_jax.train.brpo.score import reward_settings
from qwenla_jax.train.brpo.trainer import BrpoStage
from qwenla_jax.train.checkpointing import TrainCheckpointer
from qwenla_jax.train.contamination_guard import guard_against_leaks
from qwenla_jax.train.evaluator import Evaluator, write_optional
from qwenla_jax.train.health import Failed, Guard
from qwenla_jax.train.optimizer import make_optimizer, schedule
from qwenla_jax.train.sft.trainer import SftStage
from qwenla_jax.train.stage import Stage
from qwenla_jax.train.train_runtime import TrainRuntime, build, make_run_source
from qwenla_jax.utils.atomic_files import write_text
from qwenla_jax.utils.compile_counter import CompileCounter, CompileNotes
from qwenla_jax.utils.progress import Progress, duration
from qwenla_jax.weights.hf import save
from qwenla_jax.weights.hub import pinned

EXPORT_FOLDER = "hf"


class RunRefused(Exception):
    """A run that cannot start, for a reason that its user can correct; the message names it."""


def run(options: RunOptions, workdir: Path) -> dict[str, Any]:
    """Trains to `options.steps`, continuing from the newest checkpoint in `workdir` if there is one.

    Writes to `workdir`: `settings.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `checksums/`, `completions/`,
    `evaluations/`, and at the end `hf/`, the trained model in Hugging Face format. Everything that is computed at a
    step is a function of the settings, the step's number and the state before it, so resumed runs are bit-identical.

    Args:
      options: checked settings.
      workdir: the run's folder.

    Returns:
      a summary: `accuracy_before` and `accuracy_after` (where evaluated), `seconds`, and the folder `export`.

    Raises:
      RunRefused: the folder's checkpoint belongs to other settings, or settings, files or records cannot be used.
      Stopped: SIGTERM or SIGINT asked for the end; a checkpoint of the last complete step is written.
      Failed: the first step is invalid, too many updates in a row were skipped, too many records are invalid, or the
        rewards of all of a step's responses failed.
      SaveError: the last checkpoint could not be written.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        silent = None if is_primary() else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        compiled = stack.enter_context(CompileCounter())
        clock = lambda: time.monotonic() - compiled.seconds  # noqa: E731
        progress = Progress(options.steps, stream=silent, clock=clock)
        interrupt = stack.enter_context(Interrupt(progress.note))
        # Cheap checks come first: the folder, files and settings, and only then the model.
        try:
            with together(ValueError, OSError, ModuleNotFoundError):
                if is_primary():
                    stack.enter_context(opened(workdir))
                reward_settings(options)
                # The record names the commit, so that a resumed run is refused where the name means another one.
                options = dataclasses.replace(options, init_from=pinned(options.init_from))
                source = make_run_source(options, "cold_start" if options.stage == "sft" else "train")
                held_out = make_run_source(options, "held_out") if options.eval.final_size or options.eval.every else ()
            with together(ValueError):
                hold = Hold(workdir)
            checkpoints = stack.enter_context(Checkpoints(workdir, options, progress.note, hold))
            _check_progress(options, checkpoints, workdir, progress.note)
            if held_out and checkpoints.latest_step() is None:
                with together(ValueError, OSError):
                    guard_against_leaks(options, source, held_out, progress.note)
            runtime, params = build(options)
            reference = make_reference(runtime, params)
            optimizer, shardings = state_plan(runtime, params)
            checkpointer = TrainCheckpointer(checkpoints, options, params)
            if checkpoints.latest_step() is not None:
                state, done = checkpointer.restore(abstract_state(params, optimizer, shardings), params)
            else:
                state, done = first_state(params, optimizer, shardings, keep=reference is params), 0
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise RunRefused(f"{type(error).__name__}: {error}") from error
        progress.begin(done)
        phases = ["evaluation"] if options.eval.every or options.eval.final_size else []
        phases += ["rollout", "update"] if options.stage == "brpo" else ["update"]
        compile_notes = CompileNotes(phases, compiled, progress)
        stack.callback(compile_notes.end)
        watchdog = stack.enter_context(Watchdog(workdir, options.guard.stall_s))
        writer = stack.enter_context(_metric_writer(options, workdir, done, progress))
        write_optional(lambda: write_text(workdir / SETTINGS_FILE, to_json(options)), progress)
        progress.note(_headline(runtime, workdir, done, params))
        del params
        guard = Guard(options, workdir, hold, interrupt, watchdog, done, compile_notes.begin)
        evaluator = Evaluator(runtime, held_out, workdir, writer, progress, checkpoints, guard.check_stop)
        stage = _make_stage(options, runtime, optimizer, shardings, source, done, reference, progress.note)
        stack.callback(stage.close)
        try:
            state = _train(options, workdir, state, done, stage, writer, progress, checkpointer, evaluator, guard)
            evaluator.final(state.params, options.steps)
            summary = evaluator.compare(options.steps)
            best = checkpoints.best_step()
            if best not in (None, options.steps):
                progress.note(f"best by evaluation: the checkpoint of step {best}, which is kept")
            guard.check_stop("export")
            checkpoints.wait()
        except (TooManyInvalid, WorkdirError) as error:
            raise Failed(str(error)) from error
        export = _export(options, workdir, runtime, state.params)
        seconds = time.perf_counter() - begin
        publish = f" (hf upload ORG/NAME {export} publishes it)" if isinstance(export, Path) else ""
        progress.note(f"done in {duration(seconds)}; the model is in {export}{publish}")
    return summary | {"seconds": seconds, "export": export}


def _metric_writer(options: RunOptions, workdir: Path, done: int, progress: Progress) -> MetricWriter:
    """The writer of the run's metrics.

    Raises:
      RunRefused: a sink is unknown or cannot be opened, or the files of metrics cannot be used.
    """
    try:
        return MetricWriter(
            workdir,
            resume_step=done or None,
            progress=progress,
            primary=is_primary(),
            sinks=options.log.sinks,
            settings=to_dict(options),
        )
    except (ValueError, OSError) as error:
        raise RunRefused(f"{type(error).__name__}: {error}") from error


def _make_stage(
    options: RunOptions,
    runtime: TrainRuntime,
    optimizer: optax.GradientTransformation,
    shardings: train_state.TrainState,
    source: RecordSource,
    done: int,
    reference: Params | None,
    note: Callable[[str], None],
) -> Stage:
    """The stage that the settings ask for, to be closed by the caller.

    Raises:
      RunRefused: its settings or records cannot be used.
    """
    try:
        if options.stage == "sft":
            return SftStage(runtime, optimizer, shardings, source, done, note)
        return BrpoStage(runtime, optimizer, shardings, source, done, reference, note)
    except ValueError as error:
        raise RunRefused(str(error)) from error


def _export(options: RunOptions, workdir: Path, runtime: TrainRuntime, params: Params) -> Path | str:
    """Exports the model in Hugging Face format; not with several processes, where none may have room for all of it."""
    if is_multiprocess():
        return f"the last checkpoint, of which python convert/to_hf.py --src {workdir} --dst DIR makes such a folder"
    try:
        return save(
            workdir / EXPORT_FOLDER,
            runtime.model,
            params,
            tokenizer=runtime.tokenizer,
            processor=runtime.processor,
            system=options.data.system,
            dtype=options.dtype,
            overwrite=True,
            card=model_card(options, workdir, options.steps, family=runtime.model.config.family),
            reattention=options.reattention,
        )
    except OSError as error:
        raise SaveError(
            f"{workdir / EXPORT_FOLDER} could not be written: {error}; the checkpoint of step {options.steps} is "
            "there, and the same command writes it again"
        ) from error


def _check_progress(options: RunOptions, checkpoints: Checkpoints, workdir: Path, note: Callable[[str], None]) -> None:
    """Checks that the run in the folder can be resumed, and notes what will change."""
    done = checkpoints.latest_step()
    if done is None:
        return
    checkpoints.check(done)
    if is_primary():
        whole_lines(workdir / METRICS_FILE)
    if done > options.steps:
        raise CheckpointError(
            f"config.steps: got {options.steps}, but {workdir} has {done} steps done; ask for more, or another workdir"
        )
    if done < options.steps:
        note(f"{workdir} holds a run with {done} steps done: it is resumed (for a new run: another --workdir)")
    before = checkpoints.meta(done)["config"].get("steps")
    if type(before) is int and (change := rate_change(options, done, before)) is not None:
        old, new = change
        note(
            f"config.steps: {before} in the checkpoint, {options.steps} now, over which the {options.optim.schedule} "
            f"schedule is stretched: the learning rate was {old:.2g} at step {done} and is {new:.2g} at step {done + 1}"
        )


def rate_change(options: RunOptions, done: int, steps: int) -> tuple[float, float] | None:
    """Learning rates of the last step done and of the next, where a changed number of steps changes the next one.

    Args:
      options: present settings.
      done: steps done, at least 1.
      steps: `options.steps` as it was until then.
    """
    if done >= options.steps:
        return None
    inner = options.brpo.inner_updates if options.stage == "brpo" else 1
    old, new = (schedule(options.optim, total * inner) for total in (steps, options.steps))
    planned, now = float(old(done * inner)), float(new(done * inner))
    return (float(old((done - 1) * inner)), now) if abs(now - planned) > 0.01 * max(now, planned) else None


def state_plan(runtime: TrainRuntime, params: Params) -> tuple[optax.GradientTransformation, train_state.TrainState]:
    """The run's optimizer and the shardings of its state."""
    options = runtime.options
    updates = options.steps * (options.brpo.inner_updates if options.stage == "brpo" else 1)
    optimizer = make_optimizer(options.optim, updates, params, tuple(runtime.tokenizer.ids.tags.values()))
    return optimizer, train_state.state_shardings(params, runtime.shardings, optimizer, runtime.mesh)


def first_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: train_state.TrainState, keep: bool
) -> train_state.TrainState:
    """The state before the first update. Updates may overwrite its buffers.

    Args:
      params: the parameters to start from; donated to the state unless `keep`.
      optimizer, shardings: from `state_plan`.
      keep: copy the parameters, which are the reference too.
    """
    if not keep:
        make = lambda params: train_state.create(params, optimizer)  # noqa: E731
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)
    copy = lambda params: train_state.create(jax.tree.map(lambda x: x + 0, params), optimizer)  # noqa: E731
    return jax.jit(copy, out_shardings=shardings)(params)


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: train_state.TrainState
) -> train_state.TrainState:
    """Shapes and shardings that a checkpoint is restored into; no array is made."""
    shapes = jax.eval_shape(lambda params: train_state.create(params, optimizer), params)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, shardings)


def _train(
    options: RunOptions,
    workdir: Path,
    state: train_state.TrainState,
    done: int,
    stage: Stage,
    writer: MetricWriter,
    progress: Progress,
    checkpointer: TrainCheckpointer,
    evaluator: Evaluator,
    guard: Guard,
) -> train_state.TrainState:
    checkpoints = checkpointer.checkpoints
    pending: tuple[int, dict[str, Any]] | None = None
    whole = done  # steps done in `state`

    def flush() -> None:
        nonlocal pending
        if pending is not None:
            number, metrics = pending
            pending = None
            metrics = jax.device_get(metrics)
            if number % options.log.every == 0 or number == options.steps:
                writer.write(number, {f"train/{name}": value for name, value in metrics.items()})
            guard.check(number, metrics, stage, state)

    try:
        if not done:
            evaluator.final(state.params, 0)
        elif options.eval.every and done % options.eval.every == 0 and done != options.steps:
            evaluator.again(state.params, done)  # an interruption may have come before it ended
        last = time.perf_counter()
        for step in range(done, options.steps):
            state, metrics = stage.step(state, step, guard.check_stop)
            guard.announce("")
            whole = number = step + 1
            # Metrics are read one step late, so that the next step is dispatched while the device computes.
            flush()
            now = time.perf_counter()
            pending, last = (number, metrics | {"timing_s/step": now - last}), now
            progress.tick(number)
            evaluates = options.eval.every and number % options.eval.every == 0 and number != options.steps
            every = options.log.completions_every
            shows = every and (number in (1, options.steps) or number % every == 0 or evaluates)
            if shows or evaluates or checkpoints.due(number) or guard.urgent(number):
                flush()
                if shows:
                    writer.show(number, stage.completions())
                if evaluates:
                    evaluator(state.params, number, options.eval.size)
                if checkpoints.due(number):
                    guard.check_stop("checkpoint")
                    _save(checkpointer, number, state, progress, final=number == options.steps)
                last = time.perf_counter()
        flush()
    except (Stopped, RewardsFailed) as ended:
        flush()
        if whole > done:
            guard.heartbeat("checkpoint")
            _save(checkpointer, whole, state, progress, final=True)
            checkpoints.wait()
        saved = f"step {whole} is saved in {workdir}" if whole else "no step was done yet"
        if isinstance(ended, Stopped):
            raise Stopped(ended.number, f"{ended}; {saved}: the same command continues from there") from None
        raise Failed(f"{ended}. {saved[0].upper()}{saved[1:]}") from None
    return state


def _save(checkpointer: TrainCheckpointer, step: int, state: Any, progress: Progress, final: bool) -> None:
    """Saves; a checkpoint that cannot be written is noted and the run continues, unless it is the last one."""
    for attempt in ("now", "again"):
        try:
            checkpointer.save(step, state)
            return
        except SaveError as error:
            progress.note(str(error))
            # The error may belong to the previous write; then this one has not been tried yet.
            if attempt == "again" and final:
                raise
    progress.note(f"continuing without a checkpoint of step {step}")


def _headline(runtime: TrainRuntime, workdir: Path, done: int, params: Params) -> str:
    options = runtime.options
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    adapted = sum(leaf.size for leaf in jax.tree.leaves(only_adapters(params)))
    adapters = f", {adapted / 1e6:.2f}M of them in adapters of rank {options.lora.rank}," if adapted else ""
    shape = "x".join(str(n) for n in runtime.mesh.shape.values())
    resumed = f", resumed after step {done}" if done else ""
    if done == options.steps:
        resumed = f", all {done} steps done already (for more: a larger config.steps, or another workdir)"
    config = runtime.model.config
    return (
        f"{options.stage}: {size / 1e6:.2f}M parameters{adapters} from {options.init_from}, {options.data.source}, "
        f"{options.steps} steps, mesh {shape} on {jax.devices()[0].platform}, "
        f"{describe(config.attention, kernel_here(config.attention), config)}, workdir {workdir}{resumed}"
    )
