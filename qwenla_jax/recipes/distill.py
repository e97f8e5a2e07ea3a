"""Distillation with verification (paper's stage 3): answers of the trained model, checked, as data for stage 4.

`--config=configs/distill.py` samples the embedded tiny checkpoint on rendered scenes; `--config=configs/distill.py:7b`
is the paper's recipe. `--config=configs/distill.py:cold_start` makes the data of stage 1 with a teacher.
"""

from ml_collections import config_dict

from qwenla_jax.distill.distill_options import (
    DistillOptions,
    EndpointOptions,
    JudgeOptions,
    QuestionOptions,
    SamplingOptions,
    VerifyOptions,
)
from qwenla_jax.recipes.presets import pick, presets


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


def _cold_start() -> DistillOptions:
    """Paper: 2,000 records of LLaVA-CoT-100k, the reflections by GPT-4o, then checked by hand.

    Paper silent, ours: what the teacher is asked (`distill.teacher.INSTRUCTION`), how long a reflection may be (25 to
    200 tokens, around the 100 that BRPO's reward aims at), no judges.
    """
    return DistillOptions(
        preset="cold_start",
        make="cold_start",
        init_from=None,
        data=QuestionOptions(source=None, max_invalid=20, size=2000, max_response_tokens=1024),
        verify=VerifyOptions(verifiers=("rule",), min_reflection_tokens=25, max_reflection_tokens=200),
        teacher=EndpointOptions(max_reply_tokens=2048),
    )


PRESETS = presets(_tiny, _large, cold_start=_cold_start)


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
    """The settings of a preset. Raises ValueError for a name that is none."""
    return pick("distill", PRESETS, preset)
