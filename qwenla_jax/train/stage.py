"""The protocol of a stage, the inputs of an update, and the seconds of a step by phase."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

from qwenla_jax.run.completions import Completion
from qwenla_jax.train.train_state import TrainState

CheckStop = Callable[[str], None]  # called with the name of the next phase; raises where the run was asked to end


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of an update beside the state: enough to compute it again.

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

    def step(self, state: TrainState, step: int, check_stop: CheckStop) -> tuple[TrainState, dict[str, Any]]:
        """Step `step` (counted from 0); the metrics, without prefix, may still be on the device."""
        ...

    def completions(self) -> list[Completion]:
        """The last step's completions, where the stage samples any."""
        ...

    def close(self) -> None:
        """Releases processes."""


class Clock:
    """Seconds by phase of a step; each phase begins with a check for a stop request."""

    def __init__(self, check_stop: CheckStop) -> None:
        self._check_stop = check_stop
        self._spent: dict[str, float] = {}
        self._phase: str | None = None
        self._begin = 0.0

    def __call__(self, phase: str) -> None:
        """Begins `phase`; a phase may come several times."""
        self._end()
        self._check_stop(phase)
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
