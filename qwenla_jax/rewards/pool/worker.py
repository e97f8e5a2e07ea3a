"""A worker process of `pool.RewardPool`: `python -m qwenla_jax.rewards.pool.worker`; its messages are in `protocol`.

It imports the user's rewards once, forks an executor for each chunk of records, and monitors it: where a record takes
too long or the executor dies, the executor's processes are killed, the record gets an error, and a new executor
continues with the next record. Nothing here imports jax. It ends when its standard input ends.
"""

import math
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qwenla_jax.rewards.pool.executor import Confines, execute
from qwenla_jax.rewards.pool.plugins import Reward, describe, load_reward
from qwenla_jax.rewards.pool.protocol import Lines, pack
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardSettings, rewards_of

_TICK_S = 0.05  # how often a silent executor is checked
_IDLE_TICK_S = 2.0  # how often an idle worker checks that its trainer still runs
_END_S = 2.0  # processes that do not end within this time after SIGKILL hang in the kernel
_MAX_LINE = 1 << 16


class _PoolGone(Exception):
    """The other end of standard input is closed."""


def main() -> int:
    """Runs the worker until its standard input ends; returns the exit status."""
    # The output of rewards goes to /dev/null; the pipes get other file descriptors.
    commands, answers = Lines(os.dup(0)), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        commands.read()
        while not commands.messages and not commands.ended:
            commands.read()
        if commands.ended:
            return 0
        settings, options = commands.messages.popleft()
        # Until here an error of Python itself goes to standard error, which the pool reads.
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        extra = tuple((spec, weight) for spec, weight in settings["extra"])
        rewards = _load(RewardSettings(**settings | {"extra": extra}), answers, options["start_deadline_s"])
        if rewards is not None:
            _Worker(rewards, commands, answers, options).run()
    except (_PoolGone, BrokenPipeError):
        pass
    return 0


def _load(settings: RewardSettings, answers: int, deadline_s: float) -> Mapping[str, Reward] | None:
    """The rewards by name; None where one is invalid, after an error message to the pool."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, but also under -P
    # An import that hangs could not detect that the pool has ended.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(math.ceil(min(deadline_s, 1e6)) + 1)
    try:
        for spec, _ in settings.extra:
            os.write(answers, pack(["loading", spec]))
            load_reward(spec)
        rewards = rewards_of(settings)
    except ValueError as error:
        os.write(answers, pack(["refused", str(error)]))
        return None
    signal.alarm(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return rewards


class _Worker:
    """Computes the rewards of chunks of records."""

    def __init__(
        self, rewards: Mapping[str, Reward], commands: Lines, answers: int, options: Mapping[str, Any]
    ) -> None:
        self._rewards = rewards
        self._commands = commands
        self._answers = answers
        self._deadline_s = options["deadline_s"]
        self._pool = options["pool"]
        self._confines = Confines.from_here(options["memory_mb"])
        self._preserved = _children()  # processes that the user's modules started when they were imported

    def run(self) -> None:
        """Computes chunk after chunk until the pool ends."""
        self._say(["ready"])
        while True:
            while not self._commands.messages:
                self._hear(_poll(_IDLE_TICK_S, self._commands.fd))
            records = [RewardRecord.from_json(line) for line in self._commands.messages.popleft()]
            item = 0
            while item < len(records):
                item = self._execute(records, item)

    def _execute(self, records: Sequence[RewardRecord], first: int) -> int:
        """Runs an executor on records[first:]; returns the first record without an answer."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            self._say(["error", first, "crash", f"no process for it: {describe(error)}", ""])
            return first + 1
        if pid == 0:
            private = (reading, self._commands.fd, self._answers)
            execute(self._rewards, records, first, writing, private, self._confines)
        os.close(writing)
        try:
            self._say(["executor", pid])
            return self._watch(pid, Lines(reading, _MAX_LINE), len(records), first)
        finally:
            self._end(pid)
            os.close(reading)

    def _watch(self, pid: int, lines: Lines, count: int, item: int) -> int:
        """Forwards the executor's answers until it is done, dies or takes too long; returns as `_execute`."""
        num_values, status, leaving = 0, None, False
        deadline = time.monotonic() + self._deadline_s
        while item < count and not leaving:
            ready = _poll(min(_TICK_S, max(0.0, deadline - time.monotonic())), lines.fd, self._commands.fd)
            self._hear(ready)
            lines.read()
            passed = bytearray()
            while lines.messages and item < count and not leaving:
                message = lines.messages.popleft()
                if message == ["leave"]:
                    leaving = True
                elif _is_answer(message, item):
                    passed += pack(message)
                    num_values += 1
                    if message[0] == "error" or num_values == len(self._rewards):
                        item, num_values, deadline = item + 1, 0, time.monotonic() + self._deadline_s
                else:
                    lines.fault = f"{message!r:.100}"
                    lines.messages.clear()
            self._send(bytes(passed))
            if item == count or leaving:
                break
            if lines.fault is not None:
                return self._fail(item, "crash", f"its process sent what is no answer: {lines.fault}")
            if status is not None:
                return self._fail(item, "crash", status)
            if lines.ended:
                # Dead, or alive with its files closed; the kernel may need a moment to know which.
                status = _wait(pid, 0.2) or "its process closed the file that it had to answer on"
            elif lines.fd not in ready:
                status = _wait(pid, 0.0)  # if it has ended, loop once more to read its last messages
                if status is None and time.monotonic() >= deadline:
                    return self._fail(item, "timeout", f"no answer within {self._deadline_s:g} s")
        return item

    def _fail(self, item: int, kind: str, message: str) -> int:
        self._say(["error", item, kind, message, ""])
        return item + 1

    def _end(self, pid: int) -> None:
        """Kills the executor, its group, and its other descendants."""
        _kill(pid)
        _wait(pid, _END_S)
        give_up = time.monotonic() + _END_S
        while time.monotonic() < give_up:
            try:
                ended, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return  # no child is left
            if ended == 0:
                # Orphans become children of this process, also those that have left the group.
                left = _children() - self._preserved
                if not left:
                    return
                for child in left:
                    _kill(child)
                time.sleep(0.0005)

    def _hear(self, ready: set[int]) -> None:
        """Reads from the pool where there is something. Raises _PoolGone where the pool has ended."""
        if self._commands.fd in ready:
            self._commands.read()
        if self._commands.ended or os.getppid() != self._pool:
            raise _PoolGone

    def _say(self, message: list[object]) -> None:
        self._send(pack(message))

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._answers, data) :]


def _is_answer(message: Any, item: int) -> bool:
    """Whether this is a value or an error about this item."""
    if not isinstance(message, list) or len(message) < 2 or type(message[1]) is not int or message[1] != item:
        return False
    kinds = [type(part) for part in message[2:]]
    if message[0] == "error":
        return kinds == [str, str, str]
    return message[0] == "value" and kinds == [float] and math.isfinite(message[2])


def _poll(timeout_s: float, *fds: int) -> set[int]:
    """Those of the files that can be read or have ended. Unlike `select.select` it takes numbers beyond 1023."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(math.ceil(timeout_s * 1000))}


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
            return f"its process ended with status {code}" if code >= 0 else f"its process ended by {_signal(-code)}"
        if time.monotonic() >= until:
            return None
        time.sleep(0.0002)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill(pid: int) -> None:
    """Kills the group that a process leads, or the process alone where it leads none."""
    for kill in (os.killpg, os.kill):
        try:
            return kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _children() -> set[int]:
    """Process ids of this process's children, on Linux; elsewhere none."""
    children, me = set(), os.getpid()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    stat = file.read()
            except OSError:
                continue  # it has just ended
            if int(stat[stat.rindex(b")") + 1 :].split()[1]) == me:
                children.add(int(name))
    return children


if __name__ == "__main__":
    raise SystemExit(main())
