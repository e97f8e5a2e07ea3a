"""A thread that ends a stalled run and reports what it was doing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import jax

from qwenla_jax.parallel.distributed import is_multiprocess

STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed when it is tried again
REPORT = "stalled.txt"


class Watchdog:
    """While it is entered, `heartbeat` has to be called at least every `limit_s` seconds.

    Otherwise the stacks of all threads go to standard error and to `stalled.txt`, and the process ends with status 75.
    A run that hangs holds its machines and looks alive; one that ends can be started again from its last checkpoint.

    Args:
      workdir: where the report goes.
      limit_s: seconds; None: nothing is watched.
    """

    def __init__(self, workdir: Path, limit_s: float | None) -> None:
        self._workdir, self._limit = workdir, limit_s
        self._last, self._doing = time.monotonic(), "start"
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def heartbeat(self, doing: str) -> None:
        """Reports progress; from here on the run is busy with `doing`."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._limit is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._end.wait(min(self._limit / 4, 10.0)):
            still = time.monotonic() - self._last
            if still > self._limit:
                self._report(f"nothing has moved for {still:.0f} s while the run was busy with: {self._doing}")
                os._exit(STATUS)

    def _report(self, text: str) -> None:
        text = f"watchdog: {text} (config.guard.stall_s={self._limit:g}). What every thread was doing:\n"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        try:
            number = f"-{jax.process_index()}" if is_multiprocess() else ""
            with (self._workdir / REPORT).with_stem(Path(REPORT).stem + number).open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"watchdog: {self._workdir / REPORT}: {error}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
