"""The process in which rewards run: forked by the worker for a chunk of records, and ended after it."""

import contextlib
import ctypes
import dataclasses
import os
import resource
import signal
import threading
from collections.abc import Callable, Mapping, Sequence

from qwenla_jax.rewards.pool.plugins import Reward, as_number, describe, traceback_of
from qwenla_jax.rewards.pool.protocol import pack
from qwenla_jax.rewards.reward_record import RewardRecord

# From Linux's sys/prctl.h, which Python has no names for.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclasses.dataclass(frozen=True)
class Confines:
    """The limits of a process of rewards.

    Attributes:
      address_space: most bytes of it.
      prctl: Linux's function of that name, None on other systems.
      parent: process id of the worker; an executor ends with it.
    """

    address_space: int
    prctl: Callable[..., int] | None
    parent: int

    @classmethod
    def from_here(cls, memory_mb: int) -> "Confines":
        """The limits of the executors that this process will fork; on Linux it becomes their subreaper.

        Descendants whose own parent ends become this process's children, so that it can find and end them. When
        memory is short the kernel ends these processes before the trainer.

        Args:
          memory_mb: MiB of address space that an executor may take beyond what this process has now.
        """
        used = 0
        # Without these a reward's leftovers can outlive it on systems other than Linux; nothing else depends on them.
        prctl: Callable[..., int] | None = getattr(ctypes.CDLL(None), "prctl", None)
        with contextlib.suppress(OSError):
            with open("/proc/self/statm", encoding="ascii") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("1000")
        if prctl is not None:
            _set_process(prctl, _PR_SET_CHILD_SUBREAPER, 1)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = used + memory_mb * 2**20
        return cls(limit if hard == resource.RLIM_INFINITY else min(limit, hard), prctl, os.getpid())

    def enter(self) -> None:
        """Confines this process, which is a new executor; ends it where its parent has already gone."""
        os.setsid()  # a group and a session of its own, to be killed as one
        if self.prctl is not None:
            _set_process(self.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:
            os._exit(0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):  # a system without this limit
            resource.setrlimit(resource.RLIMIT_AS, (self.address_space, self.address_space))


def execute(
    rewards: Mapping[str, Reward],
    records: Sequence[RewardRecord],
    first: int,
    answers: int,
    private: Sequence[int],
    confines: Confines,
) -> None:
    """Runs every reward over records[first:] and sends each value; see `protocol`. Never returns.

    Args:
      rewards: name -> function, in the order of the answers.
      records: the chunk.
      first: index of the first record to work on.
      answers: file descriptor to answer on. Standard input, output and error are the worker's, which are /dev/null.
      private: file descriptors of the worker's that are closed, so that a reward cannot use them.
      confines: see there.
    """
    me = os.getpid()
    try:
        for fd in private:
            os.close(fd)
        confines.enter()
        _work(rewards, records, first, answers, me)
    finally:
        os._exit(0)


def _set_process(prctl: Callable[..., int], option: int, value: int) -> None:
    prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def _work(rewards: Mapping[str, Reward], records: Sequence[RewardRecord], first: int, answers: int, me: int) -> None:
    for item in range(first, len(records)):
        unsent = b""
        for reward in rewards.values():
            if unsent:
                os.write(answers, unsent)  # so that a crash of this reward does not lose the values before it
                unsent = b""
            answer = _answer(reward, records[item], item)
            if os.getpid() != me:
                return  # a child that the reward forked, which returned from it
            unsent += pack(answer)
            if answer[0] == "error":
                break
        last = item + 1 == len(records)
        leave = not last and _left_something()
        os.write(answers, unsent + pack(["leave"]) if leave else unsent)
        if leave:
            return


def _answer(reward: Reward, record: RewardRecord, item: int) -> list[object]:
    try:
        value = reward(record)
    except SystemExit:
        os._exit(1)  # as the reward requested
    except BaseException as error:
        return ["error", item, "raised", describe(error), traceback_of(error)]
    try:
        return ["value", item, as_number(value)]
    except BaseException as error:
        if type(error) is ValueError:
            return ["error", item, "value", str(error)[:300], ""]
        return ["error", item, "value", describe(error), traceback_of(error)]


def _left_something() -> bool:
    """Whether the reward left threads or child processes, which would use the next record's time."""
    if threading.active_count() > 1:
        return True
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True
