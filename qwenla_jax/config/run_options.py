"""Every setting of a training run: names, types, defaults, bounds and help. The defaults are the embedded tiny ones.

See `config.schema` for how settings are read and checked. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.schema import group, option
from qwenla_jax.config.shared_options import (
    DTYPES,
    MOST_IMAGES,
    MOST_ROWS,
    MOST_SECONDS,
    MOST_WORKERS,
    MeshOptions,
    PromptOptions,
    ReattentionOptions,
)
from qwenla_jax.data.datasets.readers import READERS
from qwenla_jax.rewards.built_in import BuiltInOptions


@dataclasses.dataclass(frozen=True)
class DataOptions(PromptOptions):
    """Questions, their images and how they are cut to size."""

    source: str | None = option(
        "scenes",
        "training questions: scenes, brief_scenes, marked_scenes, length_scenes, easy_vqa, a .jsonl of {id, image, "
        "question, answer[, response]} or of messages, a dataset as NAME:PATH "
        f"({', '.join(READERS)}), with filters and names of columns behind it "
        "(#max_options=N&images=1&kinds=A|B&turns=first&columns=FIELD:COLUMN|FIELD:COLUMN), or a mixture of these: "
        "SOURCE*WEIGHT,SOURCE*WEIGHT",
    )
    eval_source: str | None = option(None, "held-out questions, like source; none: the held-out part of source")
    max_invalid: int = option(
        0,
        "so many records may be invalid (unreadable, too long, without a right answer): the next valid one replaces "
        "each, and data/invalid counts them; 0: the first one ends the run",
        low=0,
    )
    leaks: str = option(
        "warn",
        "when images of the evaluation are in the training data: warn (compares ids, files and COCO's numbers before "
        "the first step), refuse (compares appearance too, which opens every image), ignore",
        choices=("warn", "refuse", "ignore"),
    )
    size: int | None = option(None, "train on only this many of the source's questions; none: all of them", low=1)
    batch_size: int = option(
        8, "questions of one optimizer step, over all devices and all microbatches", low=1, high=MOST_ROWS
    )
    reflection_share: float = option(
        0.5, "scenes, easy_vqa: share of the written responses that hold one reflection", low=0, high=1
    )
    correction_share: float = option(
        0.3, "scenes: share of the reflections that correct a wrong reasoning", low=0, high=1
    )
    response_style: str = option(
        "structured",
        "scenes, stage sft: structured (the paper's format) or plain (no sections: how a base model writes)",
        choices=("structured", "plain"),
    )
    max_images: int = option(1, "a question with more images is an error", low=1, high=MOST_IMAGES)
    length_group: int = option(
        1, "this many batches share out their questions by length, so that less of a batch is padding", low=1, high=1024
    )
    threads: int = option(
        1, "threads that prepare data ahead of the step; 0: in the step's own thread", low=0, high=MOST_WORKERS
    )


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW and its learning rate."""

    learning_rate: float = option(2e-4, "highest learning rate, reached at the end of the warm-up", above=0)
    b1: float = option(0.9, "AdamW: decay of the gradient's mean", low=0, below=1)
    b2: float = option(0.95, "AdamW: decay of the squared gradient's mean", low=0, below=1)
    eps: float = option(1e-8, "AdamW: added to the root of the squared gradient's mean", above=0)
    weight_decay: float = option(0.0, "AdamW: decoupled weight decay", low=0)
    warmup_ratio: float = option(0.01, "share of the steps in which the learning rate rises from 0", low=0, high=1)
    schedule: str = option(
        "constant", "after the warm-up: constant, or cosine or linear to 0", choices=("constant", "cosine", "linear")
    )
    clip_norm: float | None = option(1.0, "scale gradients down to this global norm; none or inf: never", above=0)
    accumulation: int = option(
        1, "equal microbatches of a batch, computed one after the other; saves memory, same gradient", low=1
    )
    trainable: tuple[tuple[str, str], ...] = option(
        ((".*", "train"),),
        "pairs (regular expression of whole parameter paths, train, freeze, or tags: of embedding and head only the "
        "rows of the ten tags); the first that matches counts",
        choices=("train", "freeze", "tags"),
    )


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters: the base model is frozen and stored in `dtype`, adapters are trained in `param_dtype`."""

    rank: int | None = option(
        None, "r, the inner width of an adapter; none: the model itself is trained", low=1, high=MOST_ROWS
    )
    alpha: float = option(16.0, "what an adapter adds is scaled by alpha / rank", above=0)
    modules: tuple[str, ...] = option(
        (r"decoder/layers/(attn|mlp)/\w+/kernel",),
        "regular expressions of whole parameter paths: the kernels that get an adapter. What else is trained is up to "
        "optim.trainable, whose ('.*', 'train') then trains nothing of the base model",
    )


@dataclasses.dataclass(frozen=True)
class BrpoOptions:
    """Sampling and objective of stage brpo."""

    group_size: int = option(8, "G: responses sampled a question", low=2, high=MOST_ROWS)
    temperature: float = option(1.0, "sampling temperature", above=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this probability; 1: all", above=0, high=1)
    beta: float = option(0.1, "weight of the KL divergence from the frozen reference", low=0)
    reference: str = option(
        "device",
        "where the frozen reference is between updates: device, or host, from where each update copies it",
        choices=("device", "host"),
    )
    clip_low: float = option(0.2, "the probability ratio is clipped below at 1 - clip_low", low=0, high=1)
    clip_high: float = option(0.2, "the probability ratio is clipped above at 1 + clip_high", low=0)
    rollout_batch: int | None = option(
        None, "questions sampled at once; none: as many as in a microbatch of an update", low=1, high=MOST_ROWS
    )
    group_parts: int = option(
        1,
        "parts in which an update works through the responses to a question, for long ones: same gradient, less memory",
        low=1,
        high=MOST_ROWS,
    )
    inner_updates: int = option(1, "mu: optimizer steps taken on one set of samples", low=1, high=1024)
    rollout_weights: str = option(
        "same",
        "the decoder's weights while sampling: the same, or int8: rounded with a scale for each output",
        choices=("same", "int8"),
    )
    importance_sampling: str = option(
        "none",
        "correction of the difference between the sampler's probabilities and the trained model's by their ratio, of "
        "each token or of the response; beyond the bounds it is truncated, or masked: set to 0",
        choices=("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )
    importance_min: float = option(0.0, "lower bound of that ratio", low=0)
    importance_max: float = option(3.0, "upper bound of that ratio", above=0)
    norm: str = option(
        "sequence",
        "what the loss is divided by: sequence (each response counts equally, GRPO), token (each token does, DAPO), "
        "constant (responses times their longest length, Dr.GRPO)",
        choices=("sequence", "token", "constant"),
    )
    ratio: str = option(
        "token",
        "probability ratio of each token, or of the sequence: the geometric mean over a response (GSPO)",
        choices=("token", "sequence"),
    )
    kl: str = option(
        "k3",
        "estimate of the KL divergence: k3, k2, or k1, whose expected gradient on policy is zero",
        choices=("k1", "k2", "k3"),
    )
    scale: str = option(
        "group",
        "advantages are divided by the standard deviation of the group, of the batch, or not (none, Dr.GRPO)",
        choices=("group", "batch", "none"),
    )
    std_eps: float = option(1e-4, "added to the standard deviation that advantages are divided by", above=0)
    std_floor: float = option(0.0, "least standard deviation, before std_eps", low=0)
    reward_total: str = option(
        "raw",
        "raw: the weighted rewards are summed, then normalised; normalised: each within its group first, then the sum "
        "over the batch (GDPO)",
        choices=("raw", "normalised"),
    )
    drop_zero_std_groups: bool = option(
        False, "leave out zero-std groups: questions whose responses all have the same reward"
    )
    resample_rounds: int = option(
        0,
        "with drop_zero_std_groups: sample at most so many further batches of questions to replace them (DAPO)",
        low=0,
        high=1024,
    )
    mask_truncated: bool = option(
        False, "responses cut off at their longest length count in the group, but are not trained on"
    )


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """The processes that rewards run in. A reward that fails excludes its response from the step, and no other."""

    workers: int = option(2, "processes", low=1, high=MOST_WORKERS)
    deadline_s: float = option(5.0, "seconds that the rewards of one response may take", above=0, high=MOST_SECONDS)
    step_deadline_s: float = option(120.0, "seconds that the rewards of a step may take", above=0, high=MOST_SECONDS)
    memory_mb: int = option(4096, "address space of a process, in MB", low=256)


@dataclasses.dataclass(frozen=True)
class RewardOptions(BuiltInOptions):
    """Weights and options of the built-in rewards, further rewards, and where they run."""

    extra: tuple[str, ...] = option(
        (),
        "further rewards: module:function, or module:function=WEIGHT; rewards.reward_record documents their argument",
    )
    pool: PoolOptions = group(PoolOptions, "the processes that rewards run in")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Greedy decoding of held-out questions."""

    every: int = option(100, "steps between evaluations; 0: only before and after", low=0)
    size: int = option(200, "questions of an evaluation on the way", low=1)
    final_size: int = option(1000, "questions of the evaluations before and after; 0: none", low=0)
    batch_size: int = option(64, "questions decoded at once", low=1, high=MOST_ROWS)
    attention: bool = option(
        True, "measure on the first batch the attention that visual tokens receive from responses (visual/attn_mass)"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints in the work folder."""

    every: int = option(100, "steps between checkpoints; 0: only the last step", low=0)
    keep: int = option(2, "newest checkpoints to keep", low=1)


@dataclasses.dataclass(frozen=True)
class GuardOptions:
    """Checks that end a run."""

    check_first_step: bool = option(True, "end the run if the first step of BRPO is not on policy")
    max_skipped: int = option(10, "end the run after so many updates in a row that were not finite or empty", low=1)
    stall_s: float | None = option(
        1800.0,
        "end the run, with a stack trace of every thread, after so many seconds without progress; none: never",
        above=0,
        high=MOST_SECONDS,
    )


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """Metrics, and tables of completions (stage brpo)."""

    every: int = option(1, "steps between metric lines", low=1)
    sinks: tuple[str, ...] = option(
        ("tensorboard",),
        "where metrics and completions go beside the work folder's own files: tensorboard, trackio, wandb",
        choices=("tensorboard", "trackio", "wandb"),
    )
    completions_every: int = option(
        50, "steps between tables of completions, beside the first step's and every evaluation's; 0: none", low=0
    )
    completions_rows: int = option(16, "responses in a table of completions", low=1)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """One training run."""

    stage: str = option("brpo", "how it is trained: sft (supervised) or brpo", choices=("sft", "brpo"))
    preset: str = option("tiny", "name of the preset that the settings started from; for the record")
    seed: int = option(0, "seed of parameters, data order and sampling", low=0, high=2**31 - 1)
    steps: int = option(400, "optimizer steps", low=1)
    init_from: str | None = option(
        "tiny",
        "starting point: tiny (the embedded checkpoint), a Hugging Face checkpoint folder, a model of the Hub "
        "(ORG/NAME or ORG/NAME@REVISION), random:tiny, or random:PATH of a config.json",
    )
    dtype: str = option("float32", "type of computation", choices=DTYPES)
    param_dtype: str = option("float32", "type of stored parameters", choices=DTYPES)
    remat: str = option(
        "none",
        "activations computed again in the backward pass: none, dots (store matrix products), full (store nothing)",
        choices=("none", "dots", "full"),
    )
    attention: str = option(
        "auto",
        "what computes attention, with equal results: auto (the backend's kernel where it applies), xla, splash (TPU), "
        "cudnn (GPU, bfloat16)",
        choices=("auto", "xla", "splash", "cudnn"),
    )
    data: DataOptions = group(DataOptions, "questions and images")
    optim: OptimOptions = group(OptimOptions, "optimizer")
    lora: LoraOptions = group(LoraOptions, "low-rank adapters instead of whole parameters")
    brpo: BrpoOptions = group(BrpoOptions, "BRPO; unused in stage sft")
    rewards: RewardOptions = group(RewardOptions, "rewards; unused in stage sft")
    reattention: ReattentionOptions = group(ReattentionOptions, "re-attention: images before reflections")
    mesh: MeshOptions = group(MeshOptions, "devices")
    eval: EvalOptions = group(EvalOptions, "evaluation")
    checkpoint: CheckpointOptions = group(CheckpointOptions, "checkpoints")
    log: LogOptions = group(LogOptions, "metrics and completions")
    guard: GuardOptions = group(GuardOptions, "checks that end a run")

    @property
    def inference(self) -> InferenceConfig:
        """The part of these settings that sampling and evaluation need."""
        # A frozen base is stored in the type of computation.
        param_dtype = self.dtype if self.lora.rank else self.param_dtype
        return InferenceConfig.of(self, param_dtype=param_dtype, batch_size=self.eval.batch_size)
