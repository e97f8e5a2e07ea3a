"""Stage 4 with COPY: supervised training of the base model on distilled answers, all visual tokens again at every
reflection (paper, section Visual re-attention).

`--config=configs/sft_copy.py --config.data.source=DISTILLED/accepted.jsonl --config.init_from=BASE/hf` is the embedded
default's size; `--config=configs/sft_copy.py:7b` carries the paper's settings.
"""

import dataclasses

from ml_collections import config_dict

from qwenla_jax.config.run_options import (
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LogOptions,
    OptimOptions,
    RunOptions,
)
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.recipes.presets import Presets, pick, presets

# Vision tower and merger frozen; of embedding and head only the rows of the new tags (paper, stage 4).
TRAINABLE = (("visual/.*", "freeze"), (r"decoder/(embed/embedding|lm_head/kernel)", "tags"), (".*", "train"))


def tiny(reattention: ReattentionOptions) -> RunOptions:
    """The settings at the embedded default's size, the same for every re-attention."""
    return RunOptions(
        stage="sft",
        preset="tiny",
        steps=800,
        init_from=None,
        remat="dots",
        data=DataOptions(source=None, eval_source="scenes", batch_size=32, length_group=8),
        optim=OptimOptions(
            learning_rate=1e-3, b2=0.999, warmup_ratio=0.05, schedule="cosine", weight_decay=0.01, trainable=TRAINABLE
        ),
        eval=EvalOptions(every=0),
        checkpoint=CheckpointOptions(every=200),
        log=LogOptions(every=10),
        reattention=reattention,
    )


def large(preset: str, reattention: ReattentionOptions) -> RunOptions:
    """The paper's settings, given there for 7b on 8 GPUs: batch 1 a GPU and accumulation 8, so 64 answers a step.

    13 epochs of its 40,000 answers are 8,125 steps. Paper silent: the schedule after the warm-up (cosine), clipping
    (1.0), prompt and response lengths (4,096 and 1,024 tokens), the most insertions of a response (4).
    """
    return RunOptions(
        stage="sft",
        preset=preset,
        steps=8125,
        init_from=None,
        dtype="bfloat16",
        param_dtype="float32",  # bfloat16 is too coarse for updates as small as these
        remat="full",
        data=DataOptions(
            source=None,
            max_invalid=400,  # one in a hundred
            batch_size=64,
            max_prompt_tokens=4096,
            max_response_tokens=1024,
            max_pixels=262_144,
            length_group=8,
            system="You are a helpful assistant.",
            threads=8,
        ),
        optim=OptimOptions(
            learning_rate=1e-5,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            warmup_ratio=0.01,
            schedule="cosine",
            accumulation=8,
            trainable=TRAINABLE,
        ),
        eval=EvalOptions(every=0, final_size=200, batch_size=16),
        checkpoint=CheckpointOptions(every=200),
        reattention=dataclasses.replace(reattention, max_insertions=4),
    )


def presets_with(reattention: ReattentionOptions) -> Presets:
    """The presets, the same for every re-attention."""
    return presets(lambda: tiny(reattention), lambda size: large(size, reattention))


PRESETS = presets_with(ReattentionOptions(mode="copy"))


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none."""
    return pick("sft_copy", PRESETS, preset)
