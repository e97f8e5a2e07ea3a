"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes a UTF-8 file, whole or not at all; `durable` as in `replacing`."""
    with replacing(path, durable) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")
