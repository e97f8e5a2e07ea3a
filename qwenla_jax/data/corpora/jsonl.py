"""A JSONL file of `{id, image, question, answer[, response][, kind][, options]}`: this project's own format.

`options` lists the texts of options A, B, C, ..., by which an answer is recognised; the question holds them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenla_jax.data.corpora.entries import Corpus, Entry, FilePicture, RecordError, broken
from qwenla_jax.data.corpora.files import read_jsonl
from qwenla_jax.data.corpora.options import LETTERS

_REQUIRED = ("id", "image", "question", "answer")


def jsonl(path: str | Path) -> Corpus:
    """The records of a JSONL file; paths of pictures are relative to it, and may lead out of its folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no line.
    """
    path = Path(path)
    entries = []
    for where, row in read_jsonl(path):
        fault = (row.reason, row.message) if isinstance(row, RecordError) else _fault(row, path)
        if fault is not None:
            entries.append(broken(where, *fault))
        else:
            entries.append(
                Entry(
                    where,
                    row["id"],
                    row["question"],
                    tuple(zip(LETTERS, row.get("options") or (), strict=False)),
                    row["answer"],
                    row.get("response"),
                    row.get("kind") or "question",
                    (FilePicture(path.parent / row["image"]),),
                    written=True,
                )
            )
    return Corpus(str(path), entries)


def _fault(row: dict[str, Any], path: Path) -> tuple[str, str] | None:
    """What is wrong with a line that holds an object."""
    for key in (*_REQUIRED, "response", "kind"):
        value = row.get(key)
        if value is None and key not in _REQUIRED:
            continue
        if value is None:
            return "field", f"{key} is missing"
        if not isinstance(value, str):
            return "field", f"{key} is {value!r}; expected text"
    options = row.get("options")
    if options is not None and not (isinstance(options, list) and all(isinstance(text, str) for text in options)):
        return "options", f"options is {options!r}; expected a list of the options' texts"
    if len(options or ()) > len(LETTERS):
        return "options", f"there are {len(options or ())} options; expected at most {len(LETTERS)}"
    if not (path.parent / row["image"]).is_file():
        return "picture_absent", f"image {row['image']!r}: no such file beside {path.name}"
    return None
