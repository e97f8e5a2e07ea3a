"""Metrics of a run: one JSON object a step in `metrics.jsonl`, TensorBoard event files, and the console."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import replacing
from qwenla_jax.utils.progress import Progress

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def to_json_line(step: int, metrics: Mapping[str, Any]) -> str:
    """One line of valid JSON without its line break: `step` first, then the metrics in their order.

    JSON has no nan and no infinities. Such a metric is null, and `nonfinite` has its value: "nan", "inf", "-inf".

    Raises:
      ValueError: a metric that is not one number, or is called `step` or `nonfinite`.
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


def _summary_writer() -> type[SummaryWriter]:
    """tensorboardX's writer, without torch, whose import takes seconds and which scalars do not need."""
    without_torch = "torch" not in sys.modules and "tensorboardX" not in sys.modules
    if without_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if without_torch:
            del sys.modules["torch"]
    return SummaryWriter


def whole_lines(path: Path) -> tuple[list[tuple[int, bytes]], bytes]:
    """The lines of a metrics file with their steps, and what follows the last line break, cut short by a crash.

    A missing file counts as empty.

    Raises:
      ValueError: a line, other than the last, that is not a JSON object with an integer `step`; names file and line.
      OSError: the file cannot be read.
    """
    if not path.exists():
        return [], b""
    *lines, torn = json_files.read_bytes(path).split(b"\n")
    parsed = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            row = json_files.loads(line, where)
        except ValueError as error:
            raise ValueError(f"{error}; delete the line to continue") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{where}: expected a JSON object with an integer `step`; delete the line to continue")
        parsed.append((row["step"], line))
    return parsed, torn


def truncate(path: Path, last_step: int) -> int:
    """Drops the lines of steps after `last_step`, and a torn last line, from a metrics file; returns how many.

    The file is replaced atomically, so that a crash leaves either the old or the new one. A missing file counts as
    empty.

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
      ValueError: a line is no JSON; names file and line.
      OSError: the file cannot be read.
    """
    lines = json_files.read_bytes(path).splitlines()
    return [json_files.loads(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


class MetricWriter:
    """Writes metrics of training and evaluation steps.

    A failed write does not end the run: lines are buffered in memory until a write succeeds, which is noted once, and
    TensorBoard is closed.

    Args:
      workdir: folder of the run; made if it does not exist.
      resume_step: last step that counts; None: a new run. Lines of later steps are dropped from metrics.jsonl, and
        purged from TensorBoard, so that no step is there twice. Before a new run, a file with the steps of an earlier
        one is renamed to `metrics-N.jsonl`.
      progress: console; None: silent.
      primary: False on all processes but one: nothing is written.

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
    ) -> None:
        self._progress = progress if primary else None
        self._file: int | None = None
        self._board: SummaryWriter | None = None
        self._pending = bytearray()
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
        board = folder / TENSORBOARD_FOLDER
        earlier = board.is_dir() and any(board.iterdir())
        # The writer names its file by the second: a restart in the same second must not reuse the name. Its thread dies
        # at the first error, and a full queue would then block: the queue has room for more than a step's metrics.
        self._board = _summary_writer()(
            str(board),
            purge_step=last_step + 1 if earlier else None,
            filename_suffix=f".{time.time_ns()}",
            max_queue=10_000,
        )

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
        fine = not self._pending
        self._pending += line.encode() + b"\n"
        trouble = self._flush()
        if trouble is not None and fine:
            self._note(f"{self._path}: {trouble.strerror}; metrics wait in memory until it can be written")
        if self._board is not None:
            try:
                for name, number in numbers.items():
                    self._board.add_scalar(name, number, int(step))
                self._board.flush()
            except OSError as error:
                self._board = None
                self._note(f"TensorBoard's file: {error.strerror}; it ends here, {METRICS_FILE} continues")
        if self._progress is not None:
            self._progress.show(int(step), numbers)

    def _begin_again(self, step: int) -> None:
        """Makes the file again after it was deleted; does nothing where its folder is gone too."""
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
            while self._pending:
                # Written bytes are removed, so that the rest of a line comes next.
                del self._pending[: os.write(self._file, self._pending)]
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
                lost = self._pending.count(b"\n")
                self._note(f"{self._path}: {trouble.strerror}; the last {lost} lines are lost")
            os.close(self._file)
            self._file = None
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = None
        if self._progress is not None:
            self._progress.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keep(path: Path) -> None:
    """Moves a file that is not empty to `NAME-N` with the first number that is free."""
    if path.is_file() and path.stat().st_size:
        numbers = itertools.count(1)
        os.replace(path, next(p for n in numbers if not (p := path.with_stem(f"{path.stem}-{n}")).exists()))
