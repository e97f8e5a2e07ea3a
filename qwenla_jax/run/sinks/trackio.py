"""Trackio (extra `trackio`), which stores runs on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.run.completions import Completion, preview, table
from qwenla_jax.run.sinks.sink import PROJECT, AppendOnly


class TrackioSink(AppendOnly):
    """A run of trackio, named by the work folder and an id; TRACKIO_DIR and its other variables apply."""

    name = "trackio"

    def __init__(self, workdir: Path, last_step: int, settings: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        super().__init__(workdir / "trackio.json", last_step)
        self._run = self._trackio.init(
            PROJECT, name=f"{workdir.name}-{self.id[:8]}", config=dict(settings), resume="allow", embed=False
        )

    def show(self, step: int, rows: Sequence[Completion]) -> None:
        """Stores a table of completions with their images."""
        header, body = table(rows)
        cells = [
            [[self._trackio.Image(preview(image)) for image in row.images], *rest]
            for row, rest in zip(rows, body, strict=True)
        ]
        self.write(step, {"completions": self._trackio.Table(columns=["images", *header], data=cells)})
