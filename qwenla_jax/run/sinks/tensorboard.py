"""TensorBoard: event files in the work folder."""

from __future__ import annotations

import html
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qwenla_jax.run.completions import Completion, preview, table

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardSink:
    """Event files in `tensorboard/`; completions as a table in text, and the images of their questions."""

    name = "TensorBoard"

    def __init__(self, workdir: Path, last_step: int, settings: Mapping[str, Any]) -> None:
        board = workdir / TENSORBOARD_FOLDER
        earlier = board.is_dir() and any(board.iterdir())
        # The writer names its file by the second: a restart in the same second must not reuse the name. Its thread ends
        # at the first error, and a full queue would then block for ever: room for more than a step's metrics.
        self._board = _summary_writer()(
            str(board),
            purge_step=last_step + 1 if earlier else None,
            filename_suffix=f".{time.time_ns()}",
            max_queue=10_000,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's metrics."""
        for name, number in values.items():
            self._board.add_scalar(name, number, step)
        self._board.flush()

    def show(self, step: int, rows: Sequence[Completion]) -> None:
        """Writes a table of completions, and each question's images once."""
        header, body = table(rows)
        lines = [[_in_markdown(cell) for cell in row] for row in (header, *body)]
        lines.insert(1, ["---"] * len(header))
        self._board.add_text("completions", "\n".join(f"| {' | '.join(row)} |" for row in lines), step)
        questions = itertools.groupby(rows, key=lambda row: (row.prompt, row.images))
        for number, ((_, images), _) in enumerate(questions, 1):
            for image in images:
                pixels_HxWx3 = np.asarray(preview(image))
                self._board.add_image(f"completions/question_{number}", pixels_HxWx3, step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._board.close()


def _in_markdown(cell: Any) -> str:
    return html.escape(str(cell)).replace("|", "&#124;").replace("\n", "<br>")


def _summary_writer() -> type[SummaryWriter]:
    """tensorboardX's writer. It imports torch where that is installed, for seconds, and nothing here needs it."""
    hidden = "torch" not in sys.modules and "tensorboardX" not in sys.modules
    if hidden:
        cast(dict[str, Any], sys.modules)["torch"] = None  # an import of it fails
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter
