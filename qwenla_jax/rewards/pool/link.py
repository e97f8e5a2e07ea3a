"""One worker process, as seen from the pool that started it."""

import contextlib
import dataclasses
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from qwenla_jax.rewards.pool.protocol import Lines, pack
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardSettings

GRACE_S = 5.0  # how long after a record's deadline a worker may still answer
_LAST_WORDS_S = 1.0  # how long a process may take to end once its pipes have, or once it is killed
_MAX_WAIT_S = 3600.0  # `poll` takes no longer times


class Link:
    """A worker process.

    Attributes:
      starting: it is not ready yet.
      chunk: indices of the last records sent.
      items: those of them without an answer.
      values: components of the first of `items` so far.
      invalid: what is wrong with its messages, None where nothing is.
    """

    def __init__(self, settings: RewardSettings, options: dict[str, Any]) -> None:
        """Starts a worker. Raises OSError where the system has no process for it."""
        self.starting = True
        self.chunk: list[int] = []
        self.items: deque[int] = deque()
        self.values: dict[str, float] = {}
        self.invalid: str | None = None
        self._loading = ""
        self._executor: int | None = None
        self._options = options
        self._heard = time.monotonic()
        path = [entry or os.getcwd() for entry in sys.path if isinstance(entry, str)]
        # JAX in a worker must not take the trainer's accelerator. Hashes of texts, and so the order of sets,
        # are the same in all workers.
        env = {"PYTHONHASHSEED": "0"} | os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwenla_jax.rewards.pool.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=env,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        for file in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(file.fileno(), False)
        self._lines = Lines(self._stdout.fileno())
        self._unsent = bytearray(pack([dataclasses.asdict(settings), options]))

    @property
    def patience(self) -> float:
        """The time by which it must answer, as of `time.monotonic()`."""
        if self.starting:
            return self._heard + self._options["start_deadline_s"]
        return self._heard + self._options["deadline_s"] + GRACE_S if self.items else float("inf")

    def send(self, chunk: list[int], records: Sequence[RewardRecord]) -> None:
        """Sends a chunk."""
        self.chunk, self.items, self.values, self._heard = chunk, deque(chunk), {}, time.monotonic()
        self._unsent += pack([records[index].to_json() for index in chunk])
        self.write()

    def files(self) -> dict[int, int]:
        """What to wait for: file descriptor -> events of `select.poll`."""
        return {self._lines.fd: select.POLLIN} | ({self._stdin.fileno(): select.POLLOUT} if self._unsent else {})

    def write(self) -> None:
        """Sends what the pipe takes now."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._stdin.fileno(), self._unsent[: 1 << 16])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()  # the worker has ended, which `read` will detect

    def read(self) -> None:
        """Reads its messages."""
        self._lines.read()
        self._heard = time.monotonic()

    def take(self) -> list[list[Any]]:
        """Its answers since the last call; other messages are handled here."""
        answers = []
        while self._lines.messages:
            match self._lines.messages.popleft():
                case ["value", int(), float()] | ["error", int(), str(), str(), str()] as answer:
                    answers.append(answer)
                case ["executor", int(pid)]:
                    self._executor = pid
                case ["loading", str(spec)]:
                    self._loading = spec
                case ["ready"]:
                    self.starting = False
                case ["refused", str(message)]:
                    self.invalid = message
                case other:
                    self.invalid = f"the reward worker said {other!r:.100}"
        return answers

    def trouble(self) -> str | None:
        """Why the worker must be replaced; None where it works."""
        if self.invalid or self._lines.fault:
            return self.invalid or f"the reward worker's output is garbled: {self._lines.fault}"
        doing = f"importing {self._loading!r}" if self._loading else "starting"
        if self._lines.ended:
            if not self.starting:
                return "the reward worker itself was ended"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_WORDS_S)
            stderr = (self._stderr.read() or b"").decode("utf-8", "replace").strip()[-300:]
            ended = f"{doing} ended the reward worker, exit status {self._process.returncode}"
            return f"{ended}; {stderr}" if stderr else ended
        if time.monotonic() < self.patience:
            return None
        if self.starting:
            return f"{doing} took the reward worker more than {self._options['start_deadline_s']:g} s"
        return "the reward worker itself does not answer"

    def hang_up(self) -> None:
        """Asks the worker to end, even where a reward has stopped it by a signal."""
        self._stdin.close()
        self._process.send_signal(signal.SIGCONT)

    def stop(self, until: float) -> None:
        """Waits for its end until then, and kills it after that."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        ended_itself = self._process.returncode == 0
        for pid in () if ended_itself else (self._process.pid, self._executor if self.items else None):
            if pid is not None:
                # Both lead process groups. The executor may survive the worker for a moment.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_S)
        self._stdout.close()
        self._stderr.close()


def exchange(links: Sequence[Link], until: float) -> None:
    """Waits until a worker can be read or written, or one is late, or `until`; then reads and writes."""
    poller = select.poll()
    owners: dict[int, tuple[Link, int]] = {}
    for link in links:
        for fd, events in link.files().items():
            poller.register(fd, events)
            owners[fd] = link, events
    wait_s = min([until, *(link.patience for link in links)]) - time.monotonic()
    for fd, _ in poller.poll(math.ceil(min(max(0.0, wait_s), _MAX_WAIT_S) * 1000)):
        link, events = owners[fd]
        link.read() if events == select.POLLIN else link.write()
