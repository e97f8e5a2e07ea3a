"""Checksums of checkpoint folders, so that a corrupt one is detected before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import write_text

VERSION = 1


def digest(folder: Path) -> dict[str, list[int | str]]:
    """Size in bytes and SHA-256 of every file below a folder, by its path relative to it."""
    result: dict[str, list[int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                result[path.relative_to(folder).as_posix()] = [
                    path.stat().st_size,
                    hashlib.file_digest(file, "sha256").hexdigest(),
                ]
    return result


def write(path: Path, folder: Path, rating: float | None) -> None:
    """Writes the checksums of a folder's files, whole or not at all.

    Args:
      path: the file of checksums.
      folder: the folder.
      rating: of the checkpoint in it (more is better), or None.
    """
    _replace(path, {"version": VERSION, "rating": rating, "files": digest(folder)})


def rate(path: Path, rating: float) -> None:
    """Changes the rating in a file of checksums. Raises ValueError where it cannot be read."""
    _replace(path, json_files.read_object(path) | {"rating": rating})


def rating(path: Path) -> float | None:
    """The rating in a file of checksums; None where it has none, or cannot be read."""
    try:
        result = json_files.read_object(path).get("rating")
    except (OSError, ValueError):
        return None
    return float(result) if result is not None and type(result) in (int, float) and abs(result) <= 1e30 else None


def corruption(path: Path, folder: Path) -> str | None:
    """How a folder differs from its checksums, None where it does not.

    Files that were added later do not count.

    Args:
      path: the file of checksums.
      folder: the folder.
    """
    try:
        known = json_files.read_object(path)["files"]
        wanted = {name: (int(size), str(checksum)) for name, (size, checksum) in known.items()}
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        return f"its list of checksums {path.name} cannot be read ({type(error).__name__}: {error})"
    for name, (size, checksum) in wanted.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != checksum:
                return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _replace(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content), durable=True)
