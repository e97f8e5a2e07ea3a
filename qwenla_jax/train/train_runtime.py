"""The parts of a run that do not change: the model with its sampler, and the training batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.loader import RecordSource, make_pipeline
from qwenla_jax.data.record import Record, Split
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.sources.skip_invalid import SkipInvalid
from qwenla_jax.inference.load import model_config, start
from qwenla_jax.inference.read_examples import Read, WithMet, usable
from qwenla_jax.inference.runtime import Runtime, assemble, check_rows
from qwenla_jax.model.kernels import check_backend
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.parallel.distributed import place
from qwenla_jax.parallel.mesh import make_mesh
from qwenla_jax.parallel.sharding import batch_sharding
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.train.adapters import add_adapters, kernels_to_adapt
from qwenla_jax.types import VisionBatch, VisualTokens


@dataclasses.dataclass(frozen=True)
class TrainRuntime(Runtime):
    """The runtime of a training run.

    Attributes:
      options: the run's settings; `config` is the part of them that sampling needs.
    """

    options: RunOptions

    def usable(
        self, source: RecordSource, with_response: bool, note: Callable[[str], None] | None = None
    ) -> SkipInvalid[Example]:
        """The source's examples; an invalid record is replaced by the next valid one.

        A record is invalid if an image cannot be opened, prompt or response is too long, or it has a video or more than
        `config.data.max_images` images. With those that the source left out there may be at most
        `config.data.max_invalid`.

        Args:
          source: of `make_run_source`.
          with_response: whether examples come with their responses.
          note: called with a message for each invalid record.
        """
        return usable(source, self.example(with_response), self.config, note)

    def rollout_options(self) -> SampleOptions:
        """How the responses of BRPO are sampled."""
        brpo = self.options.brpo
        options = self.sample_options(brpo.group_size, brpo.temperature, brpo.top_p)
        return dataclasses.replace(options, int8=brpo.rollout_weights == "int8")

    def batches(
        self,
        source: SkipInvalid[Example],
        collate: Callable[[Sequence[Example], Buckets], Any],
        step: int,
        again: int | None = None,
    ) -> Iterator[tuple[Any, list[Record], int]]:
        """Training batches from step `step` on, in A equal microbatches stacked on a leading axis.

        Args:
          source: of `usable`.
          collate: from `data.batching.collate`, with all but the buckets bound.
          step: counted from 0.
          again: return a pair: the batch, and the same batch in microbatches of so many rows.

        Returns:
          the batch, the records of its rows, and how many invalid records the whole batch met.
        """
        data = self.options.data

        def stack(read: Sequence[Read]) -> tuple[Any, list[Record], int]:
            examples = [one.example for one in read]
            batch = self._stacked(examples, collate)
            batch = batch if again is None else (batch, self._stacked(examples, collate, again))
            return batch, [e.record for e in examples], sum(one.met for one in read)

        return make_pipeline(
            WithMet(source),
            lambda one: one,
            stack,
            data.batch_size,
            self.options.seed,
            step,
            data.threads,
            group=data.length_group,
        )

    def _stacked(
        self,
        examples: Sequence[Example],
        collate: Callable[[Sequence[Example], Buckets], Any],
        rows: int | None = None,
    ) -> Any:
        rows = rows or self.options.data.batch_size // self.options.optim.accumulation
        buckets = self.buckets(rows)
        return stack_microbatches([collate(examples[i : i + rows], buckets) for i in range(0, len(examples), rows)])

    def stack(
        self,
        records: Sequence[Record],
        collate: Callable[[Sequence[Example], Buckets], Any],
        with_response: bool,
        rows: int | None = None,
    ) -> Any:
        """One batch of given records, as `batches` would make it; or in microbatches of so many rows."""
        example = self.example(with_response)
        return self._stacked([example(record) for record in records], collate, rows)

    def encoder(self) -> Callable[[Params, VisionBatch], VisualTokens]:
        """The vision tower compiled: (params, images in microbatches) -> their visual tokens."""
        rows = batch_sharding(self.mesh, leading=1)

        @functools.partial(jax.jit, in_shardings=(self.shardings, rows), out_shardings=rows)
        def run(params: Params, vision: VisionBatch) -> VisualTokens:
            return VisualTokens(
                jax.lax.map(lambda part: self.model.apply({"params": params}, part, method="encode"), vision),
                vision.shards,
            )

        def call(params: Params, vision: VisionBatch) -> VisualTokens:
            with self.context():
                return run(params, place(vision, rows))

        return call


def make_run_source(options: RunOptions, split: Split) -> RecordSource:
    """The questions of one split of a run; see `data.sources` for what it raises."""
    data = options.data
    name = data.source if split != "held_out" or data.eval_source is None else data.eval_source
    assert name is not None
    return make_source(
        name,
        split,
        seed=options.seed,
        size=data.size if split != "held_out" else None,
        reflection_share=data.reflection_share,
        correction_share=data.correction_share,
        style=data.response_style if split == "cold_start" else "structured",
        whole=data.eval_source is not None,
        max_invalid=data.max_invalid,
    )


def build(options: RunOptions) -> tuple[TrainRuntime, Params]:
    """Loads the model, adds the adapters, and makes the runtime.

    Returns:
      the runtime, and the parameters that the run starts from.

    Raises:
      ValueError: settings that do not fit the devices or the checkpoint.
    """
    config = options.inference
    mesh = make_mesh(config.mesh)
    check_batches(options, mesh)
    check_backend(config.attention, jax.default_backend())
    # A wrong expression fails before weights are read; a random model has none, and costs a tokenizer's training.
    if options.lora.rank and not (config.init_from or "").startswith("random:"):
        kernels_to_adapt(options, model_config(config))
    first = add_adapters(options, start(config, mesh), mesh)
    runtime = assemble(config, mesh, first.model, first.shardings, first.tokenizer, first.processor)
    return for_training(runtime, options), first.params


def for_training(runtime: Runtime, options: RunOptions) -> TrainRuntime:
    """A runtime with the settings of a run."""
    parts = {field.name: getattr(runtime, field.name) for field in dataclasses.fields(Runtime)}
    return TrainRuntime(**parts, options=options)


def check_batches(options: RunOptions, mesh: Mesh) -> None:
    """Raises ValueError where the rows of a batch do not divide over the mesh."""
    rows = options.data.batch_size // options.optim.accumulation
    sizes = {"data.batch_size / optim.accumulation": rows, "eval.batch_size": options.eval.batch_size}
    if options.brpo.rollout_batch:
        sizes["brpo.rollout_batch"] = options.brpo.rollout_batch
    check_rows(mesh, sizes)


def stack_microbatches(batches: Sequence[Any]) -> Any:
    """The microbatches of a step, padded to a common shape and stacked on a leading axis.

    Microbatches may have different buckets; they are padded to the largest. Padding is after every length and never
    read. Only `visual` indexes change, since they count by the padded number of visual tokens.
    """
    if len(batches) == 1:
        return jax.tree.map(lambda x: x[None], batches[0])
    return jax.tree_util.tree_map_with_path(_pad_and_stack, *[_common_visual(batch, batches) for batch in batches])


def _common_visual(batch: Any, batches: Sequence[Any]) -> Any:
    """The batch with the largest I and M of all: every shard of frames padded, visual indexes recomputed."""
    vision, text, *rest = batch
    shards, (frames, old) = vision.shards, vision.gather_IxM.shape
    most, new = np.max([other[0].gather_IxM.shape for other in batches], axis=0)
    room = (most - frames) // shards

    def padded(x: np.ndarray) -> np.ndarray:
        split = x.reshape(shards, frames // shards, *x.shape[1:])
        return np.pad(split, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 1)]).reshape(most, *x.shape[1:])

    name = "visual_BxT" if hasattr(text, "visual_BxT") else "visual_QxP"
    index = getattr(text, name)
    frame, token = np.divmod(index, old)
    frame += frame // (frames // shards) * room
    moved = np.where(index >= 0, frame * new + token, -1).astype(index.dtype)
    return jax.tree.map(padded, vision), text.replace(**{name: moved}), *rest


def _pad_and_stack(path: Any, *arrays: np.ndarray) -> np.ndarray:
    shape = np.max([a.shape for a in arrays], axis=0)
    fill = -1 if path[-1].name.startswith(("visual_", "source_")) else 0  # -1: no image's token
    return np.stack(
        [np.pad(a, [(0, n - m) for n, m in zip(shape, a.shape, strict=True)], constant_values=fill) for a in arrays]
    )
