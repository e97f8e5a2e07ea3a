"""Step dumps: a folder with all inputs of one update, to compute it again elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import to_dict
from qwenla_jax.parallel.distributed import is_primary
from qwenla_jax.run.checkpoints import versions
from qwenla_jax.train.brpo.update import RolloutBatch
from qwenla_jax.train.stage import Inputs
from qwenla_jax.train.train_state import to_keep
from qwenla_jax.types import PromptBatch, ReinsertedImages, ResponseBatch, TokenBatch, VisionBatch
from qwenla_jax.utils import json_files

FOLDER = "step_dumps"
RECORD, ARRAYS, STATE = "step_dump.json", "arrays.npz", "state"
_STRUCTS = {
    cls.__name__: cls for cls in (VisionBatch, TokenBatch, PromptBatch, ReinsertedImages, ResponseBatch, RolloutBatch)
}


_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class StepDump:
    """A step dump without its state.

    Attributes:
      config: of the run, as `schema.to_dict` returns it.
      inputs: of the step.
      metrics: of the step, by name without prefix.
      folder: the step dump's.
    """

    config: dict[str, Any]
    inputs: Inputs
    metrics: dict[str, float]
    folder: Path


def write(workdir: Path, options: RunOptions, inputs: Inputs | None, metrics: Mapping[str, Any], state: Any) -> Path:
    """Writes the step dump of a step whose update left `state` as it was; returns its folder.

    Of a state with adapters it holds the part that a checkpoint holds.

    Raises:
      OSError: it cannot be written.
    """
    assert inputs is not None
    folder = workdir / FOLDER / f"step_{inputs.step + 1:06d}"
    if is_primary():
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    layout = [_pack(value, str(index), arrays) for index, value in enumerate(inputs.batch)]
    if is_primary():
        np.savez(folder / ARRAYS, **cast(dict[str, Any], arrays))
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / STATE).absolute(), to_keep(state, options.optim.trainable), force=True)
    record = {
        "step": inputs.step,
        "config": to_dict(options),
        "versions": versions(),
        "metrics": {name: _number(value) for name, value in metrics.items()},
        "layout": layout,
        "rows": inputs.rows,
    }
    if is_primary():
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return folder


def read(folder: Path) -> StepDump:
    """The step dump that `write` saved, without its state.

    Raises:
      ValueError: the folder is no step dump; the message has the error.
    """
    try:
        record = json_files.read_object(folder / RECORD)
        with np.load(folder / ARRAYS) as arrays:
            batch = tuple(_unpack(layout, str(index), arrays) for index, layout in enumerate(record["layout"]))
        inputs = Inputs(record["step"], batch, record["rows"])
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        return StepDump(record["config"], inputs, metrics, folder)
    except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not the step dump of a step: {type(error).__name__}: {error}") from error


def read_state(folder: Path, like: Any) -> Any:
    """The state of a step dump, in the shapes and shardings of `like`."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((folder / STATE).absolute(), like)


def _number(value: Any) -> float | str:
    """JSON has no nan and no infinities; their names are read back by `float`."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(value):
        fields = {f.name: _pack(getattr(value, f.name), f"{name}.{f.name}", arrays) for f in dataclasses.fields(value)}
        return {"struct": type(value).__name__, "fields": fields}
    arrays[name] = np.asarray(jax.device_get(value))
    return "array"


def _unpack(layout: Any, name: str, arrays: Mapping[str, np.ndarray]) -> Any:
    if layout is None:
        return None
    if layout == "array":
        return arrays[name]
    fields = {field: _unpack(part, f"{name}.{field}", arrays) for field, part in layout["fields"].items()}
    return _STRUCTS[layout["struct"]](**fields)
