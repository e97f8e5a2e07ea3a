"""Every setting of a training run, in one schema: names, types, defaults, bounds and help.

A run is described by a `RunOptions`. Config files hand it to `config_flags` as a locked `ConfigDict`
(`to_config_dict`), the command line overrides single keys, and `from_config_dict` turns the result back into checked
dataclasses before anything heavy starts. The defaults are the embedded tiny settings. Nothing here imports jax, so that
`--help` and a refusal are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from qwenla_jax.train.option_checks import paths, relations

DTYPES = ("float32", "bfloat16")
TRAIN_MODES = ("train", "freeze", "tags")


class ConfigError(ValueError):
    """A setting is wrong; the message names each key, its value and what would be right."""


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A field: `low` <= value, `above` < value, value <= `high`, value < `below`, or one of `choices`."""
    bounds = {"low": low, "above": above, "high": high, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **bounds})


def _group(cls: type, help: str) -> Any:
    return dataclasses.field(default_factory=cls, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Questions, their pictures and how they are cut to size."""

    source: str | None = _option(
        "scenes", "training questions: scenes, easy_vqa, or a .jsonl of {id, image, question, answer[, response]}"
    )
    eval_source: str | None = _option(None, "held-out questions, like source; none: the held-out part of source")
    size: int | None = _option(None, "train on only this many of the source's questions; none: all of them", low=1)
    batch_size: int = _option(8, "questions of one optimizer step, over all devices and all accumulation parts", low=1)
    reflection_share: float = _option(
        0.5, "scenes, easy_vqa: share of the written responses that hold one reflection", low=0, high=1
    )
    correction_share: float = _option(
        0.3, "scenes: share of the reflections that correct a wrong reasoning", low=0, high=1
    )
    max_prompt_tokens: int = _option(128, "a longer prompt, its visual tokens included, is an error", low=1)
    max_response_tokens: int = _option(64, "most tokens of a response, the stop token included", low=1)
    min_pixels: int | None = _option(None, "enlarge pictures with fewer pixels; none: as the checkpoint says", low=1)
    max_pixels: int | None = _option(None, "shrink pictures with more pixels; none: as the checkpoint says", low=1)
    system: str | None = _option(None, "system prompt; none: no system turn")
    length_group: int = _option(
        1, "this many batches share out their questions by length, so that less of a batch is padding", low=1
    )
    threads: int = _option(1, "threads that prepare data ahead of the step; 0: in the step's own thread", low=0)


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW and its learning rate."""

    learning_rate: float = _option(2e-4, "highest learning rate, reached at the end of the warm-up", above=0)
    b1: float = _option(0.9, "AdamW: decay of the gradient's mean", low=0, below=1)
    b2: float = _option(0.95, "AdamW: decay of the squared gradient's mean", low=0, below=1)
    eps: float = _option(1e-8, "AdamW: added to the root of the squared gradient's mean", above=0)
    weight_decay: float = _option(0.0, "AdamW: decoupled weight decay", low=0)
    warmup_ratio: float = _option(0.01, "share of the steps in which the learning rate rises from 0", low=0, high=1)
    schedule: str = _option(
        "constant", "after the warm-up: constant, or cosine or linear to 0", choices=("constant", "cosine", "linear")
    )
    clip_norm: float | None = _option(1.0, "scale gradients down to this global norm; none or inf: never", above=0)
    accumulation: int = _option(1, "equal parts that a batch is worked through in; saves memory, same gradient", low=1)
    trainable: tuple[tuple[str, str], ...] = _option(
        ((".*", "train"),),
        "pairs (regular expression of whole parameter paths, train, freeze, or tags: of embedding and head only the "
        "rows of the ten tags); the first that matches counts",
    )


@dataclasses.dataclass(frozen=True)
class BrpoOptions:
    """Sampling and objective of stage brpo."""

    group_size: int = _option(8, "G: responses sampled a question", low=2)
    temperature: float = _option(1.0, "sampling temperature", above=0)
    top_p: float = _option(1.0, "sample from the likeliest tokens that hold this probability; 1: all", above=0, high=1)
    beta: float = _option(0.1, "weight of the KL divergence from the frozen reference", low=0)
    clip_low: float = _option(0.2, "the probability ratio is clipped below at 1 - clip_low", low=0, high=1)
    clip_high: float = _option(0.2, "the probability ratio is clipped above at 1 + clip_high", low=0)
    inner_updates: int = _option(1, "mu: optimizer steps taken on one set of samples", low=1)
    std_eps: float = _option(1e-4, "added to the group's standard deviation that advantages are divided by", above=0)


@dataclasses.dataclass(frozen=True)
class ReattentionOptions:
    """Whether reflections look at the pictures again, in sampling, training and evaluation alike."""

    mode: str = _option(
        "none",
        "what stands before a reflection: none (text alone), copy (all visual tokens again), route (the most attended),"
        " vision_only (as copy, and the reflection is closed at once)",
        choices=("none", "copy", "route", "vision_only"),
    )
    share: float = _option(0.5, "route: m, the share of the visual tokens that is kept", low=0, high=1)
    form: str = _option(
        "compact",
        "route: put in the kept tokens only, or all of them with a bias that hides the rest",
        choices=("compact", "bias"),
    )
    max_insertions: int = _option(2, "most insertions of a response; later reflections are text alone", low=0)
    max_inserted_tokens: int | None = _option(None, "most inserted tokens of a response; none: no such limit", low=0)
    rows_at_once: int = _option(8, "sampling: rows that wait for their pictures are served together, so many", low=1)
    delimiters: bool = _option(True, "put the vision delimiters around the pictures again")
    positions: str = _option(
        "again",
        "again: the pictures take the next positions, as if given a second time; original: those in the prompt",
        choices=("again", "original"),
    )


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """Weights and shapes of the three rule rewards."""

    format: float = _option(1.0, "weight of the format reward", low=0)
    accuracy: float = _option(1.0, "weight of the accuracy reward", low=0)
    balance: float = _option(1.0, "weight of the reflection balance reward", low=0)
    target_length: float = _option(100.0, "lambda: ideal tokens of one reflection", above=0)
    balance_floor: float | None = _option(
        None, "least balance reward, before its weight; none or -inf: no floor", high=1
    )
    balance_only_if_correct: bool = _option(False, "give the balance reward only to responses with the right answer")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How many devices lie along each mesh axis; one of them may be -1: whatever is left."""

    data: int = _option(-1, "devices that split the batch", low=-1)
    fsdp: int = _option(1, "devices that split the batch, the parameters and the optimizer state", low=-1)
    tensor: int = _option(1, "devices that split heads and feed-forward widths", low=-1)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Greedy decoding of held-out questions."""

    every: int = _option(100, "steps between evaluations; 0: only before and after", low=0)
    size: int = _option(200, "questions of an evaluation on the way", low=1)
    final_size: int = _option(1000, "questions of the evaluations before and after; 0: none", low=0)
    batch_size: int = _option(64, "questions decoded at once", low=1)


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints in the work folder."""

    every: int = _option(100, "steps between checkpoints; 0: only the last step", low=0)
    keep: int = _option(2, "newest checkpoints to keep", low=1)


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """Metrics, and tables of completions (stage brpo)."""

    every: int = _option(1, "steps between metric lines", low=1)
    completions_every: int = _option(50, "steps between tables of completions; 0: none", low=0)
    completions_rows: int = _option(16, "responses in a table of completions", low=1)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """One training run."""

    stage: str = _option("brpo", "what is trained: sft (cold start) or brpo", choices=("sft", "brpo"))
    preset: str = _option("tiny", "name of the preset that the settings started from; for the record")
    seed: int = _option(0, "seed of parameters, data order and sampling", low=0, high=2**31 - 1)
    steps: int = _option(400, "optimizer steps", low=1)
    init_from: str | None = _option(
        "tiny",
        "starting point: tiny (the embedded checkpoint), a Hugging Face checkpoint folder, random:tiny, "
        "or random:PATH of a config.json",
    )
    dtype: str = _option("float32", "type that is computed in", choices=DTYPES)
    param_dtype: str = _option("float32", "type that parameters are kept in", choices=DTYPES)
    remat: str = _option(
        "none",
        "activations computed again in the backward pass: none, dots (keep matrix products), full (keep nothing)",
        choices=("none", "dots", "full"),
    )
    data: DataOptions = _group(DataOptions, "questions and pictures")
    optim: OptimOptions = _group(OptimOptions, "optimizer")
    brpo: BrpoOptions = _group(BrpoOptions, "BRPO; unused in stage sft")
    rewards: RewardOptions = _group(RewardOptions, "rewards; unused in stage sft")
    reattention: ReattentionOptions = _group(ReattentionOptions, "looking at the pictures again")
    mesh: MeshOptions = _group(MeshOptions, "devices")
    eval: EvalOptions = _group(EvalOptions, "evaluation")
    checkpoint: CheckpointOptions = _group(CheckpointOptions, "checkpoints")
    log: LogOptions = _group(LogOptions, "metrics and completions")


class Leaf(NamedTuple):
    """One setting of the schema: dotted key without `config.`, type, whether None is legal, and its field."""

    key: str
    type: Any
    optional: bool
    field: dataclasses.Field[Any]


def leaves(cls: type = RunOptions, prefix: str = "") -> Iterator[Leaf]:
    """Every setting in the order of the schema."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        if optional:
            hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        yield Leaf(prefix + field.name, hint, optional, field)


def to_dict(options: RunOptions) -> dict[str, Any]:
    """Nested plain values that JSON can hold: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(options))


def to_config_dict(options: RunOptions) -> config_dict.ConfigDict:
    """A locked, typed ConfigDict: a key that is not there or a value of another type is refused on assignment."""

    def convert(value: Any) -> config_dict.ConfigDict:
        hints = typing.get_type_hints(type(value))
        out = config_dict.ConfigDict()
        for field in dataclasses.fields(value):
            item, hint = getattr(value, field.name), hints[field.name]
            if dataclasses.is_dataclass(item):
                out[field.name] = convert(item)
            elif type(None) in typing.get_args(hint):
                out[field.name] = config_dict.placeholder(typing.get_args(hint)[0])
                out[field.name] = item
            else:
                out[field.name] = item
        return out

    return convert(options).lock()


def from_config_dict(config: Mapping[str, Any] | config_dict.ConfigDict) -> RunOptions:
    """Checked options from a ConfigDict or a nested mapping (missing keys take their defaults).

    Raises:
      ConfigError: keys that do not exist (the nearest one is named), values of a wrong type or out of range, files that
        do not exist, required values that are missing. All of them at once, one a line.
    """
    raw = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    problems: list[str] = []
    options = _build(RunOptions, raw, "", problems)
    if not problems:
        problems = [*relations(options), *paths(options)]
    if problems:
        raise ConfigError("\n".join(problems))
    return options


def check_command_line(argv: Sequence[str], flag: str = "config") -> None:
    """Refuses unknown keys and unreadable numbers in `--config.key=value` arguments, before the flags are parsed.

    `config_flags` refuses them too, but with a traceback and without the nearest key.

    Raises:
      ConfigError: as `from_config_dict`.
    """
    known = {leaf.key: leaf for leaf in leaves()}
    problems = []
    pattern = re.compile(rf"--?(no)?{re.escape(flag)}\.([^=]+)(?:=(.*))?$", re.DOTALL)
    for arg in argv:
        if arg == "--":
            break
        if not (match := pattern.match(arg)):
            continue
        _, key, text = match.groups()
        leaf = known.get(key)
        if leaf is None:
            problems.append(_unknown(key, known))
        elif text is not None and leaf.type in (int, float):
            try:
                int(text, 0) if leaf.type is int else float(text)
            except ValueError:
                problems.append(f"{flag}.{key}: got {text!r}, expected {_type_name(leaf)}")
    if problems:
        raise ConfigError("\n".join(problems))


def describe(options: RunOptions | None = None, flag: str = "config") -> str:
    """All settings with type, value in `options` (default: the defaults) and help, for `--help`."""
    values = to_dict(options or RunOptions())
    lines = []
    group = ""
    for leaf in leaves():
        head, _, _ = leaf.key.rpartition(".")
        if head != group:
            group = head
            lines.append(f"\n{head}: {RunOptions.__dataclass_fields__[head].metadata['help']}")
        value: Any = values
        for part in leaf.key.split("."):
            value = value[part]
        shown = "none" if value is None else value
        lines.append(f"  --{flag}.{leaf.key}  ({_type_name(leaf)}, {shown})\n      {leaf.field.metadata['help']}")
    return "\n".join(lines) + "\n"


def _type_name(leaf: Leaf) -> str:
    name = {int: "int", float: "float", str: "str", bool: "true or false"}.get(
        leaf.type, "pairs (regular expression, 'train', 'freeze' or 'tags')"
    )
    return f"{name} or none" if leaf.optional else name


def _unknown(key: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    group, _, name = key.rpartition(".")
    tails = {k: k.rpartition(".")[2] for k in known}
    # A right name in the wrong group or its initials (lr) are commoner than a typing error across two groups.
    near = [k for k, tail in tails.items() if name in (tail, "".join(word[0] for word in tail.split("_")))]
    near = near or difflib.get_close_matches(key, [k for k in known if k.rpartition(".")[0] == group], n=1, cutoff=0.75)
    near = near or [k for t in difflib.get_close_matches(name, tails.values(), n=1) for k in known if tails[k] == t]
    hint = f"; did you mean config.{near[0]}?" if near else "; --help lists the keys"
    return f"config.{key}: there is no such key{hint}"


def _build(cls: type, raw: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    direct = {leaf.key: leaf for leaf in leaves(cls)}
    values = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(_unknown(key, [leaf.key for leaf in leaves()]))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                values[name] = _build(typing.cast(type, hints[name]), value, f"{key}.", problems)
            else:
                problems.append(f"config.{key}: got {value!r}, expected a group of settings")
        else:
            try:
                values[name] = _checked(direct[name], value)
            except ConfigError as error:
                problems.append(f"config.{key}: {error}")
    return cls(**values)


def _checked(leaf: Leaf, value: Any) -> Any:
    """The value in the leaf's own type. Raises ConfigError without the key, which the caller knows in full."""
    wrong = ConfigError(f"got {value!r} ({type(value).__name__}), expected {_type_name(leaf)}")
    if leaf.optional and (value is None or value == "" or (isinstance(value, float) and math.isinf(value))):
        return None  # flags cannot spell None: an empty text or an infinite number stands for it
    if leaf.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if leaf.type not in (int, float, str, bool):
        return _checked_trainable(value, wrong)
    if type(value) is not leaf.type:
        raise wrong
    meta = leaf.field.metadata
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"got {value}, expected a finite number")
    if meta["choices"] is not None and value not in meta["choices"]:
        raise ConfigError(f"got {value!r}, expected one of {', '.join(meta['choices'])}")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"got {value}, expected at least {meta['low']}")
    if meta["above"] is not None and value <= meta["above"]:
        raise ConfigError(f"got {value}, expected more than {meta['above']}")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"got {value}, expected at most {meta['high']}")
    if meta["below"] is not None and value >= meta["below"]:
        raise ConfigError(f"got {value}, expected less than {meta['below']}")
    return value


def _checked_trainable(value: Any, wrong: ConfigError) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, (tuple, list)) or not value:
        raise wrong
    for pair in value:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise wrong
        if pair[1] not in TRAIN_MODES:
            raise ConfigError(f"got {pair[1]!r} for {pair[0]!r}, expected 'train', 'freeze' or 'tags'")
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ConfigError(f"{pair[0]!r} is not a regular expression: {error}") from error
    return tuple((pattern, mode) for pattern, mode in value)
