"""The folder of a run: checks that it is a run's, writable, and used by one process only."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path

from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import lock_file, write_text

RUN_FILE = "run.json"
LOCK_FILE = "lock"
SETTINGS_FILE = "settings.json"
# What a run writes beside them. A folder that has one of these and no RUN_FILE is not a run's.
OWN = ("metrics.jsonl", "tensorboard", "checkpoints", "checksums", "completions", "evaluations", "step_dumps", "hf")


class WorkdirError(ValueError):
    """A folder that a run cannot use, or no longer; the message names it and the reason."""


class Hold:
    """Detects that a run's folder was deleted or replaced while it runs.

    Args:
      workdir: the folder, with its RUN_FILE.

    Raises:
      WorkdirError: this process cannot read that file.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._marker = self._read()
        if self._marker is None:
            raise WorkdirError(f"{workdir}: not the folder of process 0; all processes need one that they share")

    def _read(self) -> bytes | None:
        try:
            return json_files.read_bytes(self._workdir / RUN_FILE)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def check(self) -> None:
        """Checks that the folder is still the one that the run began in, so that it is not made again in part.

        Raises:
          WorkdirError: it is not.
        """
        try:
            marker = self._read()
        except OSError:
            return  # the file system may be unreachable for a while
        if marker != self._marker:
            what = f"{RUN_FILE} is gone" if marker is None else "another run has begun in it"
            raise WorkdirError(
                f"{self._workdir}: the work folder was deleted or replaced while the run was in it ({what}); the run "
                "ends here, and nothing more is written"
            )


def _holds_files(path: Path) -> bool:
    return path.is_file() or any(inner.is_file() for inner in path.rglob("*"))


@contextlib.contextmanager
def opened(workdir: Path) -> Iterator[None]:
    """Locks the folder of a run, which is made if it does not exist.

    Raises:
      WorkdirError: it cannot be made or written, belongs to something else, or another process works in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{workdir}: the work folder cannot be made: {error.strerror}") from error
    marker = workdir / RUN_FILE
    foreign = sorted(name for name in OWN if _holds_files(workdir / name))
    if foreign and not marker.is_file():
        raise WorkdirError(
            f"{workdir} holds {', '.join(foreign)}, but no {RUN_FILE}: no run of this program made it, and a run would "
            "write over it; take another work folder"
        )
    try:
        lock = lock_file(workdir / LOCK_FILE)
    except BlockingIOError as error:
        raise WorkdirError(f"{workdir}: another run works in it ({str(error) or 'unknown'})") from error
    except OSError as error:
        raise WorkdirError(f"{workdir}: the work folder cannot be written: {error.strerror}") from error
    with lock:
        try:
            lock.seek(0)
            lock.truncate()
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
            if not marker.is_file():
                made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                content = {"made_by": "qwenla_jax", "made": made, "id": uuid.uuid4().hex}
                write_text(marker, json.dumps(content))
        except OSError as error:
            raise WorkdirError(f"{workdir}: the work folder cannot be written: {error.strerror}") from error
        yield
