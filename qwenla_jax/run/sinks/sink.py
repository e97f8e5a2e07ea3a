"""What a sink is, and what sinks share that only append."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qwenla_jax.run.completions import Completion
from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import write_text

PROJECT = "qwenla_jax"


class Sink(Protocol):
    """A place for metrics beside metrics.jsonl: a class in `run.metrics.SINKS`.

    It is called with the run's folder, the last step that counts (-1 in a fresh run: what it has of later steps, it
    forgets or does not take again), and the run's settings. An exception of its methods ends the sink, not the run.
    """

    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; they may be nan or infinite."""

    def show(self, step: int, rows: Sequence[Completion]) -> None:
        """Writes a table of completions."""

    def close(self) -> None:
        """Closes it."""


class AppendOnly:
    """What sinks share whose service only appends: no number is sent twice, whenever the run was killed.

    A file in the work folder has the run's id there, the last step that was sent, and the names of its metrics.

    Attributes:
      id: of the run; a fresh run has a new one.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self.id, self._before = uuid.uuid4().hex, (-1, frozenset[str]())
        if last_step >= 0:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                saved = json_files.read_object(path)
                self._before = int(saved["step"]), frozenset(map(str, saved["names"]))
                self.id = str(saved["id"])
        self._sent = self._before
        self._run: Any = None  # of the service; has `log` and `finish`

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends those of a step's values that were not sent yet."""
        last, names = self._before
        values = {key: value for key, value in values.items() if step > last or step == last and key not in names}
        if not values:
            return
        self._run.log(values, step=step)
        self._sent = step, frozenset(values) | (self._sent[1] if step == self._sent[0] else frozenset())
        write_text(self._path, json.dumps({"id": self.id, "step": step, "names": sorted(self._sent[1])}))

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
