"""Checks of a run's settings against each other and against the disk, before anything heavy starts."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError, build, refuse
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.sources import spec
from qwenla_jax.rewards.built_in import BUILT_IN
from qwenla_jax.rewards.weights import RewardSettings
from qwenla_jax.utils.visible import in_brief
from qwenla_jax.weights.hub import hub_name

MOST_UPDATES = 2**31 - 1  # their number is an int32


def inference_relations(config: InferenceConfig) -> Iterator[str]:
    """Contradictions between settings of sampling that are valid on their own."""
    low, high, mesh = config.min_pixels, config.max_pixels, config.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if low and high and low > high:
        yield f"config.data.min_pixels: got {low}, expected at most max_pixels ({high})"
    if 0 in sizes or sum(size == -1 for size in sizes) > 1:
        yield f"config.mesh: got data, fsdp, tensor = {sizes}, expected sizes of at least 1, of which one may be -1"


def relations(options: RunOptions) -> Iterator[str]:
    """Contradictions between settings that are valid on their own."""
    data, optim = options.data, options.optim
    yield from inference_relations(options.inference)
    if data.batch_size % optim.accumulation:
        yield (
            f"config.optim.accumulation: got {optim.accumulation}, expected a divisor of "
            f"config.data.batch_size ({data.batch_size})"
        )
    if options.brpo.rollout_batch and data.batch_size % options.brpo.rollout_batch:
        yield (
            f"config.brpo.rollout_batch: got {options.brpo.rollout_batch}, expected a divisor of "
            f"config.data.batch_size ({data.batch_size})"
        )
    if options.brpo.group_size % options.brpo.group_parts:
        yield (
            f"config.brpo.group_parts: got {options.brpo.group_parts}, expected a divisor of config.brpo.group_size "
            f"({options.brpo.group_size})"
        )
    if options.steps * options.brpo.inner_updates > MOST_UPDATES:
        yield (
            f"config.steps: got {options.steps} with {options.brpo.inner_updates} inner updates each, expected at most "
            f"{MOST_UPDATES} updates"
        )
    if options.stage == "sft" and options.reattention.mode == "vision_only":
        yield "config.reattention.mode: vision_only closes reflections that the training texts fill; train with copy"
    trigger, usual = options.reattention.trigger, ReattentionOptions().trigger
    if options.reattention.mode == "vision_only" and trigger != usual:
        got = in_brief(repr(trigger), 80)
        yield f"config.reattention.trigger: got {got}, but vision_only closes {usual}; use copy or route"
    rewards = options.rewards
    if options.stage == "brpo" and not (rewards.extra or any(getattr(rewards, name) for name in BUILT_IN)):
        yield "config.rewards: all weights are 0, expected at least one above 0"
    try:
        RewardSettings.from_options(rewards, (), data.max_response_tokens)
    except ConfigError as error:
        yield from (f"config.rewards.{problem}" for problem in str(error).splitlines())
    if options.brpo.importance_min >= options.brpo.importance_max:
        yield (
            f"config.brpo.importance_min: got {options.brpo.importance_min:g}, expected less than importance_max "
            f"({options.brpo.importance_max:g})"
        )
    if options.brpo.importance_sampling != "none" and options.brpo.inner_updates > 1:
        yield (
            f"config.brpo.inner_updates: got {options.brpo.inner_updates}, expected 1 with importance_sampling: the "
            "ratio is taken in the update that follows the sampling"
        )
    if options.brpo.resample_rounds and not options.brpo.drop_zero_std_groups:
        yield "config.brpo.resample_rounds: nothing is resampled without config.brpo.drop_zero_std_groups"
    if options.brpo.reward_total == "normalised" and options.brpo.scale != "group":
        yield f"config.brpo.scale: got {options.brpo.scale!r}, expected 'group' with reward_total=normalised"
    for text in rewards.extra:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(=(\d+(\.\d*)?|\.\d+)?)?", text):
            yield f"config.rewards.extra: got {text!r}, expected module:function or module:function=WEIGHT"
    for pattern in options.lora.modules:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"config.lora.modules: {in_brief(repr(pattern), 80)} is not a regular expression: {error}"
    if options.lora.rank and not options.lora.modules:
        yield "config.lora.modules: got none, expected at least one regular expression with config.lora.rank"
    if not options.lora.rank and all(mode == "freeze" for _, mode in optim.trainable):
        yield f"config.optim.trainable: got {optim.trainable}, expected at least one pair with 'train'"


def paths(options: RunOptions) -> Iterator[str]:
    """Required values that are missing, and files that are missing or of another kind."""
    yield from init_problems(options.inference, options.preset)
    sources = {"source": options.data.source, "eval_source": options.data.eval_source}
    yield from source_problems(sources, options.preset)
    for sink in options.log.sinks:
        if sink != "tensorboard" and importlib.util.find_spec(sink) is None:
            yield f"config.log.sinks: {sink} is not installed; the extra `{sink}` brings it"


def source_problems(sources: Mapping[str, str | None], preset: str) -> Iterator[str]:
    """Problems of sources by their key in `config.data`: a missing `source`, or one that cannot be opened."""
    if sources["source"] is None:
        yield f"config.data.source: the {preset} preset needs --config.data.source=FILE.jsonl or NAME:PATH"
    for key, source in sources.items():
        if source is None:
            continue
        problems = list(spec.problems(source))
        yield from (f"config.data.{key}: {problem}" for problem in problems)
        if not problems and any(part.reader == "easy_vqa" for part in spec.parse(source)):
            if importlib.util.find_spec("easy_vqa") is None:
                yield f"config.data.{key}: easy_vqa is not installed; the extra `demo` brings it"


def init_problems(config: InferenceConfig, preset: str) -> Iterator[str]:
    """Problems of the model that `config.init_from` names."""
    source = config.init_from
    if source is None:
        yield (f"config.init_from: the {preset} preset needs --config.init_from=MODEL, a Hugging Face folder or name")
    elif source.startswith("random:"):
        path = Path(source.removeprefix("random:"))
        # Unlike Path's, these functions take any text.
        if str(path) != "tiny" and not hub_name(path) and not any(map(os.path.isfile, (path, path / "config.json"))):
            yield f"config.init_from: got {source!r}, but {path} is neither a config.json nor a folder that holds one"
    elif source != "tiny" and hub_name(source) is None:
        folder = Path(source)
        if not os.path.isdir(folder):
            yield (
                f"config.init_from: there is no folder {source!r}; expected tiny, random:CONFIG, such a folder, or a "
                "model of the Hugging Face Hub such as Qwen/Qwen2.5-VL-3B-Instruct"
            )
            return
        missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
        if not any(folder.glob("*.safetensors")) and not (folder / "params" / "_METADATA").is_file():
            missing.append("*.safetensors")
        if missing:
            yield f"config.init_from: {source!r} is not a Hugging Face checkpoint: {', '.join(missing)} missing"


def from_config_dict(config: Mapping[str, Any] | config_dict.ConfigDict) -> RunOptions:
    """Checked options from a ConfigDict or a nested mapping (missing keys take their defaults).

    Raises:
      ConfigError: keys that do not exist (the nearest one is named), values of a wrong type or out of range, files that
        do not exist, required values that are missing. All of them at once, one a line.
    """
    options = build(RunOptions, config.to_dict() if isinstance(config, config_dict.ConfigDict) else config)
    refuse([*relations(options), *paths(options)])
    return options
