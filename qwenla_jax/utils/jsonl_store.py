"""The files of a distillation run: logs that only grow, and results that are written whole.

A log's lines are complete once their line break is there. Whatever a kill leaves behind the last line break is cut off
at the next start, so that nothing of a log is ever read half. Results go to a temporary name and are renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import lock_file, replacing
from qwenla_jax.utils.visible import HIDDEN

Row = dict[str, Any]

SAMPLES = "samples.jsonl"
JUDGEMENTS = "judgements.jsonl"
REPLIES = "replies.jsonl"
CORRECTIONS = "corrections.jsonl"
ANSWERS = "answers.jsonl"
ACCEPTED = "accepted.jsonl"
REJECTED = "rejected.jsonl"
QUEUE = "queue.jsonl"
SUMMARY = "summary.json"
SETTINGS = "settings.json"
IMAGES = "images"
_LOCK = ".lock"


class StoreError(ValueError):
    """A file of the run cannot be used; the message names file, line and what is wrong."""


def line_of(row: Row) -> str:
    """One line of JSON with its line break; text stays readable in any script.

    What a terminal would obey, and half characters, are escaped as JSON escapes them: all of it is within strings.
    """
    return _escaped(json.dumps(row, ensure_ascii=False)) + "\n"


def _escaped(text: str, keep: str = "") -> str:
    return HIDDEN.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) of every line; a missing file has none.

    Raises:
      StoreError: a line is no JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json_files.loads(line, f"{path}:{number}")
            except ValueError as error:
                raise StoreError(str(error)) from error
            if not isinstance(row, dict):
                raise StoreError(f"{path}:{number}: holds a {type(row).__name__}, expected an object")
            yield number, row


def typed_lines(path: Path) -> Iterator[tuple[int, str, Row | str]]:
    """Lines that a person may have edited: (number, text, the object or what is wrong with it); blank ones left out.

    Lines end at line feeds alone: other line separators are characters of a text.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        if not line.strip():
            continue
        text = line.decode("utf-8", "replace").strip().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
        try:
            result: Row | str = json_files.loads(text, "")
            if not isinstance(result, dict):
                result = f"holds a {type(result).__name__}, expected an object"
        except ValueError as error:
            result = str(error).removeprefix(": ")
        yield number, text, result


def mend(path: Path) -> None:
    """Cuts off what stands behind the last line break, which a killed run has left."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep, block = end, 1 << 16
        while keep > 0:
            start = max(0, keep - block)
            file.seek(start)
            result = file.read(keep - start).rfind(b"\n")
            if result >= 0:
                keep = start + result + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds lines to a log and hands them to the operating system."""
    with path.open("ab") as file:
        file.write("".join(map(line_of, rows)).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def keep_rows(path: Path, count: int) -> None:
    """Cuts a log after its first `count` lines."""
    with path.open("r+b") as file:
        for _ in range(count):
            file.readline()
        file.truncate(file.tell())


@contextlib.contextmanager
def rewriting(*paths: Path) -> Iterator[list[TextIO]]:
    """Files to write; they take the place of the old ones only when all are complete."""
    with contextlib.ExitStack() as whole, contextlib.ExitStack() as files:
        fresh = [whole.enter_context(replacing(path)) for path in reversed(paths)][::-1]  # replaced in order
        yield [files.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in fresh]


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with rewriting(path) as (file,):
        file.write(_escaped(json.dumps(value, indent=2, ensure_ascii=False), keep="\n") + "\n")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps a second process out of the folder.

    Raises:
      StoreError: another process is in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(workdir / _LOCK)
    except BlockingIOError as error:
        raise StoreError(f"{workdir}: another process is at work in this folder") from error
    with lock:
        yield


def check_there(workdir: Path) -> None:
    """Checks that the folder of a run that is under way still is one: half of it must not be made again.

    Raises:
      StoreError: it was deleted or emptied.
    """
    if not (workdir / SETTINGS).is_file():
        raise StoreError(f"{workdir}: {SETTINGS} is gone: the folder was deleted or emptied while the run was in it")


def read_settings(workdir: Path) -> Row | None:
    """The settings that the folder's run began with, None where there is no run.

    Raises:
      StoreError: they cannot be read.
    """
    path = workdir / SETTINGS
    if not path.is_file():
        return None
    try:
        return json_files.read_object(path)
    except ValueError as error:
        raise StoreError(str(error)) from error


def image_name(record_id: str) -> str:
    """Path of a question's image under the run's folder; different ids have different ones, whatever they hold."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", record_id)
    # Some file systems fold case, so two ids that differ in it alone need a digest too.
    if safe != record_id.lower() or not safe or len(safe) > 80:
        safe = f"{safe[:80]}-{hashlib.blake2b(record_id.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"
    return f"{IMAGES}/{safe}.png"


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG, whole or not at all. Raises OSError where the run's folder is gone: it is not made again."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as fresh:
        image.save(fresh, format="png")


# What the results are made of, in a line of the log of samples.
_SAMPLE = {"id": str, "question": str, "answer": str, "image": str, "kind": str, "text": str, "tokens": int}


def groups(path: Path, samples: int) -> Iterator[list[Row]]:
    """The sampled answers by question, in order; an incomplete last question is left out.

    Args:
      path: the log of samples.
      samples: k, answers a question.

    Raises:
      StoreError: a line is not the one that should stand there.
    """
    rows: list[Row] = []
    for number, row in read_rows(path):
        index, sample = divmod(number - 1, samples)
        if (row.get("index"), row.get("sample")) != (index, sample):
            raise StoreError(
                f"{path}:{number}: holds sample {row.get('sample')} of question {row.get('index')}, expected sample "
                f"{sample} of question {index}; the file was changed by hand or belongs to other settings"
            )
        wrong = [name for name, kind in _SAMPLE.items() if type(row.get(name)) is not kind]
        choices = row.get("options", [])
        if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
            wrong.append("options")
        if not isinstance(row.get("columns", {}), dict):
            wrong.append("columns")
        if wrong:
            raise StoreError(f"{path}:{number}: {', '.join(wrong)}: missing, or of another type than a run writes")
        rows.append(row)
        if len(rows) == samples:
            yield rows
            rows = []
