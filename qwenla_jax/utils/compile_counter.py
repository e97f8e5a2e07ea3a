"""Counts compilations, and shows which phase of a run compiles."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

import jax.monitoring

from qwenla_jax.utils.progress import Progress, duration

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
HIT_EVENT, MISS_EVENT = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class CompileCounter:
    """Counts the programs that XLA compiles while the `with` block runs, in any thread of the process.

    A program that comes from JAX's compilation cache on disk counts too: it was not in memory.

    Attributes:
      count: programs so far; it stays readable after the block.
      seconds: time spent on them, wall-clock.
      hits, misses: how many came from the cache on disk, and how many were compiled and written to it.
    """

    def __init__(self) -> None:
        self.count = self.hits = self.misses = 0
        self.seconds = 0.0

    def _listen_to_cache(self, event: str, **kwargs: str | int) -> None:
        self.hits += event == HIT_EVENT
        self.misses += event == MISS_EVENT

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs

    def __enter__(self) -> CompileCounter:
        """Starts to count, from where an earlier block of the same counter ended."""
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._listen_to_cache)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
        jax.monitoring.unregister_event_listener(self._listen_to_cache)


class CompileNotes:
    """Shows on the console which phase of a run compiles, for how long so far, and what it took.

    Args:
      phases: those whose first call compiles.
      counter: entered by the run.
      progress: the console.
      every: seconds between two showings; default: 1 on a terminal, 60 elsewhere, where each is a line.
    """

    def __init__(
        self, phases: Sequence[str], counter: CompileCounter, progress: Progress, every: float | None = None
    ) -> None:
        self._left, self._total = list(phases), len(phases)
        self._counter, self._progress = counter, progress
        self._every = every or (1.0 if progress.terminal else 60.0)
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def begin(self, phase: str) -> None:
        """A phase begins, and the one before it has ended; the second time of a phase is not shown."""
        self.end()
        if phase in self._left:
            self._left.remove(phase)
            self._ended.clear()
            args = f"{phase} ({self._total - len(self._left)}/{self._total})", self._counter.count, self._counter.hits
            self._thread = threading.Thread(target=self._show, args=args, daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The phase has ended."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _show(self, title: str, count: int, hits: int) -> None:
        begin = time.monotonic()
        self._progress.busy(f"compiling {title} ...")
        while not self._ended.wait(self._every):
            self._progress.busy(f"compiling {title} ... {duration(time.monotonic() - begin)}")
        count, hits = self._counter.count - count, self._counter.hits - hits
        took = duration(time.monotonic() - begin)
        self._progress.note(f"compiled {title}: {count} programs, {hits} of them from the cache, in {took}")
