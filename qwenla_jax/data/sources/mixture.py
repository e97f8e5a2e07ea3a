"""Several sources as one, in given proportions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

import numpy as np

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.record import Record

LARGEST_BLOCK = 100_000


class Mixture:
    """Several sources as one; the record at an index is a pure function of the index, weights and sizes.

    Indices come in blocks of the same length, each with exactly the same number of records of each source, spread out
    evenly. A source repeats no record before all have been used; the mixture ends with the block in which the
    last source has been used once.

    Args:
      sources: by name. A record's id gets the name before it ("we_math/12"), so that ids of different sources differ.
      weights: of the same names, any positive numbers; decimals are exact as written (0.1 is a tenth).
      seed: every pass through a source is shuffled anew; None keeps the source's order.

    Raises:
      ValueError: names that differ, a weight that is not positive, a source without records, or proportions that need
        a block of more than `LARGEST_BLOCK`.
    """

    def __init__(
        self,
        sources: Mapping[str, RecordSource],
        weights: Mapping[str, float | Fraction],
        seed: int | None = None,
    ) -> None:
        if not sources or set(sources) != set(weights):
            raise ValueError(f"weights are of {sorted(weights)}, sources of {sorted(sources)}; expected the same names")
        for name in sources:
            if not math.isfinite(weights[name]) or weights[name] <= 0:
                raise ValueError(f"weight of {name!r} is {weights[name]}; expected a positive number")
            if len(sources[name]) < 1:
                raise ValueError(f"source {name!r} holds no record")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self._names = tuple(sources)
        self._sources = dict(sources)
        self._seed = seed
        self._counts = _whole([Fraction(str(weights[name])) for name in self._names])
        self._order = _spread(self._counts)
        # How many of the same source come before each place of the block.
        self._before = np.zeros(len(self._order), np.int64)
        for source in range(len(self._names)):
            here = self._order == source
            self._before[here] = np.arange(here.sum())
        sizes = [len(sources[name]) for name in self._names]
        blocks = max(-(-size // count) for size, count in zip(sizes, self._counts, strict=True))
        self._length = blocks * len(self._order)
        self._passes: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._length

    @property
    def block(self) -> dict[str, int]:
        """Records of each source in every block."""
        return dict(zip(self._names, self._counts, strict=True))

    @property
    def sources(self) -> Mapping[str, RecordSource]:
        """The sources by name."""
        return MappingProxyType(self._sources)

    def firsts(self) -> list[int]:
        """The indices in a first pass through their source: each record once, in the mixture's order."""
        count = np.array(self._counts)[self._order]
        size = np.array([len(self._sources[name]) for name in self._names])[self._order]
        blocks = np.arange(self._length // len(self._order))[:, None]
        return np.flatnonzero((blocks * count + self._before < size).reshape(-1)).tolist()

    def place(self, index: int) -> tuple[str, int]:
        """The source of an index, and the index within it.

        Raises:
          IndexError: outside the mixture.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside a mixture of {self._length} records")
        block, at = divmod(int(index), len(self._order))
        source = int(self._order[at])
        drawn = block * self._counts[source] + int(self._before[at])
        name = self._names[source]
        number, inner = divmod(drawn, len(self._sources[name]))
        return name, int(self._pass(source, number)[inner]) if self._seed is not None else inner

    def __getitem__(self, index: int) -> Record:
        """The record at an index; raises what its source raises."""
        name, inner = self.place(index)
        record = self._sources[name][inner]
        return dataclasses.replace(record, id=f"{name}/{record.id}")

    def _pass(self, source: int, number: int) -> np.ndarray:
        """The order of a source's pass; the last few are cached."""
        order = self._passes.get((source, number))
        if order is None:
            # By the name, so that adding a source does not reorder the others.
            assert self._seed is not None  # without one `place` asks for no order
            name = self._names[source]
            order = np.random.default_rng([self._seed, number, *name.encode()]).permutation(len(self._sources[name]))
            if len(self._passes) >= 4 * len(self._names):
                self._passes = {}
            self._passes[source, number] = order
        return order


class Picked:
    """Some records of a source, in a given order.

    Args:
      source: the records.
      indices: which of them.

    Raises:
      ValueError: there is none.
    """

    def __init__(self, source: RecordSource, indices: Sequence[int]) -> None:
        if not indices:
            raise ValueError("no record was picked")
        self.source, self._indices = source, tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        """The record; raises what its source raises."""
        return self.source[self._indices[index]]


def _whole(weights: list[Fraction]) -> list[int]:
    """Weights as the smallest whole numbers in the same proportions."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * scale) for weight in weights]
    shared = math.gcd(*counts)
    counts = [count // shared for count in counts]
    if sum(counts) > LARGEST_BLOCK:
        raise ValueError(
            f"weights {', '.join(map(str, weights))} need blocks of {sum(counts)}; at most {LARGEST_BLOCK}: round them"
        )
    return counts


def _spread(counts: list[int]) -> np.ndarray:
    """Which source is at each place of a block: the k-th of n comes (k + 1/2) / n of the way through it."""
    places = [((k + 0.5) / count, source) for source, count in enumerate(counts) for k in range(count)]
    return np.array([source for _, source in sorted(places)], np.int64)
