"""Computes rewards in separate processes, so that none of them can stop a run."""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardScores, RewardSettings

GRACE_S = 5.0  # how long after a record's deadline the fork server may still answer
_CHUNK = 16  # records that one worker works through; does not depend on the number of workers, nor do the scores
_STOP_S = 1.0  # how long the fork server may take to end its workers before it is killed itself


@dataclasses.dataclass(frozen=True)
class RewardError:
    """Why a response has no reward.

    Attributes:
      kind: `timeout` (took too long), `crash` (its process ended, or sent an invalid message), `raised`
        (raised an exception) or `value` (returned no finite number).
      name: the reward, as `RewardSettings.weights` names it; "" where it is not known: the step's deadline passed, or
        there was no process for it, or it ended the fork server.
      message: what happened; of an exception its type and text, cut to 300 characters.
      traceback: of an exception, through the reward's own code, at most 4,000 characters; else "".
    """

    kind: str
    name: str
    message: str
    traceback: str = ""


class RewardPool(contextlib.AbstractContextManager["RewardPool"]):
    """Computes rewards in worker processes that are watched, killed and replaced.

    A reward that hangs, crashes, raises or returns no number fails for its own record only. Values are those of
    `weights.score`, whatever the number of workers, provided that a user's reward depends on its record alone: its
    process computes at most 16 records and then ends, with everything that it has changed. Its output goes to
    /dev/null. JAX, where a reward imports it, sees the CPU only.

    The processes end when this one does, however it ends, and do not receive the terminal's Ctrl-C. On systems other
    than Linux, processes may outlive it that a reward moves to a session of their own, or whose fork server a reward
    kills.

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
        """Starts the fork server, which imports the user's rewards.

        Modules are searched in the working directory and then in this process's `sys.path`.

        Args:
          settings: weights, options and the user's rewards.
          workers: number of processes that compute rewards at a time.
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
        for name, value in (numbers | seconds).items():
            if isinstance(value, bool) or (name in numbers and not isinstance(value, int)) or not 0 < value < math.inf:
                want = "whole number" if name in numbers else "finite number of seconds"
                raise ValueError(f"{name}: {value!r}; want a positive {want}")
        self._settings, self._num_workers, self._step_deadline_s = settings, workers, step_deadline_s
        self._options = numbers | seconds | {"trainer": os.getpid()}
        self._closed = False
        self._server: _Server | None = None
        try:
            self._start().ready(math.inf)
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
        results: dict[int, RewardScores | RewardError] = {}
        until = time.monotonic() + self._step_deadline_s
        alone = False  # records that may have ended the fork server run one by one, so that the one that does is known
        try:
            while len(results) < len(records) and time.monotonic() < until:
                left = [(index, record) for index, record in enumerate(records) if index not in results]
                try:
                    server = self._start()
                    ready = server.ready(until)
                except _ServerError as error:
                    self._stop()
                    crash = RewardError("crash", "", f"no fork server for the rewards could be started: {error}")
                    results |= dict.fromkeys((index for index, _ in left), crash)
                    break
                if alone := alone or len(left) == 1:
                    chunks = [[pair] for pair in left[: self._num_workers * _CHUNK]]
                else:
                    chunks = [list(pairs) for _, pairs in itertools.groupby(left, lambda pair: pair[0] // _CHUNK)]
                try:
                    for index, outcome in server.run(chunks, 1 if alone else self._num_workers, until) if ready else ():
                        results[index] = outcome
                    alone = False
                except _ServerError as error:
                    self._stop()
                    if alone:
                        culprit = next(index for index, _ in left if index not in results)
                        results[culprit] = RewardError("crash", "", str(error))
                    alone = True
        finally:
            if len(results) < len(records) and self._server is not None and self._server.is_ready:
                # The step's time is over, or the call was interrupted. The next call need not wait for imports.
                self._stop()
                with contextlib.suppress(_ServerError):
                    self._start()
        late = RewardError("timeout", "", f"the step's {self._step_deadline_s:g} s were over")
        return [results.get(index, late) for index in range(len(records))]

    def close(self) -> None:
        """Ends all processes, in about two seconds at most. May be called again."""
        self._closed = True
        self._stop()

    def __exit__(self, *exception: object) -> None:
        """Closes the pool."""
        self.close()

    def _start(self) -> "_Server":
        """The running fork server, or a new one, which may not be ready yet. Raises _ServerError."""
        if self._server is not None and self._server.ended():
            self._stop()
        if self._server is None:
            self._server = _Server(self._settings, self._options)
        return self._server

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


class _ServerError(ValueError):
    """The fork server must be replaced; the text says why."""


class _Server:
    """The fork server, as seen from the pool; `fork_server` has its messages.

    Attributes:
      is_ready: it has imported the rewards.
    """

    def __init__(self, settings: RewardSettings, options: dict[str, Any]) -> None:
        """Starts it. Raises _ServerError where the system has no process for it."""
        self.is_ready, self._doing = False, "starting"
        self._options = options
        self._heard = time.monotonic()
        path = [os.getcwd(), *(entry or os.getcwd() for entry in sys.path if isinstance(entry, str))]
        # JAX in a worker must not take the trainer's accelerator. Hashes of texts, and so the order of sets,
        # are the same in all fork servers.
        env = {"PYTHONHASHSEED": "0", **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
        ours, theirs = socket.socketpair()
        with theirs:
            # A fork server that was stopped within a message must not block this process.
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", math.ceil(GRACE_S), 0))
            self._pipe = Connection(ours.detach())
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", "from qwenla_jax.rewards.pool.fork_server import main; main()"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    env=env,
                )
            except OSError as error:
                raise _ServerError(f"no process for it: {error}") from error
        with contextlib.suppress(OSError):  # where it has ended, which `ready` will detect
            self._pipe.send((settings, options))

    def ready(self, until: float) -> bool:
        """Waits until it has imported the rewards; False where it has not by then. Raises _ServerError."""
        while not self.is_ready:
            if self._receive(until) is None:
                return False
        return True

    def run(self, chunks: list[Any], workers: int, until: float) -> Iterator[tuple[int, RewardScores | RewardError]]:
        """Has chunks of (index, record) scored; yields results as they come, until that time. Raises _ServerError."""
        self._heard = time.monotonic()
        with contextlib.suppress(OSError):  # where it has ended or does not read, which `_receive` will detect
            self._pipe.send((workers, chunks))
        for _ in range(sum(map(len, chunks))):
            if (answer := self._receive(until)) is None:
                return
            yield answer

    def ended(self) -> bool:
        """Whether it has ended since the last call: it sends nothing else unasked."""
        return self.is_ready and self._pipe.poll(0)

    def stop(self) -> None:
        """Waits a moment for its end, and kills it after that."""
        self._pipe.close()
        self._process.send_signal(signal.SIGCONT)  # where a reward has stopped it
        try:
            ended_itself = self._process.wait(_STOP_S) == 0
        except subprocess.TimeoutExpired:
            ended_itself = False
        if not ended_itself:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)

    def _receive(self, until: float) -> Any:
        """Its next message; None where there is none by then. Raises _ServerError."""
        limit_s = self._options["deadline_s"] + GRACE_S if self.is_ready else self._options["start_deadline_s"]
        late = self._heard + limit_s
        try:
            wait_s = max(0.0, min(until, late) - time.monotonic())
            message = self._pipe.recv() if self._pipe.poll(min(wait_s, 1e6)) else None  # it takes no longer times
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            status = self._process.returncode
            raise _ServerError(f"{self._doing} ended the rewards' fork server, exit status {status}") from None
        except Exception as error:
            raise _ServerError(f"the answer of the rewards' fork server is garbled: {error!r:.100}") from error
        if message is None and time.monotonic() >= late:
            raise _ServerError(f"{self._doing} took the rewards' fork server more than {limit_s:g} s")
        self._heard = time.monotonic()
        match message:
            case "failed", text:
                raise _ServerError(text)
            case "loading", spec:
                self._doing = f"importing {spec!r}"
            case "ready", _:
                self.is_ready, self._doing = True, "computing a reward"
        return message
