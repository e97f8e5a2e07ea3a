"""Checkpoints of a training run, written and read by Orbax.

A checkpoint is a folder `checkpoints/STEP` with the state's arrays and a JSON record of the settings and versions it
was made with. Orbax writes into a temporary name and renames it when everything is on disk, so that a folder under its
final name is whole.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from qwenla_jax.train.options import RunOptions
from qwenla_jax.train.schema import to_dict

CHECKPOINT_FOLDER = "checkpoints"

# Settings that may change between a checkpoint and the run that goes on from it: they say how long, how often and on
# how many devices, not what is computed. A changed `steps` stretches the learning rate's schedule to the new length.
FREE_KEYS = ("preset", "steps", "data.threads", "mesh", "eval", "checkpoint", "log")

_ABSENT = "(absent)"


class CheckpointError(ValueError):
    """A checkpoint cannot be used for this run; the message names the folder and what is wrong."""


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree of arrays; other leaves stay as they are."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, state)


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One text for every setting that matters and differs: `optim.b1: 0.9 in the checkpoint, 0.8 now`.

    A setting that only one side has, because it was added between two versions, stands for its default.
    """
    defaults = dict(_flat(to_dict(RunOptions())))
    old, new = dict(_flat(saved)), dict(_flat(current))
    found = []
    for key in sorted({*old, *new}):
        if any(key == free or key.startswith(free + ".") for free in FREE_KEYS):
            continue
        a, b = (side.get(key, defaults.get(key, _ABSENT)) for side in (old, new))
        if a != b:
            found.append(f"config.{key}: {a!r} in the checkpoint, {b!r} now")
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: folder of the run; checkpoints go to its subfolder `checkpoints`.
      options: settings of this run; `options.checkpoint` says how often and how many.

    Saving is asynchronous: `save` returns when the arrays are copied to the host. The next save, `wait` and `close`
    wait for the write before. All processes of a run call the same methods.
    """

    def __init__(self, workdir: str | os.PathLike[str], options: RunOptions) -> None:
        self._options = options
        self._folder = Path(workdir).absolute() / CHECKPOINT_FOLDER
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=options.checkpoint.keep, create=True, cleanup_tmp_directories=True
            ),
            # Named ahead, so that a process that only restores can list the arrays first.
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether `step` (counted from 1) is one to save: every `checkpoint.every` steps, and the last."""
        every = self._options.checkpoint.every
        return step == self._options.steps or (every > 0 and step % every == 0)

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Writes the state after `step` steps, unless that step is there already.

        Args:
          step: steps done.
          state: pytree of arrays and Python numbers.
          meta: further JSON values to keep with it.
        """
        if step in self._manager.all_steps():
            return
        record = {
            "step": step,
            "config": to_dict(self._options),
            "versions": versions(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "extra": dict(meta or {}),
        }
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record))
        self._manager.save(step, args=items, force=True)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The record of a checkpoint (default: the latest): step, config, versions, time, extra.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        step = self._step(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self._folder / str(step)}: the settings cannot be read: {error}") from error

    def check(self, step: int | None = None) -> None:
        """Refuses to go on from a checkpoint that was made with other settings.

        Raises:
          CheckpointError: naming every setting that matters and differs.
        """
        step = self._step(step)
        found = config_differences(self.meta(step)["config"], to_dict(self._options))
        if found:
            raise CheckpointError(
                f"{self._folder / str(step)} was made with other settings; "
                "take those, or a new work folder:\n" + "\n".join(found)
            )

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state of a checkpoint (default: the latest), bit for bit as it was saved.

        Args:
          like: the pytree that comes out, of arrays or `jax.ShapeDtypeStruct`s: shapes, dtypes and shardings.
          step: which checkpoint.

        Raises:
          CheckpointError: there is none, it was made with other settings, its arrays have other names, shapes or
            dtypes, or its files cannot be read.
        """
        step = self._step(step)
        self.check(step)
        target = abstract(like)
        self._match(step, target)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._folder / str(step)}: the state cannot be restored: {error}") from error

    def _match(self, step: int, target: Any) -> None:
        """Compares names, shapes and dtypes before a byte is read.

        Orbax itself casts silently to the dtype asked for, and a resumed run must not begin from rounded numbers.
        """
        folder = self._folder / str(step)
        try:
            saved = dict(_named(self._manager.item_metadata(step)["state"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: the list of arrays cannot be read: {error}") from error
        wanted = dict(_named(target))
        problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - saved.keys()]
        problems += [f"{name}: in the checkpoint, but not in this run" for name in saved.keys() - wanted.keys()]
        for name in wanted.keys() & saved.keys():
            if isinstance(wanted[name], (int, float, str)):
                continue  # a Python value: it has no dtype to keep
            old, new = ((tuple(x.shape), str(x.dtype)) for x in (saved[name], wanted[name]))
            if old != new:
                problems.append(f"{name}: {old[1]}{list(old[0])} in the checkpoint, {new[1]}{list(new[0])} now")
        if problems:
            raise CheckpointError(f"{folder} holds another state:\n" + "\n".join(sorted(problems)))

    def _step(self, step: int | None) -> int:
        known = self._manager.all_steps()
        found = self._manager.latest_step() if step is None else step
        if found is None or found not in known:
            raise CheckpointError(f"{self._folder}: there is no checkpoint{'' if step is None else f' of step {step}'}")
        return found

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and lets go of threads and files."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path), leaf
