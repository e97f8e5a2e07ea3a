"""Compiled programs on disk, so that the second start of a run compiles nothing. Nothing here imports jax."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

MOST_BYTES = 4 * 2**30  # of a folder; JAX then drops the entries that were not read for longest


def keep_compiled_programs() -> None:
    """Has JAX keep every program that it compiles in the user's cache folder, readable by the user alone.

    To be called before jax is imported. The folder is `$XDG_CACHE_HOME/qwenla_jax/compilations` (~/.cache without that
    variable), with a folder for each kind of processor. JAX_COMPILATION_CACHE_DIR names another one, whose size is not
    bounded; empty, it keeps nothing. A folder that cannot be written, or is another user's (JAX runs what lies there),
    is not used, and one line on stderr says why.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenla_jax" / "compilations"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise OSError(f"{root} belongs to another user")
        root.chmod(0o700)
        folder = root / processor()
        folder.mkdir(mode=0o700, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} cannot be written")
        for entry in folder.glob("*-cache"):  # JAX writes the second file last, and cannot bear its absence
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"compiled programs are not kept for the next start: {error}", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MOST_BYTES))


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A name for this kind of processor: a home may be shared by machines whose instructions differ."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = ("flags", "Features", "model name", "CPU part")
    known = sorted({line for line in lines if line.startswith(kinds)}) or lines[:1]
    return f"{platform.machine()}-{hashlib.sha256('/'.join(known).encode()).hexdigest()[:12]}"
