"""Computes rewards in separate processes, so that none of them can stop a run."""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Self

from qwenla_jax.rewards.pool.link import Link, exchange
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardScores, RewardSettings, combine

_CHUNK = 16  # records that one executor works through; does not depend on the number of workers, nor do the scores
_STOP_S = 1.0  # how long a worker may take to end its executor before it is killed itself


@dataclasses.dataclass(frozen=True)
class RewardError:
    """Why a response has no reward.

    Attributes:
      kind: `timeout` (took too long), `crash` (its process ended, or sent an invalid message), `raised`
        (raised an exception) or `value` (returned no finite number).
      name: the reward, as `RewardSettings.weights` names it; "" where it is not known: the step's deadline passed, or
        the worker itself ended.
      message: what happened; of an exception its type and text, cut to 300 characters.
      traceback: of an exception, through the reward's own code, at most 4,000 characters; else "".
    """

    kind: str
    name: str
    message: str
    traceback: str = ""


class RewardPool:
    """Computes rewards in worker processes that are watched, killed and replaced.

    A reward that hangs, crashes, raises or returns no number fails for its own record only. Values are those of
    `weights.score`, whatever the number of workers, provided that a user's reward depends on its record alone: its
    process computes at most 16 records and then ends, with everything that it has changed. Its output goes to
    /dev/null. JAX, where a reward imports it, sees the CPU only.

    The processes end when this one does, however it ends, and do not receive the terminal's Ctrl-C. On systems other
    than Linux, grandchildren that a reward moves to a session of their own may outlive it.

    Not thread-safe. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        settings: RewardSettings,
        *,
        workers: int = 2,
        deadline_s: float = 5.0,
        step_deadline_s: float = 60.0,
        start_deadline_s: float = 60.0,
        memory_mb: int = 4096,
    ) -> None:
        """Starts the workers and has each import the user's rewards.

        Modules are searched in the working directory and then in this process's `sys.path`.

        Args:
          settings: weights, options and the user's rewards.
          workers: number of processes.
          deadline_s: seconds for all rewards of one record together.
          step_deadline_s: seconds for one call of `score`.
          start_deadline_s: seconds for importing the user's rewards.
          memory_mb: MiB of address space that a reward's process may take beyond what it starts with.

        Raises:
          ValueError: an argument is out of range; or a reward cannot be imported, is not callable, does not take one
            argument, or was not imported in time. The message names it.
        """
        numbers = {"workers": workers, "memory_mb": memory_mb}
        seconds = {"deadline_s": deadline_s, "step_deadline_s": step_deadline_s, "start_deadline_s": start_deadline_s}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r}; want a whole number of at least 1")
        for name, value in seconds.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value!r}; want a positive finite number of seconds")
        self._settings = settings
        self._names = tuple(settings.weights())
        self._num_workers = workers
        self._step_deadline_s = step_deadline_s
        self._options = {
            "deadline_s": float(deadline_s),
            "start_deadline_s": float(start_deadline_s),
            "memory_mb": memory_mb,
            "pool": os.getpid(),
        }
        self._closed = False
        self._links: list[Link] = []
        self._start_trouble = ""
        try:
            self._fill()
            if not self._links:
                raise ValueError(f"workers: {self._start_trouble}")
            while any(link.starting for link in self._links):
                exchange(self._links, time.monotonic() + start_deadline_s)
                for link in self._links:
                    link.take()
                    if (trouble := link.trouble()) is not None:
                        raise ValueError(trouble)
        except BaseException:
            self.close()
            raise

    def score(self, records: Sequence[RewardRecord]) -> list[RewardScores | RewardError]:
        """The scores of each record, or why it has none, in order; takes at most `step_deadline_s` and a moment.

        Raises:
          ValueError: the pool is closed.
        """
        if self._closed:
            raise ValueError("the reward pool is closed")
        step = _Step(records, self._settings, self._names)
        until = time.monotonic() + self._step_deadline_s
        try:
            self._fill()
            exchange(self._links, 0.0)  # a worker may have ended since the last call
            while step.left:
                for link in list(self._links):
                    step.book(link, link.take())
                    if (trouble := link.trouble()) is not None:
                        self._replace(step, link, trouble)
                    elif not (link.starting or link.items) and step.pending:
                        link.send(step.pending.popleft(), records)
                if not self._links:
                    step.fail_rest("crash", f"no reward worker could be started: {self._start_trouble}")
                elif step.left and time.monotonic() >= until:
                    step.fail_rest("timeout", f"the step's {self._step_deadline_s:g} s were over")
                elif step.left:
                    exchange(self._links, until)
        finally:
            # Workers that still work are late, or the call was interrupted: their answers are dropped.
            self._drop([link for link in self._links if link.items])
            self._fill()
        return step.results()

    def close(self) -> None:
        """Ends all processes, in about two seconds at most. May be called again."""
        self._closed = True
        self._drop(list(self._links))

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the pool."""
        self.close()

    def _fill(self) -> None:
        """Starts the workers that are missing, without waiting for them."""
        try:
            while len(self._links) < self._num_workers:
                self._links.append(Link(self._settings, self._options))
        except OSError as error:
            self._start_trouble = f"no process for a reward worker: {error}"

    def _replace(self, step: "_Step", link: Link, message: str) -> None:
        """Replaces a worker and finds the record that ended it, if one did."""
        if len(link.chunk) == 1 and link.items:
            step.fail(link.items[0], "crash", message)
        else:
            # Unsent values are lost, so which record it was is not known. The records without a result are tried once
            # more, each in its own chunk, which isolates the failing one.
            step.pending.extendleft([index] for index in reversed(link.items))
        self._drop([link])
        if link.starting:
            self._start_trouble = message  # a failed start is not tried again before the next call
        else:
            self._fill()

    def _drop(self, links: Sequence[Link]) -> None:
        self._links = [link for link in self._links if link not in links]
        for link in links:
            link.hang_up()
        until = time.monotonic() + _STOP_S
        for link in links:
            link.stop(until)


class _Step:
    """The records of one call of `score`.

    Attributes:
      left: how many have no result yet.
      pending: chunks of indices that no worker has yet.
    """

    def __init__(self, records: Sequence[RewardRecord], settings: RewardSettings, names: Sequence[str]) -> None:
        self._records, self._settings, self._names = records, settings, names
        self._results: list[RewardScores | RewardError | None] = [None] * len(records)
        self.left = len(records)
        indices = range(len(records))
        self.pending = deque(list(indices[first : first + _CHUNK]) for first in indices[::_CHUNK])

    def book(self, link: Link, messages: Iterable[list[Any]]) -> None:
        """Enters a worker's answers."""
        for kind, item, *rest in messages:
            if not link.items or item != len(link.chunk) - len(link.items):
                link.invalid = "the reward worker answered out of turn"
                return
            index = link.items[0]
            if kind == "error":
                self.fail(index, *rest, name=self._names[len(link.values)])
            else:
                link.values[self._names[len(link.values)]] = rest[0]
                if len(link.values) == len(self._names):
                    self._set(index, combine(self._records[index], link.values, self._settings))
            if self._results[index] is not None:
                link.items.popleft()
                link.values = {}

    def fail(self, index: int, kind: str, message: str, traceback: str = "", name: str = "") -> None:
        """Enters an error."""
        self._set(index, RewardError(kind, name, message, traceback))

    def fail_rest(self, kind: str, message: str) -> None:
        """Enters the same error for all that have no result yet."""
        for index, result in enumerate(self._results):
            if result is None:
                self.fail(index, kind, message)

    def results(self) -> list[RewardScores | RewardError]:
        """All results."""
        return [result for result in self._results if result is not None]

    def _set(self, index: int, result: RewardScores | RewardError) -> None:
        self._results[index] = result
        self.left -= 1
