"""Checkpoints of a training run, written and read by Orbax.

A checkpoint is a folder `checkpoints/STEP` with the state's arrays and a JSON record of the settings and versions it
was made with. Orbax writes into a temporary name and renames it when everything is on disk, so that a folder under its
final name is complete; `checksums/STEP.json` has the checksums of its files, by which later corruption is detected.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import differences, to_dict
from qwenla_jax.parallel import distributed
from qwenla_jax.run import checksums
from qwenla_jax.run.workdir import RUN_FILE, Hold, WorkdirError

CHECKPOINT_FOLDER = "checkpoints"
CHECKSUM_FOLDER = "checksums"
CORRUPT_FOLDER = "corrupt"

# Settings that may change between a checkpoint and the run that resumes from it: they set how long, how often and on
# how many devices, not what is computed. A changed `steps` stretches the learning rate's schedule to the new length.
FREE_KEYS = (
    *("preset", "steps", "data.threads", "data.max_invalid", "data.leaks", "mesh"),
    *("eval", "checkpoint", "log", "guard", "rewards.pool"),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used for this run; the message names the folder and what is wrong."""


class Corrupt(CheckpointError):
    """A checkpoint's files cannot be read."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


def abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree of arrays; other leaves stay as they are."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, state)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    result = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        result[name] = importlib.metadata.version(name)
    return result


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: folder of the run; checkpoints go to its subfolder `checkpoints`, checksums of their files to
        `checksums`, and corrupt checkpoints to `corrupt`.
      options: settings of this run; `RunOptions.checkpoint` sets how often and how many.
      note: called with messages about corrupt checkpoints and failed writes.
      hold: of a run on its folder; nothing is written once the folder is lost.

    Saving is asynchronous: `save` returns when the arrays are copied to the host; a thread waits for the write, takes
    the checksums, and only then removes older checkpoints. The next save, `wait` and `close` wait for it. All
    processes of a run call the same methods.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        options: RunOptions,
        note: Callable[[str], None] = lambda text: None,
        hold: Hold | None = None,
    ) -> None:
        self._options, self._hold = options, hold
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / CHECKPOINT_FOLDER
        self._note = note
        self._checked: set[int] = set()
        self._ratings: dict[int, float] = {}
        self._writing_checksums: threading.Thread | None = None
        self._failure: Exception | None = None
        self._lost = False  # the folder was deleted: the manager is closed for good
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True),
            # Named ahead, so that a process that only restores can list the arrays first.
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, as `_latest_step` returns it; the same for all processes."""
        result = distributed.broadcast(self._latest_step)
        if not distributed.is_primary():
            self._manager.reload()
        return result

    def _latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None where there has never been one.

        A corrupt checkpoint is moved to `corrupt` and noted, and the one before it is tried. One without checksums is
        valid: the run ended while they were computed, after the write itself.

        Raises:
          CheckpointError: there have been checkpoints, and none of them can be used.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        with_checksums = {int(path.stem) for path in self._checksums() if path.stem.isdecimal()}
        for step in sorted({*steps, *with_checksums}, reverse=True):
            if step in self._checked:
                return step
            if step not in steps:
                self._set_aside(step, "the folder is gone, or not whole")
                continue
            fault = None
            if self._checksum_path(step).exists():
                fault = checksums.corruption(self._checksum_path(step), self._folder / str(step))
            else:
                self._note(f"{self._folder / str(step)} has no checksums: the run ended while they were taken")
            if fault is None:
                self._checked.add(step)
                return step
            self._set_aside(step, fault)
        lost = self._workdir / CORRUPT_FOLDER
        if steps or with_checksums or (lost.is_dir() and any(lost.iterdir())):
            known = sorted({*steps, *with_checksums, *(int(path.name.split("-")[0]) for path in lost.glob("[0-9]*-*"))})
            raise CheckpointError(
                f"{self._workdir}: none of its checkpoints ({', '.join(map(str, known))}) can be used; what is left "
                f"of them is in {lost}. Take another work folder, or delete this one to begin anew"
            )
        return None

    def best_step(self) -> int | None:
        """The step of the best rated checkpoint on disk, the newest of equals; None where none is rated."""
        rated = {step: checksums.rating(self._checksum_path(step)) for step in self._manager.all_steps()}
        known = [(rating, step) for step, rating in rated.items() if rating is not None]
        return max(known)[1] if known else None

    def rate(self, step: int, rating: float) -> None:
        """Sets the rating of the parameters after `step` steps (more is better), before or after they are saved.

        The best rated checkpoint is kept whatever its age.
        """
        self._ratings[step] = rating
        self._join()
        if distributed.is_primary() and self._checksum_path(step).exists():
            try:
                checksums.rate(self._checksum_path(step), rating)
            except (ValueError, OSError) as error:
                self._note(f"{error}; the checkpoint of step {step} is not rated")

    def _checksums(self) -> list[Path]:
        return sorted((self._workdir / CHECKSUM_FOLDER).glob("*.json"))

    def _checksum_path(self, step: int) -> Path:
        return self._workdir / CHECKSUM_FOLDER / f"{step}.json"

    def _set_aside(self, step: int, fault: str) -> None:
        folder = self._workdir / CORRUPT_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        number = next(n for n in itertools.count() if not (folder / f"{step}-{n}").exists())
        place = folder / f"{step}-{number}"
        place.mkdir()
        if (self._folder / str(step)).exists():
            os.replace(self._folder / str(step), place / "checkpoint")
        if self._checksum_path(step).exists():
            os.replace(self._checksum_path(step), place / "checksums.json")
        self._manager.reload()
        self._note(f"the checkpoint {self._folder / str(step)} is corrupt: {fault}; it is now in {place}")

    def due(self, step: int) -> bool:
        """Whether `step` (counted from 1) is one to save: every `checkpoint.every` steps, and the last."""
        every = self._options.checkpoint.every
        return step == self._options.steps or (every > 0 and step % every == 0)

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Writes the state after `step` steps, unless that checkpoint exists.

        Args:
          step: steps done.
          state: pytree of arrays and Python numbers.
          meta: further JSON values to save with it.

        Raises:
          SaveError: this or the write before it failed, for example for lack of space; nothing else was touched.
          WorkdirError: the run's folder was deleted.
        """
        self.wait()
        if self._hold is not None:
            distributed.broadcast(self._hold.check)
        if distributed.broadcast(lambda: step in self._manager.all_steps()):
            return
        record = {
            "step": step,
            "config": to_dict(self._options),
            "versions": versions(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "extra": dict(meta or {}),
        }
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record))
        size = sum(x.nbytes for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
        try:
            self._folder.mkdir(exist_ok=True)  # it may have been deleted
            free = distributed.broadcast(lambda: shutil.disk_usage(self._folder).free)
        except OSError as error:
            raise SaveError(f"{self._folder / str(step)} could not be written: {error}") from error
        if free < 1.02 * size:
            raise SaveError(
                f"{self._folder / str(step)} needs {size / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left"
            )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # of many types, by whatever part of the write failed
            raise self._failed(step, error) from error
        self._writing_checksums = threading.Thread(target=self._write_checksums, args=(step,), daemon=True)
        self._writing_checksums.start()

    def _failed(self, step: int, error: Exception) -> SaveError:
        # A manager raises the same error again at every later call, so it is replaced.
        with contextlib.suppress(Exception):
            self._manager.close()
        for rest in self._folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(rest, ignore_errors=True)  # the next checkpoint needs the space
        if self._hold is not None:
            try:
                self._hold.check()
            except WorkdirError as lost:
                self._lost = True
                return SaveError(str(lost))
        self._manager = self._open()
        return SaveError(f"{self._folder / str(step)} could not be written: {type(error).__name__}: {error}")

    def _write_checksums(self, step: int) -> None:
        """Runs in its own thread; every later access to the checkpoints waits for it."""
        try:
            self._manager.wait_until_finished()
            if not distributed.is_primary():
                return
            checksums.write(self._checksum_path(step), self._folder / str(step), self._ratings.get(step))
            self._checked.add(step)
            newest = sorted(self._manager.all_steps())[-self._options.checkpoint.keep :]
            for old in set(self._manager.all_steps()) - {*newest, self.best_step()}:
                # Checksums first: checksums without a checkpoint mean that the checkpoint was lost.
                self._checksum_path(old).unlink(missing_ok=True)
                if distributed.is_multiprocess():  # Orbax would wait for the other processes
                    shutil.rmtree(self._folder / str(old))
                    self._manager.reload()
                else:
                    self._manager.delete(old)
        except Exception as error:
            self._failure = self._failed(step, error)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The record of a checkpoint (default: the latest): step, config, versions, time, extra.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        step = self._step(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except (OSError, ValueError, KeyError) as error:
            raise Corrupt(f"{self._folder / str(step)}: the settings cannot be read: {error}") from error

    def check(self, step: int | None = None) -> None:
        """Checks that a checkpoint was made with the settings of this run.

        Raises:
          CheckpointError: names every setting that differs and is not in `FREE_KEYS`.
        """
        step = self._step(step)
        changed = differences(self.meta(step)["config"], self._options, FREE_KEYS, "checkpoint")
        if changed:
            raise CheckpointError(
                f"{self._folder / str(step)} was made with other settings; "
                "take those, or a new work folder:\n" + "\n".join(changed)
            )

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The state of a checkpoint (default: the latest), bit for bit as it was saved.

        Args:
          like: the pytree to return, of arrays or `jax.ShapeDtypeStruct`s: shapes, dtypes and shardings.
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
            raise Corrupt(f"{self._folder / str(step)}: the state cannot be restored: {error}") from error

    def restore_newest(self, like: Any) -> tuple[Any, int]:
        """The newest state that can be read, and its step; corrupt ones are set aside, as in `latest_step`.

        Raises:
          CheckpointError: as `latest_step` and `restore`, for other reasons than corruption.
        """
        while (step := self.latest_step()) is not None:
            state: Any = None
            fault: str | None = None
            try:
                state = self.restore(like, step)
            except Corrupt as error:
                fault = str(error)
            faults = [one for one in distributed.gather(fault) if one is not None]
            if not faults:
                return state, step
            self._checked.discard(step)
            if distributed.is_primary():
                self._set_aside(step, faults[0])
        raise CheckpointError(f"{self._folder}: there is no checkpoint")

    def _match(self, step: int, target: Any) -> None:
        """Compares names, shapes and dtypes before any array is read.

        Orbax casts silently to the requested dtype, and a resumed run must not begin from rounded numbers.
        """
        folder = self._folder / str(step)
        try:
            saved = dict(_named(self._manager.item_metadata(step)["state"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{folder}: the list of arrays cannot be read: {error}") from error
        wanted = dict(_named(target))
        problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - saved.keys()]
        problems += [f"{name}: in the checkpoint, but not in this run" for name in saved.keys() - wanted.keys()]
        for name in wanted.keys() & saved.keys():
            if isinstance(wanted[name], (int, float, str)):
                continue  # a Python value: it has no dtype
            old, new = ((tuple(x.shape), str(x.dtype)) for x in (saved[name], wanted[name]))
            if old != new:
                problems.append(f"{name}: {old[1]}{list(old[0])} in the checkpoint, {new[1]}{list(new[0])} now")
        if problems:
            raise CheckpointError(f"{folder} holds another state:\n" + "\n".join(sorted(problems)))

    def _step(self, step: int | None) -> int:
        known = self._manager.all_steps()
        chosen = self._manager.latest_step() if step is None else step
        if chosen is None or chosen not in known:
            raise CheckpointError(f"{self._folder}: there is no checkpoint{'' if step is None else f' of step {step}'}")
        return chosen

    def _join(self) -> None:
        if self._writing_checksums is not None:
            self._writing_checksums.join()
            self._writing_checksums = None

    def wait(self) -> None:
        """Returns when the last save is on disk with its checksums; raises SaveError where it failed."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Waits for the last save, notes a failure, and releases threads and files."""
        try:
            self.wait()
        except SaveError as error:
            self._note(str(error))
        if not self._lost:
            self._manager.close()
        if self._hold is not None and not (self._workdir / RUN_FILE).exists():
            # The folder was deleted; a write in progress may have made it again.
            for folder in (self._folder, self._workdir):
                with contextlib.suppress(OSError):  # it is gone, or not empty
                    folder.rmdir()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path), leaf
