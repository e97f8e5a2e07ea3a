"""A source's records as examples of a run; invalid records are replaced by valid ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.record import Record
from qwenla_jax.data.sources.factory import sources_of
from qwenla_jax.data.sources.skip_invalid import SkipInvalid, TooManyInvalid
from qwenla_jax.data.sources.splits import SelectedRecords


@dataclasses.dataclass(frozen=True)
class Examples:
    """A source's records as examples; reading one raises ValueError where the run cannot use it.

    Attributes:
      source: the records.
      make: record to example.
      config: its lengths.
    """

    source: RecordSource
    make: Callable[[Record], Example]
    config: InferenceConfig

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """The example at an index.

        Raises:
          ValueError: the record cannot be read, has a video or too many images, or its prompt or response is too long.
        """
        return fitting(self.make(self.source[index]), self.config)


class TooLong(ValueError):
    """A prompt or response is longer than the run allows.

    Attributes:
      reason: the kind of fault, for counting.
    """

    reason = "too_long"


def fitting(example: Example, config: InferenceConfig) -> Example:
    """The example, if a run can use it.

    Raises:
      ValueError: it has a video, too many images, or its prompt or response is too long; the message names the record.
    """
    n, name = example.prompt_length, f"record {example.record.id!r}"
    if example.record.videos:
        raise ValueError(f"{name} has a video; a run takes images only")
    images = len(example.record.images)
    if images > config.max_images:
        raise ValueError(f"{name} has {images} images; config.data.max_images is {config.max_images}")
    for what, size in (("prompt", n), ("response", len(example.ids_T) - n)):
        most = getattr(config, f"max_{what}_tokens")
        if size > most:
            visual = int((example.visual_T >= 0).sum())
            part = f", {visual} of them visual ({images} images)" if what == "prompt" else ""
            raise TooLong(f"{name}: its {what} has {size} tokens{part}; config.data.max_{what}_tokens is {most}")
    return example


def usable(
    source: RecordSource,
    make: Callable[[Record], Example],
    config: InferenceConfig,
    note: Callable[[str], None] | None = None,
) -> SkipInvalid[Example]:
    """The examples of a source; an invalid record is replaced by the next valid one.

    Args:
      source: the records.
      make: record to example.
      config: from its `max_invalid` the records that the source left out already are subtracted.
      note: called with a message when an invalid record is met for the first time.
    """
    return SkipInvalid(Examples(source, make, config), _left(source, config), note, _advice(config))


def whole(source: RecordSource, make: Callable[[Record], Example], config: InferenceConfig) -> Iterator[Example]:
    """The usable examples of a source in its order, each once: for an evaluation, which must not count one twice.

    Raises (when read):
      TooManyInvalid: more records are invalid than `max_invalid` allows.
    """
    examples, most = Examples(source, make, config), _left(source, config)
    invalid: list[str] = []
    for index in range(len(source)):
        try:
            example = examples[index]
        except ValueError as error:
            invalid.append(str(error))
            if len(invalid) > most:
                message = "\n".join(invalid[:5])
                raise TooManyInvalid(
                    f"{len(invalid)} held-out records are invalid, at most {most} may be{_advice(config)}:\n{message}"
                ) from error
            continue
        yield example


def _left(source: RecordSource, config: InferenceConfig) -> int:
    left_out = sum(len(part.faults) for part in sources_of(source).values() if isinstance(part, SelectedRecords))
    return max(0, config.max_invalid - left_out)


def _advice(config: InferenceConfig) -> str:
    return f" (config.data.max_invalid is {config.max_invalid}; train.py --check_data finds all)"


@dataclasses.dataclass(frozen=True)
class Read:
    """An example, and how many invalid records were met before it."""

    example: Example
    met: int

    @property
    def ids_T(self) -> np.ndarray:
        """Token ids: a pipeline groups examples by their length."""
        return self.example.ids_T


@dataclasses.dataclass(frozen=True)
class WithMet:
    """Examples together with the number of invalid records that each one replaces."""

    source: SkipInvalid[Example]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Read:
        return Read(*self.source.read(index))


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of usable examples."""

    source: SkipInvalid[Example]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """The record at an index, or the valid one that replaces it."""
        return self.source[index].record
