"""A batch that several processes (hosts) make together: each holds its own rows, all agree on the shapes.

Every host draws the same records, so nothing has to be sent between them: the sizes are those of the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwenla_jax.data.collate import Buckets
from qwenla_jax.data.transforms import Example


@dataclasses.dataclass(frozen=True)
class Host:
    """One of the processes that share a batch.

    Attributes:
      index: from 0.
      count: of all processes.

    Raises:
      ValueError: not 0 <= index < count.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuses an index outside."""
        if not 0 <= self.index < self.count:
            raise ValueError(f"process_index must be 0 to {self.count - 1}, got {self.index}")

    @classmethod
    def of(cls, process_index: int | None = None, process_count: int | None = None) -> Host:
        """The given one; this process as JAX numbers it where nothing is given."""
        count = jax.process_count() if process_count is None else process_count
        index = jax.process_index() if process_index is None else process_index
        return cls(index, count)

    def share(self, rows: int) -> slice:
        """The rows that are this host's, of so many.

        Raises:
          ValueError: they do not divide.
        """
        if rows % self.count:
            raise ValueError(f"{rows} rows do not divide over {self.count} processes")
        own = rows // self.count
        return slice(self.index * own, (self.index + 1) * own)


def agreed(examples: Sequence[Example], buckets: Buckets, count: int, tag: int) -> Buckets:
    """The sizes that all hosts' parts of a batch take: one of each axis, so that the parts fit together.

    Args:
      examples: of the whole batch, rows of the first host first.
      buckets: the sizes allowed of one host's part.
      count: of hosts.
      tag: the id before which pictures may be put in.

    Returns:
      Buckets of one size an axis, with which `data.collate` pads each host's part to the same shape.

    Raises:
      ValueError: an example fits no bucket, named by its record; rows that do not divide over the hosts.
    """
    slots, visual, pictures = buckets.slots[0], buckets.visual[0], buckets.least[0]
    prompts, tokens = buckets.prompts[0], buckets.tokens[0]
    response = tags = 0
    for example in examples:
        whose = f"record {example.record.id!r}"
        pictures = max(pictures, len(example.frames))
        for frame in example.frames:
            slots = max(slots, buckets.fit("slots", len(frame.valid_S), whose))
            visual = max(visual, buckets.fit("visual", frame.num_visual_tokens, whose))
        # A batch of prompts has no use for `tokens`, and one of whole texts none for `prompts`.
        prompts = max(prompts, _up_to(buckets.prompts, example.prompt_length))
        tokens = max(tokens, _up_to(buckets.tokens, len(example.ids_T)))
        answer = example.ids_T[example.prompt_length :]
        response, tags = max(response, len(answer)), max(tags, int((answer == tag).sum()))
    parts = [examples[Host(index, count).share(len(examples))] for index in range(count)]
    totals = [sum(len(example.frames) for example in part) for part in parts]
    frames = buckets.fit("frames", max(totals), f"a host's part of {len(parts[0])} records")
    return Buckets(
        (frames,), (slots,), (visual,), (prompts,), (tokens,), buckets.patch_values, (pictures, response, tags)
    )


def _up_to(sizes: tuple[int, ...], size: int) -> int:
    return next((each for each in sizes if each >= size), sizes[-1])


def in_place(batch: Any, host: Host) -> Any:
    """A host's part with its visual tokens counted as in the whole batch, where other hosts' pictures come before.

    Args:
      batch: (vision, texts, ...), from `data.collate`, perhaps in parts stacked on a leading axis.
      host: whose part it is.
    """
    vision, text, *rest = batch
    before = host.index * vision.gather_IxM.shape[-2] * vision.gather_IxM.shape[-1]
    name = "visual_BxT" if hasattr(text, "visual_BxT") else "visual_QxP"
    index = getattr(text, name)
    moved = np.where(index >= 0, index + before, -1).astype(index.dtype)
    return vision, text.replace(**{name: moved}), *rest
