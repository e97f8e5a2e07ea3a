"""Files that are there whole or not at all, and files that lock a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write; it takes the place of `path` when the block ends without an error.

    Args:
      path: the file; its folder is there.
      durable: the content is on the disk before the old file is gone.
      shared: another process may write the same file meanwhile; one of the two is then there whole. Else what a killed
        process left is written over by the next.

    Raises:
      OSError: it cannot be written; then `path` is as it was.
    """
    mark = str(os.getpid()) if shared else "new"
    fresh = path.with_name(f".{path.stem}.{mark}{path.suffix}")
    try:
        yield fresh
        if durable:
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def lock_file(path: Path) -> TextIO:
    """Opens a text file, which is made if need be, and locks it until it is closed.

    Raises:
      BlockingIOError: another process holds the lock; the message is the file's text.
      OSError: it cannot be opened, or (then the message names the file) cannot be locked.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError as error:
        with file:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(error.errno, f"{path}: cannot be locked: {error.strerror}") from error
            file.seek(0)
            raise BlockingIOError(file.read().strip()) from error


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes a UTF-8 file, whole or not at all; `durable` as in `replacing`."""
    with replacing(path, durable) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")
