"""What the console shows of a run: one bar with the time left on a terminal, one line a step elsewhere."""

from __future__ import annotations

import fnmatch
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

# Shown when present, in this order; the rest is in metrics.jsonl. Names: metric -> console; a reward has its own name.
CONSOLE_METRICS = {
    "train/loss": "loss",
    "train/mean_token_probability": "token_p",
    "train/reward": "reward",
    "train/rewards/*/mean": "",
    "train/kl": "kl",
    "train/entropy": "entropy",
    "train/completions/mean_length": "length",
    "train/grad_norm": "grad",
    "eval/accuracy": "eval_accuracy",
    "eval/format": "eval_format",
}


def duration(seconds: float) -> str:
    """`41s`, `3:07` or `2:03:07`; `?` for what is not a finite number."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}" if minutes else f"{whole}s"


class Progress:
    """Shows steps as they finish.

    The time left comes from a moving average over steps; the first step after a start compiles, so it does not count.

    Args:
      total: steps of the whole run.
      start: steps already done when this process began (0, or the resumed step).
      stream: where to write; default standard output, looked up when constructed.
      terminal: whether the stream is a terminal; default: ask it.
      clock: seconds, monotonic; one that stands still during compilations leaves them out of the time left.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start = total, start
        self._stream = sys.stdout if stream is None else stream
        if terminal is None:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.terminal = terminal
        self._clock = clock
        self._seen = start
        self._last = clock()
        self._seconds_a_step = math.nan
        self._summary = ""
        self._drawn = 0

    def begin(self, done: int) -> None:
        """Steps that are done already, known only once the run's folder was read."""
        self._start = self._seen = done
        self._last = self._clock()

    def tick(self, step: int) -> None:
        """Step `step` (counted from 1) is done: advances the clock and, on a terminal, the bar."""
        now = self._clock()
        if step > self._seen:
            took = (now - self._last) / (step - self._seen)
            if self._seen > self._start:  # the first interval holds the compilation
                known = math.isfinite(self._seconds_a_step)
                self._seconds_a_step = 0.9 * self._seconds_a_step + 0.1 * took if known else took
            self._seen, self._last = step, now
        if self.terminal:
            self._draw()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step: beside the bar on a terminal, as a line elsewhere."""
        self.tick(step)
        pairs = [
            f"{short or name.split('/')[2]}={metrics[name]:.4g}"
            for pattern, short in CONSOLE_METRICS.items()
            for name in fnmatch.filter(metrics, pattern)
        ]
        if not self.terminal:
            self._stream.write(f"step {step}/{self._total}{self._timing()} {' '.join(pairs)}".rstrip() + "\n")
            self._stream.flush()
        elif any(name.startswith("eval/") for name in metrics):
            self.note(f"step {step}/{self._total} {' '.join(pairs)}")  # stays above the bar
        else:
            self._summary = " ".join(pairs)
            self._draw()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        self._stream.write(text + "\n")
        if self.terminal and self._seen > self._start:
            self._draw()
        self._stream.flush()

    def busy(self, text: str) -> None:
        """What the process is doing: in the place of the bar on a terminal, as a line elsewhere."""
        if self.terminal:
            self._overwrite(text)
        else:
            self.note(text)

    def close(self) -> None:
        """Leaves the bar as it stands and begins a new line."""
        if self.terminal and self._drawn:
            self._stream.write("\n")
            self._drawn = 0
        self._stream.flush()

    def eta(self) -> float:
        """Seconds left, nan before two steps are done."""
        return (self._total - self._seen) * self._seconds_a_step

    def _timing(self) -> str:
        if not math.isfinite(self._seconds_a_step):
            return ""
        return f" {self._seconds_a_step:.2f}s/step eta {duration(self.eta())}"

    def _draw(self) -> None:
        full = round(20 * self._seen / self._total) if self._total else 20
        self._overwrite(f"[{'#' * full}{'.' * (20 - full)}] {self._seen}/{self._total}{self._timing()} {self._summary}")

    def _overwrite(self, line: str) -> None:
        line = line[: shutil.get_terminal_size((100, 24)).columns - 1].rstrip()
        self._stream.write("\r" + line + " " * max(0, self._drawn - len(line)))
        self._drawn = len(line)
        self._stream.flush()

    def _clear(self) -> None:
        if self.terminal and self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0
