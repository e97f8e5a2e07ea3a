"""Weights & Biases (extra `wandb`)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.run.completions import Completion, preview, table
from qwenla_jax.run.sinks.sink import PROJECT, AppendOnly


class WandbSink(AppendOnly):
    """A run of wandb, stored in the work folder until it is sent; WANDB_PROJECT and its other variables apply."""

    name = "wandb"

    def __init__(self, workdir: Path, last_step: int, settings: Mapping[str, Any]) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        super().__init__(workdir / "wandb.json", last_step)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            id=self.id,
            resume="allow",
            dir=str(workdir),
            config=dict(settings),
            settings=self._wandb.Settings(console="off"),
        )

    def show(self, step: int, rows: Sequence[Completion]) -> None:
        """Sends a table of completions with their images."""
        header, body = table(rows)
        images = [[self._wandb.Image(preview(image)) for image in row.images] for row in rows]
        most = max(map(len, images), default=0)
        columns = [f"image {number}" for number in range(1, most + 1)] + header
        padded = [[*own, *[None] * (most - len(own)), *cells] for own, cells in zip(images, body, strict=True)]
        self.write(step, {"completions": self._wandb.Table(columns=columns, data=padded)})
