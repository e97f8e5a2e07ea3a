"""A stand-in for the released base model, at tiny scale: it reads images and answers in plain text, without tags.

The paper's pipeline begins with Qwen2.5-VL-7B-Instruct. `--config=configs/base.py` trains the embedded architecture
from random parameters on captions, workings and boxed answers of rendered scenes, so that stages 1 and 4 have a start.
"""

from ml_collections import config_dict

from qwenla_jax.config.run_options import (
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LogOptions,
    OptimOptions,
    RunOptions,
)
from qwenla_jax.recipes.presets import pick, presets


def _tiny() -> RunOptions:
    return RunOptions(
        stage="sft",
        preset="tiny",
        steps=4000,
        init_from="random:tiny",
        remat="dots",
        data=DataOptions(batch_size=32, length_group=8, response_style="plain"),
        optim=OptimOptions(learning_rate=1e-3, warmup_ratio=0.05, schedule="cosine", weight_decay=0.01),
        eval=EvalOptions(every=0),
        checkpoint=CheckpointOptions(every=500),
        log=LogOptions(every=10),
    )


PRESETS = presets(_tiny)


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none: larger base models are released ones."""
    return pick("base", PRESETS, preset)
