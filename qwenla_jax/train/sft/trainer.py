"""Supervised training: one step, from the batch to the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import optax

from qwenla_jax.data.batching.collate import collate_sft
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.parallel.distributed import place
from qwenla_jax.parallel.sharding import batch_sharding
from qwenla_jax.run.completions import Completion
from qwenla_jax.train.optimizer import schedule
from qwenla_jax.train.programs import update_program
from qwenla_jax.train.stage import CheckStop, Inputs
from qwenla_jax.train.train_runtime import TrainRuntime
from qwenla_jax.train.train_state import TrainState


class SftStage:
    """Supervised training on responses, with or without re-inserted images (paper, stages 1 and 4)."""

    def __init__(
        self,
        runtime: TrainRuntime,
        optimizer: optax.GradientTransformation,
        shardings: TrainState,
        source: RecordSource,
        first_step: int,
        note: Callable[[str], None] | None = None,
    ) -> None:
        options = runtime.options
        collate = runtime.collate_responses if runtime.reattention().inserts else collate_sft
        self._runtime = runtime
        self._step = update_program(runtime, optimizer, shardings)
        self._rate = schedule(options.optim, options.steps)
        self._batches = runtime.batches(runtime.usable(source, True, note), collate, first_step)
        self._rows = batch_sharding(runtime.mesh, leading=1)
        self.inputs: Inputs | None = None

    def step(self, state: TrainState, step: int, check_stop: CheckStop) -> tuple[TrainState, dict[str, Any]]:
        """One update; only the data is waited for, the device is not."""
        check_stop("data")
        begin = time.perf_counter()
        batch, records, invalid = next(self._batches)
        waited = time.perf_counter() - begin
        check_stop("update")
        self.inputs = Inputs(step, batch, [{"id": record.id} for record in records])
        with self._runtime.context():
            state, metrics = self._step(state, *place(batch, self._rows), self._runtime.logit_bias_V)
        host_metrics = {"learning_rate": float(self._rate(step)), "timing_s/data": waited, "data/invalid": invalid}
        return state, metrics | host_metrics

    def completions(self) -> list[Completion]:
        """None: nothing is sampled."""
        return []

    def close(self) -> None:
        """There are no processes."""
