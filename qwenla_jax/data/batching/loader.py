"""Batches in an order that is a pure function of seed and step, by Grain.

The order does not depend on how many processes (hosts) take part: each draws whole batches and places its own rows on
its devices (`parallel.distributed.place`). So every host reads all images of a batch, at the cost of CPU time, and
knows the batch's lengths, groups and invalid records without communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grain
import numpy as np

from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.record import Record

Batch = TypeVar("Batch")


class Sized(Protocol):
    """Random access to anything."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int) -> Any:
        """The item at an index from 0."""
        ...


class RecordSource(Protocol):
    """Random access to records."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int, /) -> Record:
        """The record at an index from 0."""
        ...


def batch_indices(seed: int, step: int, batch_size: int, dataset_size: int) -> np.ndarray:
    """The indices of a step's batch, as `make_pipeline` draws them, without reading any record.

    Records come in a new order every epoch, each once an epoch. A batch may reach into the next epoch.

    Args:
      seed: of the order.
      step: from 0.
      batch_size: records of a batch.
      dataset_size: records of the source.

    Returns:
      int64 [batch_size], indices into the source.

    Raises:
      ValueError: a negative seed or step, or no record or batch.
    """
    _check(seed, step, batch_size, dataset_size)
    order = _shuffled(grain.MapDataset.range(dataset_size), seed)
    return np.array([order[step * batch_size + row] for row in range(batch_size)], np.int64)


def make_pipeline(
    source: Sized,
    transform: Callable[[Any], Any],
    collate: Callable[[Sequence[Any]], Batch],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    threads: int = 1,
    prefetch: int = 2,
    group: int = 1,
) -> Iterator[Batch]:
    """An endless iterator over batches; the one at step n does not depend on where the iterator was started.

    Args:
      source: the records, or examples of them.
      transform: record to example.
      collate: examples to a batch, such as `collate_sft` with its buckets bound.
      batch_size: records of a batch.
      seed: of the order, see `batch_indices`.
      start_step: the step of the first batch, counted from 0.
      threads: each makes whole batches ahead of time; 0 makes them on request.
      prefetch: batches made ahead, at least one a thread.
      group: the records of this many batches are grouped by length, so that less of a batch is padding; 1 takes
        records in order.

    Raises:
      ValueError: as in `batch_indices`, at once; errors of `transform` and `collate` come with the batch.
    """
    _check(seed, start_step, batch_size, len(source))
    if threads < 0 or prefetch < 0:
        raise ValueError(f"threads and prefetch must not be negative, got {threads} and {prefetch}")
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")

    def collate_group(examples: Sequence[Example]) -> list[Batch]:
        return [collate(batch) for batch in by_length(examples, group)]

    dataset = _shuffled(grain.MapDataset.source(source), seed).map(transform)
    dataset = dataset.batch(batch_size * group, drop_remainder=True, batch_fn=collate_group)[start_step // group :]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch) if threads else 0)
    batches = itertools.chain.from_iterable(dataset.to_iter_dataset(options))
    return itertools.islice(batches, start_step % group, None)


def by_length(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """Splits examples into equal parts of similar lengths.

    The parts are ordered by each one's first example, not from short to long, so that updates do not follow the
    length.
    """
    if parts == 1:
        return [list(examples)]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids_T))
    size = len(examples) // parts
    groups = sorted(sorted(order[i : i + size]) for i in range(0, len(order), size))
    return [[examples[i] for i in group] for group in groups]


def _shuffled(dataset: grain.MapDataset, seed: int) -> Any:
    # Grain shuffles epoch e with seed + e, so that neighbouring seeds would have the same orders one epoch
    # apart. A hash of the seed prevents it.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return dataset.shuffle(seed=spread).repeat()


def _check(seed: int, step: int, batch_size: int, dataset_size: int) -> None:
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative, got {seed} and {step}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if dataset_size < 1:
        raise ValueError("the source holds no record")
