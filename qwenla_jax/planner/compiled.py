"""The programs of a run, lowered from shapes alone: no weights, no devices, the same code that the run jits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.collate import collate_sft
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.record import Record
from qwenla_jax.inference.load import compute_settings, model_config, tiny_processor
from qwenla_jax.inference.runtime import assemble, response_buckets
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import QwenVL, init_params
from qwenla_jax.parallel.sharding import param_shardings
from qwenla_jax.planner.published import published_config, published_processor, published_sizes
from qwenla_jax.sampling.slot_sizes import paged, sizes_of_batch
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.train.adapters import kernels_to_adapt, with_adapters
from qwenla_jax.train.brpo.reference import reference_program, stored_reference_shardings
from qwenla_jax.train.brpo.update import RolloutBatch
from qwenla_jax.train.loop import abstract_state, state_plan
from qwenla_jax.train.programs import update_program
from qwenla_jax.train.train_runtime import TrainRuntime, check_batches, for_training
from qwenla_jax.train.train_state import TrainState
from qwenla_jax.types import PromptBatch, VisionBatch
from qwenla_jax.weights.hub import EMBEDDED


@dataclasses.dataclass(frozen=True)
class Load:
    """What a question of the planned run is like.

    Attributes:
      prompt_tokens: tokens of a prompt, its visual tokens included; the batch takes the bucket that holds them.
      width, height: pixels of each of its images, before the run's bounds; it has as many as the run allows.
    """

    prompt_tokens: int = 512
    width: int = 640
    height: int = 480


def planned_config(options: RunOptions) -> ModelConfig:
    """The architecture of `options.init_from`, or, where that is not set, of the released model of the preset's name.

    Raises:
      ValueError: there is neither.
    """
    size = options.preset.partition("_")[0]  # 7b_v5p8 is a 7b
    if options.init_from is None and size not in published_sizes():
        raise ValueError(
            f"config.init_from: the preset {options.preset!r} names no architecture; give random:PATH of a config.json"
        )
    config = published_config(size) if options.init_from is None else model_config(options.inference)
    return dataclasses.replace(config, **compute_settings(options.inference))


def abstract_runtime(options: RunOptions, mesh: Mesh) -> TrainRuntime:
    """The fixed parts of a run on a mesh whose devices need not be there.

    The embedded tokenizer stands in for the checkpoint's: ids are values or small constants, never sizes.

    Raises:
      ValueError: settings that do not fit the mesh, or see `planned_config`.
    """
    check_batches(options, mesh)
    tiny = (options.init_from or "").removeprefix("random:") == "tiny"
    config = planned_config(options)
    processor = tiny_processor() if tiny else published_processor(config.family)
    tokenizer = Tokenizer.from_folder(EMBEDDED).with_tags()
    shardings = param_shardings(config, mesh, kernels_to_adapt(options, config), options.lora.rank or 1)
    runtime = assemble(options.inference, mesh, QwenVL(config), shardings, tokenizer, processor)
    return for_training(runtime, options)


def abstract_params(runtime: TrainRuntime) -> Any:
    """Shapes, types and shardings of the parameters, adapters among them."""
    options, config = runtime.options, runtime.model.config
    kernels = kernels_to_adapt(options, config)

    def make() -> Any:
        params = init_params(config, jax.random.key(0))
        return with_adapters(options, params, kernels, jax.random.key(0)) if kernels else params

    return _laid_out(jax.eval_shape(make), runtime.shardings)


def _laid_out(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout), shapes, shardings)


def example(runtime: TrainRuntime, load: Load, response_tokens: int = 0) -> Example:
    """A question of the given size, and a response where `response_tokens` is above 0: of use for its shapes only.

    Raises:
      ValueError: the images alone need more than `load.prompt_tokens`.
    """
    images = runtime.config.max_images * (Image.new("RGB", (load.width, load.height)),)
    short = runtime.example(False)(Record("fit", images, "?", "?", None, ""))
    missing = load.prompt_tokens - len(short.ids_T)
    if missing < 0:
        raise ValueError(
            f"prompt_tokens: got {load.prompt_tokens}, but images of {load.width} x {load.height} pixels "
            f"(config.data.max_images: {len(images)}) with the least text take {len(short.ids_T)}"
        )
    more = missing + response_tokens
    # A response with insertions has as many tags as it may.
    reattention = runtime.reattention()
    tags = [reattention.open_id] * min(response_tokens, reattention.max_insertions)
    filled = np.concatenate([np.full(more - len(tags), short.ids_T[-1]), tags])
    return dataclasses.replace(
        short,
        ids_T=np.concatenate([short.ids_T, filled]).astype(np.int32),
        pos_Tx3=np.concatenate([short.pos_Tx3, np.repeat(short.pos_Tx3[-1:], more, axis=0)]),
        visual_T=np.concatenate([short.visual_T, np.full(more, -1, np.int32)]),
        prompt_length=load.prompt_tokens,
    )


def abstract_batch(runtime: TrainRuntime, load: Load) -> tuple[Any, ...]:
    """Shapes of the batch of one update, parts stacked on the leading axis, as the run's own collation makes them.

    For BRPO (vision, prompts, rollout batch), for supervised training what its collation returns; see
    `train.programs.batch_shardings`.
    """
    options = runtime.options
    sft = options.stage == "sft"
    one = [example(runtime, load, options.data.max_response_tokens if sft else 0)]
    buckets = runtime.buckets(1)
    if not sft:
        batch: tuple[Any, ...] = runtime.collate_prompts(one, buckets)
    elif runtime.reattention().inserts:
        batch = runtime.collate_responses(one, buckets)
    else:
        batch = collate_sft(one, buckets)
    parts = options.optim.accumulation
    rows = options.data.batch_size // parts
    # Every array's first axis is that of rows, or of images, of which a row has as many as it may.
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, rows * len(x), *x.shape[1:]), x.dtype), batch)
    wide = (wide[0].replace(shards=runtime.buckets(rows).shards), *wide[1:])
    return wide if sft else (*wide, _rollout_batch(runtime, wide[1]))


def _rollout_batch(runtime: TrainRuntime, prompts: PromptBatch) -> RolloutBatch:
    """Responses of the longest kind."""
    options = runtime.options
    parts, questions = prompts.length_Q.shape
    longest = response_buckets(options.data.max_response_tokens)[-1]

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((parts, questions * options.brpo.group_size, *shape), dtype)

    reattention, kept = runtime.reattention(), None
    if reattention.inserts:
        assert prompts.block is not None  # collated with the images' blocks
        kept = array(np.bool_, reattention.max_insertions, prompts.block.source_QxX.shape[2])
    one = array(np.float32)
    return RolloutBatch(
        array(np.int32, longest), array(np.float32, longest), array(np.int32), one, one, one, selected_BxExX=kept
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run's values in the abstract.

    Attributes:
      state: with layouts.
      reference: with layouts; None where there is none.
      batch: of one update, see `abstract_batch`.
      programs: name ("rollout", "reference", "update") -> `jax.stages.Lowered`, in the order of a step.
      pages: of a row's cache and of a prompt's in the rollout, all filled; see `model.pages`.
    """

    state: TrainState
    reference: Any
    batch: tuple[Any, ...]
    programs: dict[str, jax.stages.Lowered]
    pages: tuple[int, int] = (1, 1)


def plan_programs(runtime: TrainRuntime, load: Load) -> Planned:
    """Lowers the programs of one step of a run, for the devices of its mesh.

    Raises:
      ValueError: see `example`.
    """
    options = runtime.options
    params = abstract_params(runtime)
    optimizer, shardings = state_plan(runtime, params)
    state = abstract_state(params, optimizer, shardings)
    batch = abstract_batch(runtime, load)
    bias = jax.ShapeDtypeStruct(runtime.logit_bias_V.shape, runtime.logit_bias_V.dtype)
    programs, reference, pages = {}, None, (1, 1)
    with runtime.context():
        if options.stage == "brpo":
            vision, prompts, _ = batch
            programs["rollout"] = lower_rollout(runtime, params, vision, prompts)
            pages = _page_counts(runtime, prompts)
            if options.brpo.beta:
                make = reference_program(runtime)
                reference = _laid_out(jax.eval_shape(make, params), stored_reference_shardings(runtime))
                if options.dtype != options.param_dtype and jax.tree.leaves(reference):
                    programs["reference"] = make.lower(params)
            batch = (reference, *batch)
        programs["update"] = update_program(runtime, optimizer, shardings).lower(state, *batch, bias)
    return Planned(state, reference, batch, programs, pages)


def lower_rollout(runtime: TrainRuntime, params: Any, vision: VisionBatch, prompts: PromptBatch) -> jax.stages.Lowered:
    """The sampler for the questions that a run samples at once, with their images. Call it inside `runtime.context()`.

    Args:
      runtime, params: of the run.
      vision, prompts: of its parts, which a run without `rollout_batch` samples one after the other.
    """
    options = runtime.options.brpo
    questions = options.rollout_batch or prompts.length_Q.shape[1]
    sampling = runtime.rollout_options()
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((questions, *x.shape[2:]), x.dtype), (vision, prompts))
    number = jax.ShapeDtypeStruct((), np.uint32)
    bias = jax.ShapeDtypeStruct(runtime.logit_bias_V.shape, runtime.logit_bias_V.dtype)
    return runtime.sampling_program(sampling, part[1]).lower(
        params, *part, bias, number, number, jax.ShapeDtypeStruct((questions * options.group_size,), np.uint32)
    )


def _page_counts(runtime: TrainRuntime, prompts: PromptBatch) -> tuple[int, int]:
    """`Planned.pages` of the rollout of prompts in parts."""
    sampling = runtime.rollout_options()
    sizes = sizes_of_batch(
        sampling.reattention, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), prompts)
    )
    sampling = paged(sampling, sizes, on_one_cpu=False)
    return sampling.pages(sizes.cache(sampling))[0], sampling.pages(sizes.prompt)[0]
