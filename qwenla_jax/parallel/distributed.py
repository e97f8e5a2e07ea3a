"""A run in several processes, one or more a machine: gather, broadcast, and array placement.

All of them run the same program over one mesh. Decisions that could differ between processes (does a file exist, was
there a signal, did a reward fail) are made by one and broadcast; files are written by process 0, the primary, into a
folder that all of them share. With one process every function here is trivial.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

T = TypeVar("T")


def is_multiprocess() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process writes files and to the console."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """The values (anything that can be pickled) of all processes, in their order. All have to call it."""
    if not is_multiprocess():
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32)).reshape(-1)
    # Few sizes, since each is compiled: at least 256 bytes, a power of two.
    room = 1 << max(8, int(sizes.max() - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(make: Callable[[], T]) -> T:
    """The value that process 0 makes, in all processes; all have to call it. Its exception is raised in all of them."""
    if not is_multiprocess():
        return make()
    made: T | None = None
    error: Exception | None = None
    if is_primary():
        try:
            made = make()
        except Exception as raised:
            error = raised
    made, error = gather((made, error))[0]
    if error is not None:
        raise error
    return cast(T, made)


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """A block that fails in all processes where it fails in one. Exceptions of other kinds stay this process's alone.

    Raises:
      ValueError: another process failed; the message has its number and error.
    """
    error: Exception | None = None
    try:
        yield
    except kinds as raised:
        error = raised
    if is_multiprocess():
        message = gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = next(((number, text) for number, text in enumerate(message) if text is not None), None)
        if failed is not None and error is None:
            raise ValueError(f"process {failed[0]}: {failed[1]}")
    if error is not None:
        raise error


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Numpy arrays that every process holds, sharded over the devices of all; each process places its own part."""
    if not is_multiprocess():
        return tree

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array):  # placed already
            return x
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def share(number: int) -> slice:
    """This process's share of `number` items."""
    count, index = jax.process_count(), jax.process_index()
    return slice(number * index // count, number * (index + 1) // count)
