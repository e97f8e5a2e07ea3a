"""Before the first step: are images of the evaluation in the training data?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.contamination import LeakReport, file_leaks, find_leaks, take_fingerprints
from qwenla_jax.data.sources.factory import sources_of
from qwenla_jax.data.sources.splits import SelectedRecords


def guard_against_leaks(
    options: RunOptions, source: RecordSource, held_out: RecordSource, note: Callable[[str], None]
) -> None:
    """Checks, before a run's first step, whether images of its evaluation are in its training data.

    `config.data.leaks` is what happens then: "warn", "refuse" or "ignore".

    Args:
      options: the run's settings.
      source, held_out: its questions.
      note: called with each warning.

    Raises:
      ValueError: there are such images, and the setting is "refuse".
    """
    how = options.data.leaks
    if how == "ignore":
        return
    size = max(options.eval.final_size, options.eval.size if options.eval.every else 0)
    for report in leak_reports(selected_parts(source), selected_parts(held_out), size, by_content=how == "refuse"):
        if not report.leaks:
            continue
        message = report.text(most=3)
        if how == "refuse":
            raise ValueError(f"config.data.leaks=refuse: {message}")
        note(f"warning: {message}\n(train.py --check_data compares more; config.data.leaks: refuse, ignore)")


def selected_parts(source: RecordSource) -> list[SelectedRecords]:
    """The parts of a source that come from files."""
    return [part for part in sources_of(source).values() if isinstance(part, SelectedRecords)]


def leak_reports(
    trained: Sequence[SelectedRecords], evaluated: Sequence[SelectedRecords], size: int, by_content: bool
) -> Iterable[LeakReport]:
    """Compares every part of the training data with the first `size` records of every part of the evaluation."""
    if not by_content:
        yield from (file_leaks(one, other, size) for one in trained for other in evaluated)
    elif evaluated:
        others = [take_fingerprints(part, f"evaluation {part.name}", size=size) for part in evaluated]
        for part in trained:
            prints = take_fingerprints(part, f"training {part.name}")
            yield from (find_leaks(prints, other) for other in others)
