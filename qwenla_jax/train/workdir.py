"""The folder of a run: whose it is, that only one process works in it, and that it can be written."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

RUN_FILE = "run.json"
LOCK_FILE = "lock"
# What a run writes beside them. A folder that has one of these and no RUN_FILE is somebody else's.
OWN = ("metrics.jsonl", "tensorboard", "checkpoints", "seals", "completions", "evaluations", "capsules", "hf")


class WorkdirError(ValueError):
    """A folder that a run cannot work in; the message names it and what is wrong."""


@contextlib.contextmanager
def opened(workdir: Path) -> Iterator[None]:
    """Holds the folder of a run, which is made where it is not there.

    Raises:
      WorkdirError: it cannot be made or written, belongs to something else, or another process works in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{workdir}: the work folder cannot be made: {error.strerror}") from error
    marker = workdir / RUN_FILE
    foreign = sorted(name for name in OWN if (workdir / name).exists())
    if foreign and not marker.is_file():
        raise WorkdirError(
            f"{workdir} holds {', '.join(foreign)}, but no {RUN_FILE}: no run of this program made it, and a run would "
            "write over it; take another work folder"
        )
    try:
        lock = (workdir / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise WorkdirError(f"{workdir}: the work folder cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise WorkdirError(f"{workdir / LOCK_FILE}: cannot be locked: {error.strerror}") from error
            lock.seek(0)
            raise WorkdirError(f"{workdir}: another run works in it ({lock.read().strip() or 'unknown'})") from error
        try:
            lock.seek(0)
            lock.truncate()
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
            if not marker.is_file():
                fresh = workdir / (RUN_FILE + ".new")
                made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                fresh.write_text(json.dumps({"made_by": "qwenla_jax", "made": made}), encoding="utf-8")
                os.replace(fresh, marker)
        except OSError as error:
            raise WorkdirError(f"{workdir}: the work folder cannot be written: {error.strerror}") from error
        yield


def seen_by_all(workdir: Path) -> None:
    """Checks that this process sees the folder that the lead opened.

    Raises:
      WorkdirError: it does not.
    """
    if not (workdir / RUN_FILE).is_file():
        raise WorkdirError(f"{workdir}: not the folder of process 0; all processes need one that they share")
