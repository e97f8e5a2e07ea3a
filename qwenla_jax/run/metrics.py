"""Metrics and completions of a run: `metrics.jsonl`, `completions/`, the console, and the sinks of `config.log`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qwenla_jax.run.completions import Completion, write_completions
from qwenla_jax.run.sinks.sink import Sink
from qwenla_jax.run.sinks.tensorboard import TensorBoardSink
from qwenla_jax.run.sinks.trackio import TrackioSink
from qwenla_jax.run.sinks.wandb import WandbSink
from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import replacing
from qwenla_jax.utils.progress import Progress

METRICS_FILE = "metrics.jsonl"


def to_json_line(step: int, metrics: Mapping[str, Any]) -> str:
    """One line of valid JSON without its line break: `step` first, then the metrics in their order.

    JSON has no nan and no infinities. Such a metric is null, and `nonfinite` has its value: "nan", "inf" or "-inf".

    Raises:
      ValueError: a metric that is not one number, or is named `step` or `nonfinite`.
    """
    row: dict[str, Any] = {"step": int(step)}
    nonfinite = {}
    for name, value in metrics.items():
        if name in ("step", "nonfinite"):
            raise ValueError(f"metrics: {name!r} is taken by the format of {METRICS_FILE}")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metrics: {name}: got {value!r}, expected one number") from error
        row[name] = number if math.isfinite(number) else None
        if not math.isfinite(number):
            nonfinite[name] = str(number)
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row, allow_nan=False)


def whole_lines(path: Path) -> tuple[list[tuple[int, bytes]], bytes]:
    """The lines of a metrics file with their steps, and what follows the last line break: a line cut short by a crash.

    A file that does not exist counts as empty.

    Raises:
      ValueError: a line, other than the last, that is not a JSON object with an integer `step`; names file and line.
      OSError: the file cannot be read.
    """
    if not path.exists():
        return [], b""
    *lines, torn = json_files.read_bytes(path).split(b"\n")
    result = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            row = json_files.loads(line, where)
        except ValueError as error:
            raise ValueError(f"{error}; delete the line to continue") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{where}: expected a JSON object with an integer `step`; delete the line to continue")
        result.append((row["step"], line))
    return result, torn


def truncate(path: Path, last_step: int) -> int:
    """Drops the lines of steps after `last_step`, and a torn last line, from a metrics file; returns how many.

    The file is replaced in one move, so that a crash leaves either the old or the new one. A file that does not
    exist counts as empty.

    Raises:
      ValueError, OSError: as `whole_lines`.
    """
    lines, torn = whole_lines(path)
    kept = [line for step, line in lines if step <= last_step]
    dropped = len(lines) - len(kept) + bool(torn)
    if dropped:
        with replacing(path, durable=True) as fresh:
            fresh.write_bytes(b"".join(line + b"\n" for line in kept))
    return dropped


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, as written (non-finite values are None).

    Raises:
      ValueError: a line is not JSON; names file and line.
      OSError: the file cannot be read.
    """
    lines = json_files.read_bytes(path).splitlines()
    return [json_files.loads(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


SINKS: dict[str, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoardSink,
    "trackio": TrackioSink,
    "wandb": WandbSink,
}


class MetricWriter:
    """Writes metrics of training and evaluation steps, and tables of completions.

    A disk that is full does not end the run: lines wait in memory until they can be written, which is noted once. A
    sink that fails is noted and left out from then on.

    Args:
      workdir: folder of the run; made if it does not exist.
      resume_step: last step that counts; None: a fresh run. Lines of later steps are dropped from metrics.jsonl, and
        sinks forget them or do not take them again, so that no step is there twice. Before a fresh run, a file with the
        steps of an earlier one is kept as `metrics-N.jsonl`.
      progress: console; None: silent.
      primary: False on all processes but one: nothing is written.
      sinks: names in `SINKS`.
      settings: the run's, for sinks that store them.

    Raises:
      ValueError, OSError: metrics.jsonl is invalid, or cannot be written; as `whole_lines`.

    Several writes of one step (training, then evaluation) make several lines with that step and different keys.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        progress: Progress | None = None,
        primary: bool = True,
        sinks: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._progress = progress if primary else None
        self._file: int | None = None
        self._sinks: list[Sink] = []
        self._waiting = bytearray()
        if not primary:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        if resume_step is None:
            _keep(self._path)
        last_step = -1 if resume_step is None else resume_step
        truncate(self._path, last_step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for name in sinks:
            try:
                self._sinks.append(SINKS[name](folder, last_step, settings or {}))
            except Exception as error:  # of many types, as the sink's library has them
                self._note(f"{name}: {_reason(error)}; the run continues without it")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics of a step. Values: numbers, and arrays without axes.

        Raises:
          ValueError: as `to_json_line`; nothing is written then.
        """
        if self._file is None:
            return
        line = to_json_line(step, metrics)
        numbers = {name: float(value) for name, value in metrics.items()}
        if not self._path.exists():
            self._begin_again(step)
        fine = not self._waiting
        self._waiting += line.encode() + b"\n"
        trouble = self._flush()
        if trouble is not None and fine:
            self._note(f"{self._path}: {trouble.strerror}; metrics wait in memory until it can be written")
        self._to_sinks(lambda sink: sink.write(int(step), numbers))
        if self._progress is not None:
            self._progress.show(int(step), numbers)

    def show(self, step: int, rows: Sequence[Completion]) -> None:
        """Writes a table of completions as HTML and to the sinks; nothing where there are no rows."""
        if self._file is None or not rows:
            return
        try:
            write_completions(self._path.parent, step, rows, read_metrics(self._path))
        except (OSError, ValueError) as error:
            self._note(f"completions of step {step}: {_reason(error)}; continuing without them")
        self._to_sinks(lambda sink: sink.show(step, rows))

    def _to_sinks(self, call: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except Exception as error:  # of many types, as the sink's library has them
                self._sinks.remove(sink)
                self._note(f"{sink.name}: {_reason(error)}; it ends here, {METRICS_FILE} continues")

    def _begin_again(self, step: int) -> None:
        """Makes a deleted file again, unless its folder is gone too, which ends the run elsewhere."""
        assert self._file is not None
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            return
        os.close(self._file)
        self._file = file
        self._note(f"{self._path} was deleted; it begins again with step {step}")

    def _flush(self) -> OSError | None:
        assert self._file is not None
        try:
            while self._waiting:
                # A line may be written in part; then its rest is written next.
                del self._waiting[: os.write(self._file, self._waiting)]
        except OSError as error:
            return error
        return None

    def _note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)

    def close(self) -> None:
        """Flushes everything to disk, and notes what could not be written."""
        if self._file is not None:
            trouble = self._flush()
            if trouble is not None:
                lost = self._waiting.count(b"\n")
                self._note(f"{self._path}: {trouble.strerror}; the last {lost} lines are lost")
            os.close(self._file)
            self._file = None
        for sink in self._sinks:
            with contextlib.suppress(Exception):
                sink.close()
        self._sinks = []
        if self._progress is not None:
            self._progress.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


def _keep(path: Path) -> None:
    """Moves a file that is not empty to `NAME-N` with the first number that is free."""
    if path.is_file() and path.stat().st_size:
        names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
        os.replace(path, next(name for name in names if not name.exists()))
