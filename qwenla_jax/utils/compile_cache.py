"""Compiled programs on disk, so that the second start of a run compiles nothing. Nothing here imports jax."""

from __future__ import annotations

import os
import sys
from pathlib import Path

MOST_BYTES = 4 * 2**30  # of a folder; JAX then drops the entries that were not read for longest


def keep_compiled_programs() -> None:
    """Has JAX keep every program that it compiles in the user's cache folder, readable by the user alone.

    To be called before jax is imported. The folder is `$XDG_CACHE_HOME/qwenla_jax/compilations` (~/.cache without that
    variable); machines may share it, since JAX's keys include the processor's instruction set.
    JAX_COMPILATION_CACHE_DIR names another one, whose size is not bounded; empty, nothing is kept. A folder that cannot
    be written, or belongs to another user (JAX executes its files), is not used, and a line on stderr gives the reason.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenla_jax" / "compilations"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise OSError(f"{folder} belongs to another user")
        folder.chmod(0o700)
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} cannot be written")
        for entry in folder.glob("*-cache"):  # JAX writes -atime last, and fails where it is missing
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"compiled programs are not kept for the next start: {error}", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MOST_BYTES))
