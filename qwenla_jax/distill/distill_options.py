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
    MOST_ROWS,
    MOST_SECONDS,
    MOST_TOKENS,
    MOST_WORKERS,
    MeshOptions,
    PromptOptions,
    ReattentionOptions,
)
from qwenla_jax.distill.endpoint import address_problem, read_key

VERIFIERS = ("format", "rule", "agreement", "judges")
KEEP = ("first", "shortest", "all", "none")
MAX_SAMPLES = 256  # sample g of question i has the number 256 i + g, so that a larger k keeps the first samples
MAX_QUESTIONS = 2**32 // MAX_SAMPLES  # a sample's number is a uint32
RULE_MADE = ("scenes", "marked_scenes", "easy_vqa")  # sources whose responses hold a reflection without a teacher

_SPENDING = (
    *("base_url", "api_key_env", "timeout_s", "retries", "backoff_s", "parallel", "max_requests", "max_cost"),
    *("price_prompt", "price_completion"),
)
# Settings that may differ when a run is resumed: speed, devices and spending. Neither the samples nor the verdict on an
# answer that every judge was asked about depends on them.
FREE_KEYS = (
    "preset",
    "mesh",
    "data.batch_size",
    "data.max_invalid",
    *(f"{group}.{name}" for group in ("judges", "teacher") for name in _SPENDING),
)


@dataclasses.dataclass(frozen=True)
class QuestionOptions(PromptOptions):
    """Questions, their images and how they are cut to size."""

    source: str | None = option(
        "scenes",
        "questions: scenes, marked_scenes, easy_vqa, a .jsonl of {id, image, question, answer}, a dataset as "
        "NAME:PATH, or a mixture, as in training; nothing is held out except by a dataset's own splits",
    )
    max_invalid: int = option(
        0,
        "most records that may be invalid; they are left out, and all images are opened first; 0: the first invalid "
        "record ends the run",
        low=0,
    )
    size: int | None = option(2000, "use only this many of the source's questions; none: all", low=1)
    batch_size: int = option(64, "questions sampled at once, over all devices", low=1, high=MOST_ROWS)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled."""

    samples: int = option(4, "k: answers sampled for a question", low=1, high=MAX_SAMPLES)
    temperature: float = option(1.0, "sampling temperature; 0: greedy", low=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this probability; 1: all", above=0, high=1)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """The checks of an answer, and which of the answers that pass are kept."""

    verifiers: tuple[str, ...] = option(
        ("rule", "agreement"),
        "an answer has to pass all of these: format (the answer format), rule (the format, and the conclusion is the "
        "right answer), agreement, judges. Judges are asked last, and only about answers that pass the others",
        choices=VERIFIERS,
    )
    agreement_min: int = option(
        2, "agreement: least number of the k samples, the answer included, with the same conclusion", low=1
    )
    keep: str = option(
        "first",
        "of a question's answers that pass: the first, the shortest, all different ones, or none: each question is put "
        "into the queue for a person",
        choices=KEEP,
    )
    min_reflection_tokens: int = option(10, "make=cold_start: least tokens of the reflection", low=0, high=MOST_TOKENS)
    max_reflection_tokens: int = option(200, "make=cold_start: most tokens of the reflection", low=0, high=MOST_TOKENS)


@dataclasses.dataclass(frozen=True)
class EndpointOptions:
    """Models behind one OpenAI-compatible endpoint, and the limits of asking them."""

    models: tuple[str, ...] = option((), "names of the models, each asked once")
    base_url: str | None = option(None, "the endpoint, such as https://host/v1; /chat/completions is added")
    api_key_env: str | None = option(None, "environment variable that holds the API key; none: no key is sent")
    temperature: float | None = option(0.0, "sent with each request; none: left out", low=0)
    max_reply_tokens: int | None = option(512, "sent as max_tokens; none: left out", low=1)
    max_side: int = option(1024, "images that are sent are shrunk to this longer side, in pixels", low=28, high=2**14)
    timeout_s: float = option(120.0, "seconds until a request counts as failed", above=0, high=MOST_SECONDS)
    retries: int = option(4, "further attempts after no answer, 408, 409, 425, 429 or 5xx", low=0, high=100)
    backoff_s: float = option(
        1.0, "seconds before the first further attempt, doubled for each one after", low=0, high=MOST_SECONDS
    )
    parallel: int = option(8, "questions that are asked about at once", low=1, high=MOST_WORKERS)
    max_requests: int | None = option(None, "stop after this many requests, counted over all runs of the folder", low=1)
    max_cost: float | None = option(
        None,
        "stop when the folder's cost reaches this; requests that are under way, at most `parallel`, go over",
        above=0,
    )
    price_prompt: float = option(0.0, "price of a million prompt tokens, images included, for the cost", low=0)
    price_completion: float = option(0.0, "price of a million tokens of the replies", low=0)


@dataclasses.dataclass(frozen=True)
class JudgeOptions(EndpointOptions):
    """External judges behind one OpenAI-compatible endpoint."""

    reject_votes: int = option(2, "reject an answer if at least this many judges say incorrect", low=1)
    min_votes: int = option(1, "reject an answer if fewer judges give a verdict; a judge that fails abstains", low=1)


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """One distillation run."""

    preset: str = option("tiny", "name of the preset that the settings started from; for the record")
    make: str = option(
        "answers",
        "what is made: answers (stage 3: sampled from the model) or cold_start (stage 1: a teacher inserts a "
        "reflection into each record's response)",
        choices=("answers", "cold_start"),
    )
    seed: int = option(0, "seed of rendered questions and of sampling", low=0, high=2**31 - 1)
    init_from: str | None = option(
        "tiny",
        "the model that answers: tiny (the embedded checkpoint), a Hugging Face checkpoint folder or a model of the "
        "Hub; with make=cold_start only its tokenizer is read, to count tokens",
    )
    dtype: str = option("float32", "type of computation", choices=DTYPES)
    param_dtype: str = option("float32", "type of stored parameters", choices=DTYPES)
    data: QuestionOptions = group(QuestionOptions, "questions and images")
    sampling: SamplingOptions = group(SamplingOptions, "sampling; unused with make=cold_start")
    verify: VerifyOptions = group(VerifyOptions, "verification")
    judges: JudgeOptions = group(JudgeOptions, "external judges; unused unless verify.verifiers names them")
    teacher: EndpointOptions = group(EndpointOptions, "external teachers; unused unless make=cold_start")
    reattention: ReattentionOptions = group(ReattentionOptions, "re-attention: images before reflections")
    mesh: MeshOptions = group(MeshOptions, "devices")

    @property
    def answers_each(self) -> int:
        """k: answers to each question, in the log of samples."""
        return max(1, len(self.teacher.models)) if self.make == "cold_start" else self.sampling.samples

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
    """Problems between settings that are each valid alone, and of the endpoints that are asked."""
    verify, judges, cold_start = options.verify, options.judges, options.make == "cold_start"
    if not verify.verifiers and not cold_start:
        yield f"config.verify.verifiers: got none, expected some of {', '.join(VERIFIERS)}"
    if "agreement" in verify.verifiers and verify.agreement_min > options.answers_each:
        k = "number of config.teacher.models" if cold_start else "config.sampling.samples"
        yield f"config.verify.agreement_min: got {verify.agreement_min}, expected at most {k} ({options.answers_each})"
    if verify.min_reflection_tokens > verify.max_reflection_tokens:
        yield (
            f"config.verify.min_reflection_tokens: got {verify.min_reflection_tokens}, expected at most "
            f"max_reflection_tokens ({verify.max_reflection_tokens})"
        )
    if (options.data.size or 0) > MAX_QUESTIONS:
        yield f"config.data.size: got {options.data.size}, expected at most {MAX_QUESTIONS}"
    if cold_start and (options.teacher.models or options.data.source not in RULE_MADE):
        yield from _endpoint_problems("teacher", options.teacher, options.preset)
    if "judges" not in verify.verifiers:
        return
    for name in ("reject_votes", "min_votes"):
        value = getattr(judges, name)
        if judges.models and value > len(judges.models):
            yield f"config.judges.{name}: got {value}, expected at most the number of judges ({len(judges.models)})"
    yield from _endpoint_problems("judges", judges, options.preset)


def _endpoint_problems(name: str, endpoint: EndpointOptions, preset: str) -> Iterator[str]:
    """Problems of `config.judges` or `config.teacher`."""
    if not endpoint.models:
        once = f"once a {name.removesuffix('s')}"
        yield f"config.{name}.models: the {preset} preset needs --config.{name}.models=NAME, {once}"
    if endpoint.base_url is None:
        yield f"config.{name}.base_url: the {preset} preset needs --config.{name}.base_url=https://HOST/v1"
    elif (problem := address_problem(endpoint.base_url)) is not None:
        yield f"config.{name}.base_url: {problem}"
    try:
        read_key(endpoint.api_key_env)
    except ValueError as error:
        yield f"config.{name}.api_key_env: {error}"
    if endpoint.max_cost is not None and not (endpoint.price_prompt or endpoint.price_completion):
        yield f"config.{name}.max_cost: needs config.{name}.price_prompt or price_completion; now nothing costs"
