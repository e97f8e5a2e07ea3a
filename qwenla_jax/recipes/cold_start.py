"""Cold start (paper's stage 1): supervised fine-tuning on structured answers, some of which hold a reflection.

`--config=configs/cold_start.py` trains the embedded tiny model from random parameters on rendered scenes; its presets
`brief` goes on from there and makes the embedded checkpoint, `working` and `long` from that a base model of the study;
`--config=configs/cold_start.py:7b` is the recipe at full size; `qwenla distill --make=cold_start` makes its records.
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
from qwenla_jax.data.synthetic.length_options import LONG_TOKENS, SHORT_TOKENS, WORKINGS, LengthOptions
from qwenla_jax.recipes import sft_copy
from qwenla_jax.recipes.presets import pick, presets


def _tiny() -> RunOptions:
    return RunOptions(
        stage="sft",
        preset="tiny",
        steps=4000,
        init_from="random:tiny",
        remat="dots",
        # Few corrections, in the guess (not measured alone) that many teach a small model to doubt what it saw right.
        data=DataOptions(batch_size=32, length_group=8, correction_share=0.15),
        optim=OptimOptions(learning_rate=1e-3, warmup_ratio=0.05, schedule="cosine", weight_decay=0.01),
        eval=EvalOptions(every=500),
        checkpoint=CheckpointOptions(every=500),
        log=LogOptions(every=10),
    )


def _brief() -> RunOptions:
    """Unlearns to describe every image: two thirds of the responses are brief, and of these only reflections describe.

    So BRPO has something to learn: that describing, in a reflection or in the caption, makes answers right.
    """
    tiny = _tiny()
    return dataclasses.replace(
        tiny,
        preset="brief",
        steps=2400,
        init_from=None,
        data=dataclasses.replace(tiny.data, source="scenes*1,brief_scenes*2", reflection_share=0.4),
        optim=dataclasses.replace(tiny.optim, learning_rate=3e-4, b2=0.999),
        eval=EvalOptions(every=0),
    )


_SHORT, _LONG = LengthOptions(*SHORT_TOKENS, WORKINGS), LengthOptions(*LONG_TOKENS, WORKINGS)


def _working() -> RunOptions:
    """Teaches reasoning with a working that has to be kept, and to tell what is seen behind it; both short."""
    brief, told = _brief(), dataclasses.replace(_SHORT, told=True)
    return dataclasses.replace(
        brief,
        preset="working",
        steps=4000,
        seed=2000,
        data=dataclasses.replace(
            brief.data,
            source=f"{brief.data.source},{_SHORT.setting()}*5,{told.setting()}*2",
            max_prompt_tokens=128,
            max_response_tokens=144,
        ),
        optim=dataclasses.replace(brief.optim, learning_rate=1e-3),
    )


def _long() -> RunOptions:
    """Teaches long reasoning, but not to read an image behind it.

    What stands behind a long reasoning is learned from scenes that the question tells in words; where an image is asked
    about, a response with a long reasoning breaks off at its end.
    """
    working = _working()
    told, cut = dataclasses.replace(_LONG, told=True), dataclasses.replace(_LONG, cut=True)
    source = f"{_brief().data.source},{_SHORT.setting()}*5,{told.setting()}*1,{cut.setting()}*1"
    return dataclasses.replace(
        working,
        preset="long",
        steps=1200,
        seed=1000,
        data=dataclasses.replace(working.data, source=source, max_response_tokens=442),
    )


def _large(preset: str) -> RunOptions:
    """Paper silent on the settings of this stage: its settings of the later supervised stage stand in for them.

    From there: learning rate, AdamW, warm-up, vision tower and projector frozen, 262,144 pixels, and 64 questions a
    step (batch 1 on each of 8 GPUs, accumulation 8; here one number over all devices, in 8 parts). Ours, because the
    paper is silent there too: 3 epochs of its 2,000 records (94 steps), cosine decay, clipping at 1.0, the whole
    decoder with its embedding trained, 4,096 prompt tokens, the 1,024 response tokens of BRPO.
    """
    later, change = sft_copy.large(preset, ReattentionOptions()), dataclasses.replace
    return change(
        later,
        steps=94,
        data=change(later.data, max_invalid=20),  # one in a hundred
        optim=change(later.optim, trainable=(("visual/.*", "freeze"), (".*", "train"))),
        checkpoint=CheckpointOptions(every=50),
        reattention=ReattentionOptions(),
    )


PRESETS = presets(_tiny, _large, brief=_brief, working=_working, long=_long)


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none."""
    return pick("cold_start", PRESETS, preset)
