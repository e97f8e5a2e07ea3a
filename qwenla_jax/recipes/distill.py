"""Distillation with verification (paper's stage 3): answers of the trained model, checked, as data for stage 4.

`--config=configs/distill.py` samples the embedded tiny checkpoint on rendered scenes; `--config=configs/distill.py:7b`
is the paper's recipe.
"""

from ml_collections import config_dict

from qwenla_jax.distill.distill_options import (
    DistillOptions,
    JudgeOptions,
    QuestionOptions,
    SamplingOptions,
    VerifyOptions,
)
from qwenla_jax.recipes.presets import settings_of


def _tiny() -> DistillOptions:
    return DistillOptions(
        preset="tiny",
        data=QuestionOptions(size=4000),
        sampling=SamplingOptions(samples=4, temperature=1.0),
        verify=VerifyOptions(verifiers=("rule", "agreement"), agreement_min=2, keep="first"),
    )


def _large(preset: str) -> DistillOptions:
    """The paper's settings: 40,000 questions, 4 judges, 2 votes reject.

    Paper silent: answers a question (here 1), temperature (1.0, that of training), how long an answer may be (the
    1,024 tokens of training), which models judge (to be given, 4 of them), how many of them may fail (1). Answers that
    break the format cannot be trained on, so `format` comes first. The conclusions of these questions are free text, so
    their comparison by rule, and agreement between samples, are left to who wants them.
    """
    return DistillOptions(
        preset=preset,
        init_from=None,
        dtype="bfloat16",
        param_dtype="bfloat16",  # nothing is updated here
        data=QuestionOptions(
            source=None,
            max_invalid=400,  # one in a hundred
            size=40_000,
            batch_size=32,
            max_prompt_tokens=8192 - 1024,
            max_response_tokens=1024,
            max_pixels=640 * 480,
            system="You are a helpful assistant.",
        ),
        sampling=SamplingOptions(samples=1, temperature=1.0),
        verify=VerifyOptions(verifiers=("format", "judges"), keep="first"),
        judges=JudgeOptions(reject_votes=2, min_votes=3),
    )


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none."""
    return settings_of("distill", preset, _tiny, _large)
