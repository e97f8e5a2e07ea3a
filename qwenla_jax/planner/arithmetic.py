"""What a step needs of each chip, by arithmetic alone: operations, memory, traffic. For GPUs there is no more.

Every response is as long as it may be, so all figures are upper ends. Memory counts what the programs are known to
hold; what a compiler adds (copies, padding of tiles) is not in it, and what it saves by sharing buffers neither.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.shared_options import MeshOptions
from qwenla_jax.data.batching.example import Example
from qwenla_jax.model.attention import query_block
from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig
from qwenla_jax.model.kernels import kernel_for
from qwenla_jax.model.lora import base_of
from qwenla_jax.model.trainable import trainable_labels, trained_part
from qwenla_jax.planner.compiled import Load, abstract_params, example
from qwenla_jax.planner.flops import Work, brpo_step_work, decode, decoder_forward, head, patch_embed, vision_forward
from qwenla_jax.planner.hlo import Collective
from qwenla_jax.tools.dry_run import parameter_counts
from qwenla_jax.train.loop import abstract_state, state_plan
from qwenla_jax.train.token_logprobs import VOCAB_CHUNK
from qwenla_jax.train.train_runtime import TrainRuntime

SIZES = {"float32": 4, "bfloat16": 2}
MOST_FSDP = 64  # devices that share out the parameters; further ones repeat them


def choose_mesh(options: RunOptions, config: ModelConfig, chips: int) -> MeshOptions:
    """A mesh for so many chips: the rows over as many as they divide by, and the heads over the rest.

    What the settings ask for counts where it fits the chips: a mesh that is not the default one is left as it is.

    Raises:
      ValueError: neither rows nor heads divide over the chips.
    """
    own = options.mesh
    if (own.data, own.fsdp, own.tensor) != (-1, 1, 1):
        return own
    rows = options.data.batch_size // options.optim.accumulation
    for tensor in (1, 2, 4, 8, 16, 32):
        shards, left = divmod(chips, tensor)
        heads = config.text.num_heads % tensor or config.vision.num_heads % tensor
        if left or heads or rows % shards or options.eval.batch_size % shards:
            continue
        fsdp = math.gcd(shards, MOST_FSDP)
        return dataclasses.replace(own, data=shards // fsdp, fsdp=fsdp, tensor=tensor)
    raise ValueError(
        f"config.mesh: {chips} chips: {rows} rows (data.batch_size / optim.accumulation), {options.eval.batch_size} of "
        f"an evaluation and {config.text.num_heads} heads do not divide over them"
    )


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract values with layouts."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _shard_numbers(tree: Any) -> int:
    """The same in numbers."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One update on one chip, in numbers.

    Attributes:
      parts: A, parts of a batch.
      questions: Q of a part on the chip's shard of rows.
      rounds: batches that a step samples one after the other.
      sampled: questions of such a batch on the chip's shard of rows.
      group: G; 1 in supervised training.
      passes: of an update over a part: it has all questions, and 1 / passes of the responses to each.
      prompt, response: tokens, the batch's buckets.
      patches_IxW: patches in each window of each of a question's images.
      slots: patch slots of a question's images, padding included.
      tensor: devices that split heads and widths.
    """

    parts: int
    questions: float
    rounds: int
    sampled: float
    group: int
    passes: int
    prompt: int
    response: int
    patches_IxW: np.ndarray
    slots: int
    tensor: int


def sizes_of(runtime: TrainRuntime, load: Load) -> Sizes:
    """The sizes of a run's update.

    Raises:
      ValueError: see `compiled.example`.
    """
    options, mesh = runtime.options, runtime.mesh
    one: Example = example(runtime, load)
    window = runtime.layout.window_slots
    buckets = runtime.buckets(1)
    valid_IxS = np.stack([frame.valid_S for frame in one.frames])
    parts, shards = options.optim.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
    rounds = options.data.batch_size // options.brpo.rollout_batch if options.brpo.rollout_batch else parts
    return Sizes(
        parts=parts,
        questions=options.data.batch_size / parts / shards,
        rounds=rounds,
        sampled=options.data.batch_size / rounds / shards,
        group=options.brpo.group_size if options.stage == "brpo" else 1,
        passes=options.brpo.group_parts if options.stage == "brpo" else 1,
        prompt=buckets.fit("prompts", len(one.ids_T), "the prompt"),
        response=options.data.max_response_tokens,
        patches_IxW=valid_IxS.reshape(len(valid_IxS), -1, window).sum(2),
        slots=len(valid_IxS) * buckets.fit("slots", valid_IxS.shape[1], "the image"),
        tensor=mesh.shape["tensor"],
    )


@dataclasses.dataclass(frozen=True)
class Resident:
    """What one chip holds from step to step; exact, from the layouts.

    Attributes:
      params: numbers of its share of the parameters.
      trained: numbers of those that have a gradient and moments.
      components: bytes of "parameters", "optimiser" and, where it is no part of the parameters, "reference".
    """

    params: int
    trained: int
    components: dict[str, int]


def resident(runtime: TrainRuntime) -> Resident:
    """The share of one chip in a run's state."""
    options = runtime.options
    params = abstract_params(runtime)
    optimizer, shardings = state_plan(runtime, params)
    state = abstract_state(params, optimizer, shardings)
    kept = {"parameters": shard_bytes(state.params), "optimiser": shard_bytes(state.opt_state)}
    numbers = _shard_numbers(params)
    trained = trained_part(params, trainable_labels(params, options.optim.trainable))
    if options.stage == "brpo" and options.brpo.beta and options.dtype != options.param_dtype:
        # Beside adapters the base is the reference, but for what is trained of it.
        copied = _shard_numbers(base_of(trained)) if options.lora.rank else numbers
        kept["reference"] = copied * SIZES[options.dtype]
    return Resident(numbers, _shard_numbers(trained), kept)


def work(runtime: TrainRuntime, sizes: Sizes, kept: Resident) -> dict[str, Work]:
    """Operations and bytes moved to and from memory of one step on one chip, by phase ("rollout", "update").

    The bytes assume that a shard's rows read all weights of its share of the heads (whole layers are gathered), and
    that activations are rematerialised as the settings say.
    """
    config, options = runtime.model.config, runtime.options
    questions = max(1, round(sizes.questions * sizes.parts))
    share = sizes.questions * sizes.parts / questions / sizes.tensor
    patches = np.tile(sizes.patches_IxW, (questions, 1))
    value = SIZES[options.dtype]
    again = 1.0 if options.remat == "full" else 0.0
    # A frozen kernel has no gradient of its own, and nothing is propagated through a frozen tower.
    backward = 1 if options.lora.rank else 2
    adamw = Work(0.0, 7.0 * kept.trained * 4)
    if options.stage == "sft":
        T = sizes.prompt + sizes.response
        forward = (
            vision_forward(config.vision, patches, value)
            + decoder_forward(config.text, questions * T, questions * T * (T + 1) / 2, questions * T, value)
            + head(config.text, questions * sizes.response, value)
        )
        back = forward * (backward + again) - patch_embed(config.vision, float(patches.sum()), value)
        return {"update": (forward + back) * share + adamw}

    def step(questions: int, group: int) -> dict[str, dict[str, Work]]:
        prompt_Q, response_B = np.full(questions, sizes.prompt), np.full(questions * group, sizes.response)
        patches = np.tile(sizes.patches_IxW, (questions, 1))
        return brpo_step_work(config, patches, prompt_Q, response_B, 0, bool(options.brpo.beta), value)

    # Each pass sees the prompts again.
    parts = step(questions, sizes.group // sizes.passes)["update"]
    if options.lora.rank:
        parts["policy backward"] = parts["policy forward"] - vision_forward(config.vision, patches, value)
    update = (sum(parts.values(), Work()) + parts["policy forward"] * again) * sizes.passes
    # Each round reads the weights once a token.
    at_once = max(1, round(sizes.sampled))
    rollout = sum(step(at_once, sizes.group)["rollout"].values(), Work(0.0, -_rounded_away(runtime) * sizes.response))
    rollout = rollout * (sizes.sampled / at_once * sizes.rounds / sizes.tensor)
    return {"rollout": rollout, "update": update * share + adamw}


def least_token_bytes(runtime: TrainRuntime, sizes: Sizes) -> float:
    """Bytes that one chip has to read and write for a token of its rows, on average over the responses: the decoder's
    weights and the head's, and the keys and values that are filled.
    """
    questions = max(1, round(sizes.sampled))
    prompt_B = np.full(questions * sizes.group, sizes.prompt)
    response_B = np.full(questions * sizes.group, sizes.response)
    text, value = runtime.model.config.text, SIZES[runtime.options.dtype]
    layers = decode(text, prompt_B, response_B, sizes.group, value).bytes / sizes.response
    logits = head(text, float(len(prompt_B)), value).bytes
    return (layers + logits - _rounded_away(runtime)) / sizes.tensor


def least_bytes(options: RunOptions, config: ModelConfig) -> float:
    """Bytes that all chips together hold of a run's parameters, moments and reference, were everything split."""
    counts = parameter_counts(options, config)
    total = sum(counts.values())
    apart = options.stage == "brpo" and options.brpo.beta and options.dtype != options.param_dtype
    stored, computed = SIZES[options.param_dtype], SIZES[options.dtype]
    if options.lora.rank:
        return float(counts["freeze"] * computed + counts["adapters"] * (stored + 8))
    kept = total * stored + (counts["train"] + counts["tags"]) * 8
    return float(kept + (total * computed if apart else 0))


def transient(runtime: TrainRuntime, sizes: Sizes, kept: Resident, tpu: bool) -> dict[str, dict[str, float]]:
    """Bytes of one chip beside the resident ones, by phase and component; an estimate.

    On a TPU splash attention keeps scores on the chip, and copies the shared keys for every row. Elsewhere those of a
    block of queries are counted, though cuDNN may save them.
    """
    config, options = runtime.model.config, runtime.options
    text, vision = config.text, config.vision
    value = SIZES[options.dtype]
    fsdp, tensor = runtime.mesh.shape["fsdp"], sizes.tensor
    sampled = sizes.sampled
    Q, P, R = sizes.questions, sizes.prompt, sizes.response
    B = Q * sizes.group / sizes.passes
    kv_share = tensor if text.num_kv_heads % tensor == 0 else 1
    kv = 2 * text.num_layers * text.num_kv_heads * text.head_dim * value / kv_share
    # A base with adapters is stored as it is computed.
    cast = (kept.trained if options.lora.rank else kept.params) * value if options.dtype != options.param_dtype else 0.0
    layer = _kernel_numbers(config) / text.num_layers * value / tensor
    vocab = text.hidden_size * text.vocab_size * value / tensor
    heads = text.num_heads / tensor
    carried = value * (
        _saved(options.remat, text, text.num_kv_heads * text.head_dim) * text.num_layers * (B * R + Q * P)
        + _saved(options.remat, vision, vision.hidden_size) * vision.depth * Q * sizes.slots
    )
    row_kv = 2 * text.num_kv_heads * text.head_dim * value / kv_share
    splash = tpu and kernel_for(options.attention, "tpu") == "splash"

    def scores(rows: float, queries: int, keys: int) -> float:
        """Keys and values a row with splash, else scores; each with what the backward pass has of them."""
        if splash:
            return 2 * row_kv * rows * keys
        return 4 * 3 * heads * rows * query_block(queries, text.num_heads, keys) * keys

    inner = 4 * 3 * (text.intermediate_size / tensor) * max(B * R, Q * P)
    chunk = 4 * 3 * min(text.vocab_size, VOCAB_CHUNK) * min(4096, B * R)
    update = {
        "gradient": kept.trained * 4 * (2 if sizes.parts * sizes.passes > 1 else 1),
        "parameters as computed": cast,
        "activations": carried + kv * Q * P * 2,
        "temporaries": max(max(scores(B, R, P + R), scores(Q, P, P)) + inner, chunk) + 2 * layer + 2 * vocab,
    }
    if options.stage == "sft":
        return {"update": update}
    whole = options.mesh.gather_to_sample
    copied = cast
    if whole or options.brpo.rollout_weights == "int8":
        copied = (kept.params * value * fsdp - _rounded_away(runtime) / tensor) / (1 if whole else fsdp)
    rollout = {
        "parameters as computed": copied,
        "cache": kv * sampled * (P + sizes.group * R),
        "temporaries": max(scores(sampled, P, P) * 2 / 3, 4 * sampled * sizes.group * text.vocab_size * 3)
        + (0 if whole else 2 * layer + 2 * vocab),
    }
    return {"rollout": rollout, "update": update}


def _saved(remat: str, config: TextConfig | VisionConfig, keys: int) -> int:
    """Numbers a token that a layer keeps for its backward pass: its input, and the results of its products."""
    D, N = config.hidden_size, config.num_heads * config.head_dim
    products = 2 * N + 2 * keys + 2 * config.intermediate_size + 2 * D
    return D + {"full": 0, "dots": products, "none": 2 * products}[remat]


def _kernel_numbers(config: ModelConfig) -> int:
    """Parameters of the decoder's layers, without biases and norms."""
    text = config.text
    attention = text.hidden_size * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads)
    return text.num_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def _rounded_away(runtime: TrainRuntime) -> float:
    """Bytes that int8 kernels save the sampler, over all heads; 0 where it has the model's own."""
    options = runtime.options
    if options.brpo.rollout_weights != "int8":
        return 0.0
    return _kernel_numbers(runtime.model.config) * (SIZES[options.dtype] - 1.0)


def traffic(runtime: TrainRuntime, sizes: Sizes, kept: Resident) -> dict[str, list[Collective]]:
    """Collectives of one step on one chip, by phase; what a program with these layouts needs at least.

    Weights are gathered over fsdp for the prompts' pass and for the responses' pass of every forward and backward, the
    gradient is scattered over fsdp and reduced over data; tensor reduces activations twice a layer and pass.
    """
    config, options = runtime.model.config, runtime.options
    text = config.text
    value = SIZES[options.dtype]
    data, fsdp, tensor = (runtime.mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    weights, gradient = kept.params * value * fsdp, kept.trained * value * fsdp
    Q, P, R, A = sizes.questions, sizes.prompt, sizes.response, sizes.parts * sizes.passes
    B = Q * sizes.group / sizes.passes

    def phase(forward: int, backward: int, tokens: float, grads: bool) -> list[Collective]:
        rounds = forward + backward
        acts = round(tokens * text.hidden_size * value)
        result = [Collective("all-gather", weights, fsdp, 2 * rounds * A, "weights")] if fsdp > 1 else []
        if tensor > 1:
            result.append(Collective("all-reduce", acts, tensor, 2 * text.num_layers * rounds * A, "activations"))
        if grads and fsdp > 1:
            result.append(Collective("reduce-scatter", gradient, fsdp, 2 * A, "gradient"))
        if grads and data > 1:
            result.append(Collective("all-reduce", gradient // fsdp, data, 2 * A, "gradient"))
        return result

    reference = 1 if options.stage == "brpo" and options.brpo.beta else 0
    # A rematerialised layer runs forward again, on weights that its backward needs anyway.
    update = phase(1 + reference, 1 + (options.remat == "full"), B * R + Q * P, True)
    if options.stage == "sft":
        return {"update": update}
    rounds = (1 if options.mesh.gather_to_sample else R) * sizes.rounds
    sampled = round(weights - _rounded_away(runtime) / tensor)
    rollout = [Collective("all-gather", sampled, fsdp, rounds, "weights")] if fsdp > 1 else []
    if tensor > 1:
        acts = round(sizes.sampled * sizes.group * text.hidden_size * value)
        rollout.append(Collective("all-reduce", acts, tensor, 2 * text.num_layers * R * sizes.rounds, "activations"))
    return {"rollout": rollout, "update": update}
