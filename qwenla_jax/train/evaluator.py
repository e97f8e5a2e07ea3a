"""Evaluations of a run, saved so that the ones before and after can be compared question by question."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.parallel.distributed import broadcast, is_primary
from qwenla_jax.run.checkpoints import Checkpoints
from qwenla_jax.run.metrics import MetricWriter
from qwenla_jax.train.evaluation import AttentionProbe, Evaluation, evaluate
from qwenla_jax.train.stage import CheckStop
from qwenla_jax.train.train_runtime import TrainRuntime
from qwenla_jax.utils.intervals import paired
from qwenla_jax.utils.progress import Progress


def write_optional(write: Callable[[], None], progress: Progress) -> None:
    """Writes a file that the run does not need: an OSError is noted and does not end the run."""
    if not is_primary():
        return
    try:
        write()
    except OSError as error:
        progress.note(f"{error.filename}: {error.strerror}; continuing without it")


class Evaluator:
    """Evaluates, and saves each question's answer, so that before and after can be compared by question."""

    def __init__(
        self,
        runtime: TrainRuntime,
        source: RecordSource,
        workdir: Path,
        writer: MetricWriter,
        progress: Progress,
        checkpoints: Checkpoints,
        check_stop: CheckStop,
    ) -> None:
        self._runtime = runtime
        self._checkpoints, self._check_stop = checkpoints, check_stop
        self._folder = workdir / "evaluations"
        self._writer, self._progress = writer, progress
        self._source = source
        self._sampler = Sampler(runtime, runtime.sample_options(group_size=1, temperature=0.0))
        self._probe = AttentionProbe(runtime) if runtime.options.eval.attention else None

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.json"

    def __call__(self, params: Any, step: int, size: int) -> None:
        """Evaluates after `step` steps on the first `size` held-out questions."""
        self._check_stop("evaluation")
        begin = time.perf_counter()
        result = evaluate(self._runtime, self._sampler, params, self._source, size, self._probe, self._check_stop)
        seconds = time.perf_counter() - begin
        write_optional(lambda: result.write(self._path(step)), self._progress)
        if step:
            self._checkpoints.rate(step, result.accuracy.share)
        self._writer.write(step, result.metrics() | {"eval/timing_s": seconds})
        kinds = ", ".join(f"{kind} {part.share:.1%}" for kind, part in result.by_kind().items())
        self._progress.note(f"held out, {len(result.right)} questions: accuracy {result.accuracy} ({kinds})")

    def again(self, params: Any, step: int) -> None:
        """The evaluation after `step` steps, unless its file exists."""
        if not broadcast(self._path(step).is_file):
            self(params, step, self._runtime.options.eval.size)

    def final(self, params: Any, step: int) -> None:
        """The evaluation before or after the run, unless its file exists from before an interruption."""
        size = min(self._runtime.options.eval.final_size, len(self._source))
        path = self._path(step)
        least = size - self._runtime.options.data.max_invalid

        def there() -> bool:
            try:
                return step > 0 and path.is_file() and least <= len(Evaluation.read(path).ids) <= size
            except (ValueError, OSError) as error:
                self._progress.note(f"{error}; it is evaluated again")
                return False

        if size and not broadcast(there):
            self(params, step, size)

    def compare(self, steps: int) -> dict[str, Any]:
        """Compares before and after on the same questions, where both were evaluated."""
        first, last = self._path(0), self._path(steps)
        if not (is_primary() and first.is_file() and last.is_file()):
            return {}
        try:
            before, after = Evaluation.read(first), Evaluation.read(last)
        except (ValueError, OSError) as error:
            self._progress.note(f"{error}; before and after are not compared")
            return {}
        if before.ids != after.ids:
            return {}
        test = paired(before.right, after.right)
        self._progress.note(
            f"accuracy before {before.accuracy}, after {after.accuracy}: {test.difference:+.1%}, "
            f"{test.gained} gained, {test.lost} lost, McNemar p = {test.p_value:.2g}"
        )
        return {"accuracy_before": before.accuracy, "accuracy_after": after.accuracy, "paired": test}
