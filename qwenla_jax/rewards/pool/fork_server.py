"""The process that forks the workers of `pool.RewardPool`: it never imports jax, and has one thread.

It imports the user's rewards once, forks a worker for each chunk of records, and monitors it: where a record takes too
long or the worker dies, the worker's processes are killed, the record gets an error, and a new worker continues with
the next record. It ends when the pool does.

Its standard input is the socket to the pool. The pool sends the settings and the options, then for each step
`(number of workers, chunks of (index, record))`. It answers `("loading", spec)` before an import, `("ready", "")`, then
`(index, RewardScores or RewardError)` for every record; or `("failed", message)` before it ends by itself.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from qwenla_jax.rewards.pool.plugins import describe
from qwenla_jax.rewards.pool.pool import RewardError
from qwenla_jax.rewards.pool.worker import confinement, work
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardScores, RewardSettings, combine, rewards_of

_TICK_S = 0.05  # how often a silent worker is checked
_IDLE_TICK_S = 2.0  # how often an idle server checks that its trainer still runs
_END_S = 2.0  # processes that do not end within this time after SIGKILL hang in the kernel
_MAX_ANSWER = 1 << 16  # bytes

Chunk = list[tuple[int, RewardRecord]]


@dataclasses.dataclass
class _Worker:
    """A running worker."""

    pid: int
    chunk: Chunk  # records without an answer
    deadline: float  # when the first of them must have one
    values: list[float] = dataclasses.field(default_factory=list)  # the first one's so far
    leaving: bool = False  # it computes no more, whatever is left of the chunk, and may have left processes


def main() -> None:
    """Runs the server until the pool ends."""
    pool = Connection(os.dup(0))
    try:
        settings, options = pool.recv()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # until here an error of Python itself goes to the trainer's standard error
            os.dup2(null, fd)
        server = _ForkServer(settings, pool, options)
        pool.send(("ready", ""))
        server.run()
    except (EOFError, ConnectionError):
        pass  # the pool has ended
    except Exception as error:
        pool.send(("failed", str(error) if type(error) is ValueError else describe(error)))


class _ForkServer:
    def __init__(self, settings: RewardSettings, pool: Connection, options: Mapping[str, Any]) -> None:
        self._settings, self._pool, self._options = settings, pool, options
        # An import that hangs could not detect that the pool has ended.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(min(options["start_deadline_s"], 1e6)) + 1)
        self._rewards = rewards_of(settings, lambda spec: pool.send(("loading", spec)))
        signal.alarm(0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._names = tuple(self._rewards)
        self._confine = confinement(options["memory_mb"])
        self._preserved = _children()  # processes that the user's modules started when they were imported
        self._running: dict[Connection, _Worker] = {}

    def run(self) -> None:
        """Computes step after step. Raises EOFError or ConnectionError where the pool has ended."""
        num_workers, pending = 0, deque[Chunk]()
        try:
            while True:
                while pending and len(self._running) < num_workers:
                    self._fork(pending.popleft())
                ready = wait([self._pool, *self._running], _TICK_S if self._running else _IDLE_TICK_S)
                if os.getppid() != self._options["trainer"]:
                    return  # processes that the trainer forked hold the socket open after its end
                if self._pool in ready:
                    num_workers, chunks = self._pool.recv()
                    pending.extend(chunks)
                for answers, worker in list(self._running.items()):
                    self._hear(answers, worker)
                    if worker.leaving or not worker.chunk:
                        self._end(answers, worker.leaving)
                        if worker.chunk:
                            pending.appendleft(worker.chunk)
        finally:
            for answers in list(self._running):
                self._end(answers, leftovers=True)

    def _fork(self, chunk: Chunk) -> None:
        reading, writing = multiprocessing.Pipe(duplex=False)
        with writing:
            pid = os.fork()
            if pid == 0:
                try:
                    for private in (self._pool, reading, *self._running):
                        private.close()  # so that a reward cannot use it
                    self._confine()
                    work(list(self._rewards.values()), [record for _, record in chunk], writing)
                finally:
                    os._exit(0)
        self._running[reading] = _Worker(pid, chunk, time.monotonic() + self._options["deadline_s"])

    def _hear(self, answers: Connection, worker: _Worker) -> None:
        """Takes a worker's answers, and finds out whether it has to be ended."""
        kind, fault = "crash", _wait(worker.pid, 0.0)  # before its answers are read, so that none is missed
        try:
            while worker.chunk and not worker.leaving and answers.poll():
                match json.loads(answers.recv_bytes(_MAX_ANSWER)):
                    case [bool(leaving), float(value)] if math.isfinite(value):
                        worker.values.append(value)
                        if len(worker.values) == len(self._names):
                            values = dict(zip(self._names, worker.values, strict=True))
                            self._book(worker, combine(worker.chunk[0][1], values, self._settings))
                    case [bool(leaving), str(error), str(message), str(traceback)]:
                        self._book(worker, RewardError(error, self._names[len(worker.values)], message, traceback))
                    case other:
                        raise ValueError(f"{other!r:.100}")
                worker.leaving = leaving
        except EOFError:
            # Dead, or alive with its files closed; the kernel may need a moment to know which.
            fault = fault or _wait(worker.pid, 0.2) or "its process closed the file that it had to answer on"
        except (OSError, ValueError, RecursionError) as error:
            fault = f"its process sent what is no answer: {error}"[:300]
        if fault is None and time.monotonic() >= worker.deadline:
            kind, fault = "timeout", f"no answer within {self._options['deadline_s']:g} s"
        if fault is not None and worker.chunk and not worker.leaving:
            self._book(worker, RewardError(kind, self._names[len(worker.values)], fault))
            worker.leaving = True

    def _book(self, worker: _Worker, outcome: RewardScores | RewardError) -> None:
        """Sends the outcome of a worker's first record, and gives it the next one's time."""
        (index, _), *worker.chunk = worker.chunk
        worker.values, worker.deadline = [], time.monotonic() + self._options["deadline_s"]
        self._pool.send((index, outcome))

    def _end(self, answers: Connection, leftovers: bool) -> None:
        """Kills a worker and its group; with `leftovers` also its other descendants."""
        pid = self._running.pop(answers).pid
        answers.close()
        _kill(pid)
        _wait(pid, _END_S)
        give_up = time.monotonic() + _END_S
        while leftovers and time.monotonic() < give_up:
            # Orphans become children of this process, also those that have left the group.
            children = _children() - self._preserved - {worker.pid for worker in self._running.values()}
            leftovers = bool(children)
            for child in children:
                _kill(child)
                _wait(child, 0.01)


def _wait(pid: int, timeout_s: float) -> str | None:
    """How a child ended, in words; None where it still runs."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return "its process ended"
        if ended:
            code = os.waitstatus_to_exitcode(status)
            names = {-number: number.name for number in signal.Signals}
            by = f"by {names.get(code, f'signal {-code}')}" if code < 0 else f"with status {code}"
            return f"its process ended {by}"
        if time.monotonic() >= until:
            return None
        time.sleep(0.0002)


def _kill(pid: int) -> None:
    """Kills the group that a process leads, or the process alone where it leads none."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            return kill(pid, signal.SIGKILL)


def _children() -> set[int]:
    """Process ids of this process's children, on Linux; elsewhere none."""
    children, me = set(), os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_bytes().rpartition(b")")[2].split()[1]) == me:
                children.add(int(path.parent.name))
    return children
