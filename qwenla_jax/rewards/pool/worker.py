"""What runs in a worker: a process that the fork server forks for a chunk of records, and ends after it."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection

from qwenla_jax.rewards.pool.plugins import Reward, as_number, describe, traceback_of
from qwenla_jax.rewards.reward_record import RewardRecord

# From Linux's sys/prctl.h, which Python has no names for.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def confinement(memory_mb: int) -> Callable[[], None]:
    """Prepares this process to fork workers; returns the function with which each of them confines itself.

    On Linux descendants whose own parent ends become children of the worker, and after its end of this process, so that
    they are found and ended. When memory is short the kernel ends these processes before the trainer.

    Args:
      memory_mb: MiB of address space that a worker may take beyond what this process has now.
    """
    # Without it a reward's leftovers can outlive it on systems other than Linux; nothing else depends on it.
    prctl: Callable[..., object] = getattr(ctypes.CDLL(None), "prctl", lambda option, value: None)
    server, used = os.getpid(), 0
    with contextlib.suppress(OSError):
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    limit, hard = used + memory_mb * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)

    def confine() -> None:
        os.setsid()  # a group and a session of its own, to be killed as one
        prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
        prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != server:
            os._exit(0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):  # a system without this limit
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    return confine


def work(rewards: Sequence[Reward], records: Iterable[RewardRecord], answers: Connection) -> None:
    """Runs every reward over every record, and sends each value.

    An answer is a JSON array: whether this worker ends now, because the record left threads or processes that would use
    the next record's time, then the value; or kind, message and traceback of an error, which ends the record.

    Args:
      rewards: in the order of the answers.
      records: the chunk.
      answers: takes the answers. Standard input, output and error are /dev/null.
    """
    me = os.getpid()
    for record in records:
        for number, reward in enumerate(rewards, 1):
            answer = _answer(reward, record)
            if os.getpid() != me:
                return  # a child that the reward forked, which returned from it
            ended = number == len(rewards) or len(answer) > 1
            leaves = ended and _left_something()
            answers.send_bytes(json.dumps([leaves, *answer]).encode())
            if leaves:
                return
            if ended:
                break


def _answer(reward: Reward, record: RewardRecord) -> tuple[float] | tuple[str, str, str]:
    kind = "raised"
    try:
        value = reward(record)
        kind = "value"
        return (as_number(value),)
    except SystemExit:
        os._exit(1)  # as the reward requested
    except BaseException as error:
        if kind == "value" and type(error) is ValueError:
            return kind, str(error)[:300], ""
        return kind, describe(error), traceback_of(error)


def _left_something() -> bool:
    if threading.active_count() > 1:
        return True
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True
