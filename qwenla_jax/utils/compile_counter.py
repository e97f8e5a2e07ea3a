"""Counts compilations: after warm-up there should be none, whatever the images' sizes."""

from __future__ import annotations

from types import TracebackType

import jax.monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the programs that XLA compiles while the `with` block runs, in any thread of the process.

    A program that comes from JAX's compilation cache on disk counts too: it was not in memory.

    Attributes:
      count: programs so far; it stays readable after the block.
      seconds: time spent on them, wall-clock.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs

    def __enter__(self) -> CompileCounter:
        """Starts to count, from where an earlier block of the same counter ended."""
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
