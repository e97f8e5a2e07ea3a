"""What both stages share: model, data, layouts, and the compiled programs made from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.collate import Buckets, collate_prompts, collate_responses, ladder, make_buckets
from qwenla_jax.data.batching.example import Example, to_prompt_example, to_sft_example
from qwenla_jax.data.batching.loader import RecordSource, make_pipeline
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.data.record import Record, Split
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.sources.skip_invalid import SkipInvalid
from qwenla_jax.inference.load import start
from qwenla_jax.inference.read_examples import Read, WithMet, usable
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kernels import check_backend
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.parallel.distributed import is_multiprocess, place
from qwenla_jax.parallel.mesh import make_mesh
from qwenla_jax.parallel.sharding import activation_rules, batch_sharding, gathered, replicated
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sampler import sample
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import PromptBatch, ResponseBatch, Rollout, VisionBatch, VisualTokens

Sampler = Callable[[Params, VisionBatch, PromptBatch, int, np.ndarray], Rollout]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A run's fixed parts.

    Attributes:
      options: the run's settings.
      mesh: the devices.
      model: the Linen module, its configuration within.
      layouts: the parameters' shardings, those of adapters among them.
      tokenizer, processor, layout: how text and images become numbers.
      logit_bias_V: float32 added to all logits: suppressed tokens.
    """

    options: RunOptions
    mesh: Mesh
    model: QwenVL
    shardings: Any
    tokenizer: Tokenizer
    processor: ProcessorSettings
    layout: ImageLayout
    logit_bias_V: np.ndarray

    def buckets(self, rows: int) -> Buckets:
        """The shapes that batches of `rows` rows may have."""
        data = self.options.data
        return make_buckets(
            self.layout,
            rows,
            self.processor.min_pixels,
            self.processor.max_pixels,
            data.max_prompt_tokens,
            data.max_prompt_tokens + data.max_response_tokens,
            shards=self.row_shards,
        )

    @property
    def row_shards(self) -> int:
        """Equal runs of rows that lie on different devices."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def example(self, with_response: bool) -> Callable[[Any], Example]:
        """Record to example."""
        make = to_sft_example if with_response else to_prompt_example
        return functools.partial(
            make, tok=self.tokenizer, settings=self.processor, layout=self.layout, system=self.options.data.system
        )

    def usable(
        self, source: RecordSource, with_response: bool, note: Callable[[str], None] | None = None
    ) -> SkipInvalid[Example]:
        """The source's examples, with the next whole one in the place of a record that cannot be used.

        An image that cannot be opened, a prompt or response that is too long, and more than one image make a record
        unusable; together with those that the source left out there may be `data.max_invalid`.

        Args:
          source: of `make_run_source`.
          with_response: whether examples come with their responses.
          note: told of each invalid record.
        """
        return usable(source, self.example(with_response), self.options.data, note)

    def batches(
        self,
        source: SkipInvalid[Example],
        collate: Callable[[Sequence[Example], Buckets], Any],
        step: int,
        again: int | None = None,
    ) -> Iterator[tuple[Any, list[Record], int]]:
        """Training batches from step `step` on, in A equal parts stacked on a leading axis.

        Args:
          source: of `usable`.
          collate: `data.collate`'s, with all but the buckets bound.
          step: counted from 0.
          again: make a pair of the batch: itself, and once more in parts of so many rows.

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
        """One batch of given records, as `batches` would make it; or in parts of so many rows."""
        example = self.example(with_response)
        return self._stacked([example(record) for record in records], collate, rows)

    def encoder(self) -> Callable[[Params, VisionBatch], VisualTokens]:
        """The vision tower compiled: (params, images of a batch in parts) -> their visual tokens in parts."""
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

    def sampling_program(self, options: SampleOptions) -> Any:
        """The jitted `sampling.loop.sample`: (params, vision, prompts, bias, seed, step, sample numbers) -> Rollout."""
        rows, whole = batch_sharding(self.mesh), replicated(self.mesh)

        def program(params: Params, *inputs: Any) -> Rollout:
            if self.options.mesh.gather_to_sample:
                params = jax.tree.map(lambda x: x.astype(self.options.dtype), params)
                params = jax.lax.with_sharding_constraint(params, gathered(self.shardings))
            return sample(self.model, options, params, *inputs)

        return jax.jit(
            program,
            in_shardings=(self.shardings, rows, rows, whole, whole, whole, rows),
            out_shardings=whole if is_multiprocess() else rows,  # where each process is to see all of them
        )

    def sampler(self, options: SampleOptions) -> Sampler:
        """A compiled sampler: (params, vision, prompts, step, sample numbers) -> Rollout."""
        compiled = self.sampling_program(options)
        rows = batch_sharding(self.mesh)
        seed = np.uint32(self.options.seed)

        def call(params: Params, vision: VisionBatch, prompts: PromptBatch, step: int, sample_B: np.ndarray) -> Rollout:
            vision, prompts, sample_B = place((vision, prompts, sample_B), rows)
            with self.context():
                return compiled(params, vision, prompts, self.logit_bias_V, seed, np.uint32(step), sample_B)

        return call

    def sample_options(self, group_size: int, temperature: float, top_p: float = 1.0) -> SampleOptions:
        """Sampling with this run's response length and stop tokens."""
        return SampleOptions(
            group_size,
            self.options.data.max_response_tokens,
            temperature,
            top_p,
            self.tokenizer.ids.stop(),
            self.reattention(),
            self.row_shards,
        )

    def reattention(self) -> ReattentionConfig:
        """Whether and how this run's reflections look at the images again."""
        ids = self.tokenizer.ids
        options = dataclasses.asdict(self.options.reattention)
        return ReattentionConfig(**options, open_id=ids.reflection_open, close_id=ids.reflection_close)

    def collate_prompts(
        self, examples: Sequence[Example], buckets: Buckets, batch_size: int | None = None
    ) -> tuple[VisionBatch, PromptBatch]:
        """`data.collate.collate_prompts`, with the images' blocks where this run puts them in."""
        block = self.options.reattention if self.reattention().inserts else None
        return collate_prompts(examples, buckets, batch_size, block)

    def collate_responses(
        self, examples: Sequence[Example], buckets: Buckets, batch_size: int | None = None
    ) -> tuple[VisionBatch, PromptBatch, ResponseBatch]:
        """`data.collate.collate_responses` with this run's sizes and this run's way to look again."""
        own = self.options.reattention
        return collate_responses(
            examples,
            buckets,
            batch_size,
            response_buckets(self.options.data.max_response_tokens),
            insertion_buckets(own.max_insertions),
            self.options.reattention,
            self.tokenizer.ids.reflection_open,
        )

    def context(self) -> Any:
        """The context in which programs are traced: the mesh and the meaning of the logical axes."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(activation_rules())
        return stack


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


def build(options: RunOptions) -> tuple[Runtime, Params]:
    """Loads the model and makes everything that does not depend on the step.

    Returns:
      the run's fixed parts, and the parameters it starts from.

    Raises:
      ValueError: settings that do not fit the devices or the checkpoint.
    """
    mesh = make_mesh(options.mesh)
    check_rows(options, mesh)
    check_backend(options.attention, jax.default_backend())
    first = start(options, mesh)
    runtime = assemble(options, mesh, first.model, first.shardings, first.tokenizer, first.processor)
    return runtime, first.params


def check_rows(options: RunOptions, mesh: Mesh) -> None:
    """Raises ValueError where the rows of a batch do not divide over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = options.data.batch_size // options.optim.accumulation
    sizes = [("data.batch_size / optim.accumulation", rows), ("eval.batch_size", options.eval.batch_size)]
    sizes += [("brpo.rollout_batch", options.brpo.rollout_batch)] if options.brpo.rollout_batch else []
    for key, size in sizes:
        if size % shards:
            raise ValueError(f"config.{key}: {size} rows do not divide over {shards} devices (mesh data x fsdp)")


def assemble(
    options: RunOptions,
    mesh: Mesh,
    model: QwenVL,
    shardings: Any,
    tokenizer: Tokenizer,
    processor: ProcessorSettings,
) -> Runtime:
    """The fixed parts of a run on a mesh, whose devices need not be there: nothing is put on them.

    Args:
      options: the run's settings.
      mesh: the devices.
      model, layouts, tokenizer, processor: what the run starts from; of the processor the bounds are still the
        checkpoint's.
    """
    config = model.config
    return Runtime(
        options=options,
        mesh=mesh,
        model=model,
        shardings=shardings,
        tokenizer=tokenizer,
        processor=processor_of(options, processor),
        layout=layout_of(config),
        logit_bias_V=suppression_bias(config.text.vocab_size, tokenizer.vocab_size, tokenizer.ids.suppressed()),
    )


def processor_of(options: RunOptions, processor: ProcessorSettings) -> ProcessorSettings:
    """The checkpoint's image processor with the run's bounds."""
    low, high = options.data.min_pixels, options.data.max_pixels
    return dataclasses.replace(
        processor,
        min_pixels=low or min(processor.min_pixels, high or processor.min_pixels),
        max_pixels=high or max(processor.max_pixels, low or processor.max_pixels),
    )


def layout_of(config: ModelConfig) -> ImageLayout:
    """How the model's vision tower wants patches."""
    vision = config.vision
    return ImageLayout(
        vision.patch_size,
        vision.spatial_merge_size,
        vision.temporal_patch_size,
        vision.window_size,
        vision.tokens_per_second,
    )


def stack_microbatches(batches: Sequence[Any]) -> Any:
    """Batches of one run of parts, padded to a common shape and stacked on a leading axis.

    Parts of one step may have fallen into different buckets; the larger one holds them all. What is padded lies behind
    every length and is never read, but for `visual` indexes, which count by the padded number of visual tokens.
    """
    if len(batches) == 1:
        return jax.tree.map(lambda x: x[None], batches[0])
    return jax.tree_util.tree_map_with_path(_pad_and_stack, *[_common_visual(batch, batches) for batch in batches])


def _common_visual(batch: Any, batches: Sequence[Any]) -> Any:
    """The batch with the largest I and M of all parts: every run of frames padded, visual indexes counted anew."""
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


def response_buckets(longest: int) -> tuple[int, ...]:
    """Lengths that responses are cut to before the update: what no response of a step reaches is not computed."""
    return ladder(min(16, longest), longest, 8)


def insertion_buckets(most: int) -> tuple[int, ...]:
    """Insertions of a response that an update makes room for: one, for most responses have no more, or the cap."""
    return tuple(sorted({min(1, most), most}))
