"""Reads parquet files in a separate process, so that a corrupt file raises an error with its name.

One child process reads all files; it starts with the first request, which takes as long as importing pyarrow, and ends
with this process. Where it crashes, hangs or is killed, the request fails and the next one starts another.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("parquet_child.py")
_DEADLINE_S = 600.0  # of one answer, which is a few megabytes at most


class ParquetProcess:
    """The process. Its methods may be called from several threads; each request waits for the ones before it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def ask(self, request: str, path: Path, *arguments: Any) -> Any:
        """The answer to a request, see `parquet_child`.

        Raises:
          ValueError: the file cannot be read; the message names it.
        """
        with self._lock:
            try:
                connection = self._connection or self._start()
                connection.send((request, str(path), arguments))
                if not connection.poll(_DEADLINE_S):
                    raise TimeoutError
                kind, answer = connection.recv()
            except (EOFError, OSError) as error:
                raise ValueError(f"{path}: {self._stop()}; it is corrupt: fetch or write it again") from error
            except BaseException:  # an interrupt: the answer to this request must not be taken for the next one's
                self._stop()
                raise
        if kind != "ok":
            kind = "an Arrow" if path.suffix == ".arrow" else "a parquet"
            raise ValueError(f"{path}: not {kind} file that can be read: {answer}")
        return answer

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it must not receive the terminal's Ctrl-C
                env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"},  # the others reserve address space
            )
        self._connection = ours
        self._end = weakref.finalize(self, _end, self._process, ours)
        return ours

    def _stop(self) -> str:
        """Ends the process; returns how it ended."""
        process, self._process, self._connection = self._process, None, None
        if process is None or self._end is None:
            return "no process could be started to read it"
        try:
            status = process.wait(0.2)  # one that has crashed is gone by now
        except subprocess.TimeoutExpired:
            status = 0
        self._end()
        if status < 0:
            return f"reading it ended the reading process ({signal.Signals(-status).name})"
        return "reading it ended the reading process" if status else f"reading it took more than {_DEADLINE_S:g} s"


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def require_pyarrow() -> None:
    """Checks for the package that the process needs, without importing it.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError("reading parquet files needs a package: pip install pyarrow")


def parquet_process() -> ParquetProcess:
    """This process's `ParquetProcess`, made at the first call."""
    return _of_process(os.getpid())


@functools.lru_cache(1)
def _of_process(pid: int) -> ParquetProcess:  # after a fork the connection is still the parent's
    return ParquetProcess()
