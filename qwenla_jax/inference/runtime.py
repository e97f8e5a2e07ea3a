"""A model ready for inference: its mesh, shardings and tokenizer, and the engines and programs made from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.data.batching.collate import Buckets, collate_prompts, collate_responses, ladder, make_buckets
from qwenla_jax.data.batching.example import Example, to_prompt_example, to_sft_example
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.inference.load import start
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kernels import check_backend
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.parallel.mesh import make_mesh
from qwenla_jax.parallel.sharding import activation_rules, gathered
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.param_layout import cast, cast_shardings
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.slot_sizes import paged, sizes_of_batch
from qwenla_jax.sampling.slots import rollout_program
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import PromptBatch, ResponseBatch, VisionBatch
from qwenla_jax.utils.visible import in_brief


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A model on its devices, with what sampling needs.

    Attributes:
      config: the settings.
      mesh: the devices.
      model: the Linen module with its configuration.
      shardings: of the parameters, adapters included.
      tokenizer, processor, layout: how text and images become arrays.
      logit_bias_V: float32, see `token.suppression_bias`.
    """

    config: InferenceConfig
    mesh: Mesh
    model: QwenVL
    shardings: Any
    tokenizer: Tokenizer
    processor: ProcessorSettings
    layout: ImageLayout
    logit_bias_V: np.ndarray

    def buckets(self, rows: int) -> Buckets:
        """The shapes that batches of `rows` rows may have."""
        config = self.config
        return make_buckets(
            self.layout,
            rows,
            self.processor.min_pixels,
            self.processor.max_pixels,
            config.max_prompt_tokens,
            config.max_prompt_tokens + config.max_response_tokens,
            config.max_images,
            shards=self.row_shards,
        )

    @property
    def row_shards(self) -> int:
        """Equal shards of rows, each on its own devices."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def example(self, with_response: bool) -> Callable[[Any], Example]:
        """Record to example."""
        make = to_sft_example if with_response else to_prompt_example
        return functools.partial(
            make, tok=self.tokenizer, settings=self.processor, layout=self.layout, system=self.config.system
        )

    def engine(self, options: SampleOptions, buckets: Buckets, questions: int, slots: int | None = None) -> Engine:
        """An engine on the run's devices, without parameters yet; its programs compile when they are first called.

        Args:
          options: of `sample_options`.
          buckets, questions, slots: see there; None: as many slots as questions.
        """
        return Engine(
            self.model,
            None,
            options,
            buckets,
            slots or questions,
            self.logit_bias_V,
            questions=questions,
            token_bytes=self.tokenizer.token_bytes,
            mesh=self.mesh,
            shardings=self._sampling_shardings(options),
        )

    def sampling_program(self, options: SampleOptions, prompts: PromptBatch) -> Any:
        """See `slots.rollout_program`; for batches of the prompts' shapes."""
        sizes = sizes_of_batch(options.reattention, prompts)
        options = paged(options, sizes, on_one_cpu=False)
        shardings = self.shardings, self._sampling_shardings(options)
        return rollout_program(self.model.config, options, sizes, self.mesh, *shardings)

    def _sampling_shardings(self, options: SampleOptions) -> Any:
        shardings = gathered(self.shardings) if self.config.mesh.gather_to_sample else self.shardings
        return cast_shardings(shardings, options.int8)

    def sampling_params(self, params: Params, options: SampleOptions) -> Params:
        """The parameters as engines of such options take them: see `param_layout.cast`, and gathered if set so."""
        dtype, mesh = jnp.dtype(self.config.dtype), self.config.mesh
        if not (mesh.gather_to_sample or options.int8) and all(x.dtype == dtype for x in jax.tree.leaves(params)):
            return params
        own = functools.partial(cast, dtype=self.config.dtype, int8=options.int8)
        return jax.jit(own, out_shardings=self._sampling_shardings(options))(params)

    def sample_options(self, group_size: int, temperature: float, top_p: float = 1.0) -> SampleOptions:
        """Sampling options with the run's response length, stop tokens and re-attention."""
        return SampleOptions(
            group_size,
            self.config.max_response_tokens,
            temperature,
            top_p,
            self.tokenizer.ids.stop(),
            self.reattention(),
            self.row_shards,
            cuts=top_p < 1,
        )

    def reattention(self) -> ReattentionConfig:
        """The run's re-attention, with the tokenizer's ids.

        Raises:
          ValueError: the trigger is not one token that can be sampled and goes on.
        """
        options, ids = self.config.reattention, self.tokenizer.ids
        trigger = self.tokenizer.encode(options.trigger)
        if len(trigger) != 1 or trigger[0] in (*ids.suppressed(), *ids.stop()):
            raise ValueError(
                f"config.reattention.trigger: {in_brief(repr(options.trigger), 80)} is {len(trigger)} token(s) of this "
                "tokenizer; expected one, such as <REFLECTION>, that neither ends a response nor stands for images"
            )
        return ReattentionConfig(**dataclasses.asdict(options), open_id=trigger[0], close_id=ids.reflection_close)

    def collate_prompts(
        self, examples: Sequence[Example], buckets: Buckets, batch_size: int | None = None
    ) -> tuple[VisionBatch, PromptBatch]:
        """`data.batching.collate.collate_prompts`, with the images to insert where this run inserts any."""
        block = self.config.reattention if self.reattention().inserts else None
        return collate_prompts(examples, buckets, batch_size, block)

    def collate_responses(
        self, examples: Sequence[Example], buckets: Buckets, batch_size: int | None = None
    ) -> tuple[VisionBatch, PromptBatch, ResponseBatch]:
        """`data.batching.collate.collate_responses` with the run's sizes and re-attention."""
        return collate_responses(
            examples,
            buckets,
            batch_size,
            response_buckets(self.config.max_response_tokens),
            insertion_buckets(self.config.reattention.max_insertions),
            self.config.reattention,
            self.reattention().open_id,
        )

    def context(self) -> Any:
        """The context in which programs are traced: the mesh and the meaning of the logical axes."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(activation_rules())
        return stack


def build(config: InferenceConfig) -> tuple[Runtime, Params]:
    """Loads the model and its runtime.

    Raises:
      ValueError: settings that do not fit the devices or the checkpoint.
    """
    mesh = make_mesh(config.mesh)
    check_rows(mesh, {"eval.batch_size": config.batch_size})
    check_backend(config.attention, jax.default_backend())
    first = start(config, mesh)
    return assemble(config, mesh, first.model, first.shardings, first.tokenizer, first.processor), first.params


def check_rows(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises ValueError where the rows of a batch, by the setting that gives them, do not divide over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, size in sizes.items():
        if size % shards:
            raise ValueError(f"config.{key}: {size} rows do not divide over {shards} devices (mesh data x fsdp)")


def assemble(
    config: InferenceConfig,
    mesh: Mesh,
    model: QwenVL,
    shardings: Any,
    tokenizer: Tokenizer,
    processor: ProcessorSettings,
) -> Runtime:
    """A runtime on a mesh. Nothing is placed, so the devices may be abstract.

    Args:
      config: the settings.
      mesh: the devices.
      model, shardings, tokenizer, processor: what was loaded; the processor with the checkpoint's own bounds.

    Raises:
      ValueError: see `Runtime.reattention`.
    """
    sizes = model.config
    runtime = Runtime(
        config=config,
        mesh=mesh,
        model=model,
        shardings=shardings,
        tokenizer=tokenizer,
        processor=processor_of(config, processor),
        layout=layout_of(sizes),
        logit_bias_V=suppression_bias(sizes.text.vocab_size, tokenizer.vocab_size, tokenizer.ids.suppressed()),
    )
    runtime.reattention()  # refused here, not in the middle of a run
    return runtime


def processor_of(config: InferenceConfig, processor: ProcessorSettings) -> ProcessorSettings:
    """The checkpoint's image processor with the bounds of the settings."""
    low, high = config.min_pixels, config.max_pixels
    return dataclasses.replace(
        processor,
        min_pixels=low or min(processor.min_pixels, high or processor.min_pixels),
        max_pixels=high or max(processor.max_pixels, low or processor.max_pixels),
    )


def layout_of(config: ModelConfig) -> ImageLayout:
    """The layout of patches that the model's vision tower needs."""
    vision = config.vision
    return ImageLayout(
        vision.patch_size,
        vision.spatial_merge_size,
        vision.temporal_patch_size,
        vision.window_size,
        vision.tokens_per_second,
    )


def response_buckets(longest: int) -> tuple[int, ...]:
    """Lengths that responses are padded to in the update: the smallest that fits a batch's longest response."""
    return ladder(min(16, longest), longest, 8)


def insertion_buckets(most: int) -> tuple[int, ...]:
    """Insertions of a response that an update makes room for: one, which most responses need, or the cap."""
    return tuple(sorted({min(1, most), most}))
