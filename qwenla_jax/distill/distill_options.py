"""Every setting of a distillation run. Nothing here imports jax, so that `--help` and a refusal are instant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from qwenla_jax.config.checks import inference_relations, init_problems, source_problems
from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.schema import build, group, option, refuse
from qwenla_jax.config.shared_options import (
    DTYPES,
    MOST_PIXELS,
    MOST_ROWS,
    MOST_SECONDS,
    MOST_TOKENS,
    MOST_WORKERS,
    MeshOptions,
    ReattentionOptions,
)
from qwenla_jax.distill.endpoint import address_problem, read_key

VERIFIERS = ("format", "rule", "agreement", "judges")
KEEP = ("first", "shortest", "all")
MAX_SAMPLES = 256  # sample g of question i has the number 256 i + g, so that a larger k keeps the first samples
MAX_QUESTIONS = 2**32 // MAX_SAMPLES  # a sample's number is a uint32

# What may change between the run that began a folder and the one that resumes it: how fast, on what, for how
# much money. The samples do not depend on it, nor does the verdict on an answer that every judge was asked about.
FREE_KEYS = (
    "preset",
    "mesh",
    "data.batch_size",
    "data.max_invalid",
    *(
        f"judges.{name}"
        for name in ("base_url", "api_key_env", "timeout_s", "retries", "backoff_s", "parallel", "max_requests")
    ),
    *(f"judges.{name}" for name in ("max_cost", "price_prompt", "price_completion")),
)


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    """Questions, their images and how they are cut to size."""

    source: str | None = option(
        "scenes",
        "questions: scenes, marked_scenes, easy_vqa, a .jsonl of {id, image, question, answer}, a dataset as "
        "NAME:PATH, or a mixture, as in training; nothing is held out but what a dataset holds out itself",
    )
    max_invalid: int = option(
        0,
        "so many records may be unusable, and are left out (all images are opened first); 0: one ends the run",
        low=0,
    )
    size: int | None = option(2000, "answer only the first so many; none: all", low=1)
    batch_size: int = option(64, "questions sampled at once, over all devices", low=1, high=MOST_ROWS)
    max_prompt_tokens: int = option(
        128, "a longer prompt, its visual tokens included, is an error", low=1, high=MOST_TOKENS
    )
    max_response_tokens: int = option(64, "most tokens of a response, the stop token included", low=1, high=MOST_TOKENS)
    min_pixels: int | None = option(
        None, "enlarge images with fewer pixels; none: as the checkpoint says", low=1, high=MOST_PIXELS
    )
    max_pixels: int | None = option(
        None, "shrink images with more pixels; none: as the checkpoint says", low=1, high=MOST_PIXELS
    )
    system: str | None = option(None, "system prompt; none: no system turn")


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn."""

    samples: int = option(4, "k: answers sampled a question", low=1, high=MAX_SAMPLES)
    temperature: float = option(1.0, "sampling temperature; 0: greedy", low=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this probability; 1: all", above=0, high=1)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What an answer has to pass, and which of the answers that pass are kept."""

    verifiers: tuple[str, ...] = option(
        ("rule", "agreement"),
        "all of these have to pass: format (the answer format alone), rule (format, and the conclusion is the right "
        "answer), agreement, judges. Judges are asked last, and only about answers that pass the others",
        choices=VERIFIERS,
    )
    agreement_min: int = option(2, "of the k samples so many, itself included, must give the same conclusion", low=1)
    keep: str = option(
        "first", "of a question's accepted answers: the first, the shortest, or all different ones", choices=KEEP
    )


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """External judges behind one OpenAI-compatible endpoint."""

    models: tuple[str, ...] = option((), "names of the judges' models, each asked once an answer")
    base_url: str | None = option(None, "the endpoint, such as https://host/v1; /chat/completions is added")
    api_key_env: str | None = option(None, "environment variable that holds the API key; none: no key is sent")
    reject_votes: int = option(2, "an answer is rejected where so many judges say incorrect", low=1)
    min_votes: int = option(1, "and where fewer than so many say anything (a judge that fails abstains)", low=1)
    temperature: float | None = option(0.0, "sent with each request; none: left out", low=0)
    max_reply_tokens: int | None = option(512, "sent as max_tokens; none: left out", low=1)
    max_side: int = option(1024, "longer side in pixels to which the image that is sent is shrunk", low=28, high=2**14)
    timeout_s: float = option(120.0, "seconds until a request counts as failed", above=0, high=MOST_SECONDS)
    retries: int = option(4, "further attempts where one may help: no answer, 408, 409, 425, 429, 5xx", low=0, high=100)
    backoff_s: float = option(
        1.0, "seconds before the first of them, doubled for each one after", low=0, high=MOST_SECONDS
    )
    parallel: int = option(8, "questions that are judged at once", low=1, high=MOST_WORKERS)
    max_requests: int | None = option(None, "stop judging after so many requests over the folder's life", low=1)
    max_cost: float | None = option(
        None, "stop judging when the folder's cost is this much; up to config.judges.parallel requests go over", above=0
    )
    price_prompt: float = option(0.0, "price of a million prompt tokens, images included, for the cost", low=0)
    price_completion: float = option(0.0, "price of a million tokens of the judges' replies", low=0)


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """One distillation run."""

    preset: str = option("tiny", "name of the preset that the settings started from; for the record")
    seed: int = option(0, "seed of drawn questions and of sampling", low=0, high=2**31 - 1)
    init_from: str | None = option(
        "tiny", "the model that answers: tiny (the embedded one), a Hugging Face checkpoint folder, a model of the Hub"
    )
    dtype: str = option("float32", "type that is computed in", choices=DTYPES)
    param_dtype: str = option("float32", "type that parameters are kept in", choices=DTYPES)
    data: QuestionOptions = group(QuestionOptions, "questions and images")
    sampling: SamplingOptions = group(SamplingOptions, "sampling")
    verify: VerifyOptions = group(VerifyOptions, "verification")
    judges: JudgeOptions = group(JudgeOptions, "external judges; unused unless verify.verifiers names them")
    reattention: ReattentionOptions = group(ReattentionOptions, "looking at the images again")
    mesh: MeshOptions = group(MeshOptions, "devices")

    @property
    def inference(self) -> InferenceConfig:
        """What sampling needs of these settings."""
        return InferenceConfig.of(self)


def from_config_dict(config: Mapping[str, Any] | config_dict.ConfigDict) -> DistillOptions:
    """Checked options from a ConfigDict or a nested mapping (missing keys take their defaults).

    Raises:
      ConfigError: unknown keys, wrong values, missing files or required values; all at once, one a line.
    """
    options = read_options(config.to_dict() if isinstance(config, config_dict.ConfigDict) else config)
    sampling, sources = options.inference, {"source": options.data.source}
    shared = [*inference_relations(sampling), *init_problems(sampling, options.preset)]
    refuse([*shared, *source_problems(sources, options.preset), *_relations(options)])
    return options


def read_options(raw: Mapping[str, Any]) -> DistillOptions:
    """Options whose single values are checked, but neither the disk nor the environment; see `schema.build`."""
    return build(DistillOptions, raw)


def _relations(options: DistillOptions) -> Iterator[str]:
    """Problems between settings that are each fine alone, and of the judges' endpoint."""
    verify, judges, samples = options.verify, options.judges, options.sampling.samples
    if not verify.verifiers:
        yield f"config.verify.verifiers: got none, expected some of {', '.join(VERIFIERS)}"
    if "agreement" in verify.verifiers and verify.agreement_min > samples:
        yield (
            f"config.verify.agreement_min: got {verify.agreement_min}, expected at most config.sampling.samples "
            f"({samples})"
        )
    if (options.data.size or 0) > MAX_QUESTIONS:
        yield f"config.data.size: got {options.data.size}, expected at most {MAX_QUESTIONS}"
    if "judges" not in verify.verifiers:
        return
    if not judges.models:
        yield f"config.judges.models: the {options.preset} preset needs --config.judges.models=NAME, once a judge"
    for name in ("reject_votes", "min_votes"):
        value = getattr(judges, name)
        if judges.models and value > len(judges.models):
            yield f"config.judges.{name}: got {value}, expected at most the number of judges ({len(judges.models)})"
    if judges.base_url is None:
        yield f"config.judges.base_url: the {options.preset} preset needs --config.judges.base_url=https://HOST/v1"
    elif (problem := address_problem(judges.base_url)) is not None:
        yield f"config.judges.base_url: {problem}"
    try:
        read_key(judges.api_key_env)
    except ValueError as error:
        yield f"config.judges.api_key_env: {error}"
    if judges.max_cost is not None and not (judges.price_prompt or judges.price_completion):
        yield "config.judges.max_cost: needs config.judges.price_prompt or price_completion; now nothing costs"
