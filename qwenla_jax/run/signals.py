"""Ends a run on SIGTERM or SIGINT: at the next safe point, and at once on a second signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from qwenla_jax.parallel.distributed import gather

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run ended on request, and can be resumed; `number` is the signal's."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Interrupt:
    """While it is entered, SIGTERM and SIGINT ask the run to end at its next safe point.

    Python runs signal handlers between two instructions only, and a compilation or a rollout is one instruction. So a
    thread reads the signals: the first is noted at once, the second ends the process at once with status 128 + its
    number, whatever the main thread does.

    Entered outside of the main thread, it does nothing.

    Args:
      note: called with a message at the first signal.
    """

    def __init__(self, note: Callable[[str], None] = lambda text: None) -> None:
        self._note = note
        self._number: int | None = None
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> int | None:
        """The number of the first signal, None where there was none."""
        return self._number

    def check(self, where: str = "") -> None:
        """A safe point. Raises Stopped where the run was asked to end; of several processes, where any of them was."""
        number = max(gather(self._number or 0))
        if number:
            raise Stopped(number, f"{signal.Signals(number).name}{f' {where}' if where else ''}")

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # The wake-up byte is only written for signals that have a handler in Python.
            self._before[number] = signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while data := os.read(self._read, 64):
            for number in data:
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                if self._number is not None:
                    os._exit(128 + number)
                self._number = number
                name = signal.Signals(number).name
                self._note(f"{name}: ending at the next safe point, with a checkpoint; once more ends at once")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        self._thread = None
