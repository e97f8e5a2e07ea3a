"""Checked settings: nested dataclasses whose fields declare help, choices and bounds.

Config files hand settings to `config_flags` as a locked `ConfigDict` (`to_config_dict`), the command line overrides
single keys, and `build` turns the result back into checked dataclasses before anything heavy starts. A field is an int,
float, str or bool, each perhaps optional, a `tuple[str, ...]`, or pairs of texts. Nothing here imports jax, so that
`--help` and error messages are instant.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ml_collections import config_dict

from qwenla_jax.utils.unicode import half_character
from qwenla_jax.utils.visible import in_brief

T = TypeVar("T")

LARGEST_INT = 10**9  # steps, rows and tokens are counted in 32 bits
LARGEST_FLOAT, SMALLEST_FLOAT = 1e30, 1e-30  # what is larger or smaller is infinite or 0 in 32 bits, or after a product


class ConfigError(ValueError):
    """A setting is wrong; the message names each key, its value and what would be right."""


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A field: `low` <= value, `above` < value, value <= `high`, value < `below`, or one (some) of `choices`.

    Without `high` and `below` the upper bound is `LARGEST_INT` or `LARGEST_FLOAT`. Of pairs (regular expression, word)
    the words are those of `choices`.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **bounds})


def group(cls: type, help: str) -> Any:
    """A field that holds a dataclass of further settings."""
    return dataclasses.field(default_factory=cls, metadata={"help": help})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


class Leaf(NamedTuple):
    """One setting of the schema: dotted key without `config.`, type, whether None is legal, and its field."""

    key: str
    type: Any
    optional: bool
    field: dataclasses.Field[Any]


def leaves(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """Every setting in the order of the schema."""
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        if optional:
            hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        yield Leaf(prefix + field.name, hint, optional, field)


def to_dict(options: Any) -> dict[str, Any]:
    """Nested plain values that JSON can hold: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(options))


def to_json(options: Any) -> str:
    """The settings as a text for `--config=FILE.json`."""
    return json.dumps(to_dict(options), indent=2)


def to_config_dict(options: Any) -> config_dict.ConfigDict:
    """A locked, typed ConfigDict: an unknown key or a value of another type fails on assignment."""

    def convert(value: Any) -> config_dict.ConfigDict:
        hints = _hints(type(value))
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


def build(cls: type[T], raw: Mapping[str, Any]) -> T:
    """An instance of `cls` from a nested mapping; missing keys take their defaults.

    Raises:
      ConfigError: keys that do not exist, values of a wrong type or out of range; all at once, one a line.
    """
    problems: list[str] = []
    known = [leaf.key for leaf in leaves(cls)]
    made = _build(cls, raw, "", known, problems)
    refuse(problems)
    return typing.cast(T, made)


def refuse(problems: Iterable[str]) -> None:
    """Raises ConfigError where there are any, one a line."""
    lines = [in_brief(problem, 600) for problem in problems]
    if lines:
        raise ConfigError("\n".join(lines))


def check_command_line(argv: Sequence[str], cls: type, flag: str = "config") -> None:
    """Rejects unknown keys and unreadable numbers in `--config.key=value` arguments, before the flags are parsed.

    Raises:
      ConfigError: as `build`.
    """
    known = {leaf.key: leaf for leaf in leaves(cls)}
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
            problems.append(_unknown(key, list(known)))
        elif text is not None and leaf.type in (int, float):
            try:
                int(text, 0) if leaf.type is int else float(text)
            except ValueError:
                problems.append(f"{flag}.{key}: got {_shown(text)}, expected {_type_name(leaf)}")
        elif text is not None and leaf.type not in (str, bool):
            try:
                ast.literal_eval(text)
            except (RecursionError, MemoryError):
                problems.append(f"{flag}.{key}: got {_shown(text)}, expected {_type_name(leaf)}")
            except (ValueError, SyntaxError):
                pass  # a text, as the flag itself will find
    refuse(problems)


def config_file(argv: Sequence[str]) -> str | None:
    """The path part of --config=PATH:PRESET, None where it is not given that way."""
    for arg in argv:
        if arg.startswith(("--config=", "-config=")):
            return arg.partition("=")[2].partition(":")[0]
    return None


def describe(options: Any, flag: str = "config") -> str:
    """All settings with type, value in `options` and help, for `--help`."""
    cls = type(options)
    helps = _group_helps(cls)
    lines, last = [], ""
    for leaf in leaves(cls):
        head, _, _ = leaf.key.rpartition(".")
        if head != last:
            last = head
            lines.append(f"\n{head}: {helps[head]}")
        value: Any = to_dict(options)
        for part in leaf.key.split("."):
            value = value[part]
        shown = "none" if value is None else value
        lines.append(f"  --{flag}.{leaf.key}  ({_type_name(leaf)}, {shown})\n      {leaf.field.metadata['help']}")
    return "\n".join(lines) + "\n"


def _group_helps(cls: type, prefix: str = "") -> dict[str, str]:
    """Help of every group of settings, nested groups included, by its key."""
    helps = {}
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        helps[prefix + field.name] = field.metadata["help"]
        if dataclasses.is_dataclass(hints[field.name]):
            helps |= _group_helps(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
    return helps


def differences(saved: Mapping[str, Any], options: Any, free: Sequence[str], where: str = "folder") -> list[str]:
    """One text for every setting that differs: `config.seed: 0 in the folder, 1 now`.

    A setting that only one side has, because it was added between two versions, counts as its default.

    Args:
      saved: the earlier settings, from `to_dict`.
      options: the present ones.
      free: keys, or groups of keys, that may differ.
      where: what the earlier ones are of.
    """
    defaults, old, new = _flat(to_dict(type(options)())), _flat(saved), _flat(to_dict(options))
    texts = []
    for key in sorted({*old, *new}):
        if any(key == name or key.startswith(name + ".") for name in free):
            continue
        a, b = (side.get(key, defaults.get(key, "(absent)")) for side in (old, new))
        if a != b:
            texts.append(f"config.{key}: {a!r} in the {where}, {b!r} now")
    return texts


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


PAIRS = tuple[tuple[str, str], ...]
_NAMES = {int: "int", float: "float", str: "str", bool: "true or false", tuple[str, ...]: "texts"}


def _type_name(leaf: Leaf) -> str:
    if leaf.type == PAIRS:
        return f"pairs (regular expression, {_listed(leaf.field.metadata['choices'])})"
    return _NAMES[leaf.type] + (" or none" if leaf.optional else "")


def _unknown(key: str, known: Sequence[str]) -> str:
    key = in_brief(key, 80)
    group, _, name = key.rpartition(".")
    tails = {k: k.rpartition(".")[2] for k in known}
    # A right name in the wrong group, or its initials (lr), is more common than a typing error across two groups.
    near = [k for k, tail in tails.items() if name in (tail, "".join(word[0] for word in tail.split("_")))]
    near = near or difflib.get_close_matches(key, [k for k in known if k.rpartition(".")[0] == group], n=1, cutoff=0.75)
    near = near or [k for t in difflib.get_close_matches(name, tails.values(), n=1) for k in known if tails[k] == t]
    hint = f"; did you mean config.{near[0]}?" if near else "; --help lists the keys"
    return f"config.{key}: there is no such key{hint}"


def _build(cls: type, raw: Mapping[str, Any], prefix: str, known: list[str], problems: list[str]) -> Any:
    hints = _hints(cls)
    direct = {leaf.key: leaf for leaf in leaves(cls)}
    values = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(_unknown(key, known))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                values[name] = _build(typing.cast(type, hints[name]), value, f"{key}.", known, problems)
            else:
                problems.append(f"config.{key}: got {_shown(value)}, expected a group of settings")
        else:
            try:
                values[name] = _checked(direct[name], value)
            except ConfigError as error:
                problems.append(f"config.{key}: {error}")
    return cls(**values)


def _checked(leaf: Leaf, value: Any) -> Any:
    """The value in the leaf's own type. Raises ConfigError without the key, which the caller knows in full."""
    wrong = ConfigError(f"got {_shown(value)} ({type(value).__name__}), expected {_type_name(leaf)}")
    if leaf.optional and (value is None or value == "" or (isinstance(value, float) and math.isinf(value))):
        return None  # flags cannot spell None: an empty text or an infinite number stands for it
    if leaf.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.copysign(1e300, value)
    if isinstance(value, str) and (message := half_character(value)) is not None:
        raise ConfigError(message)
    choices = leaf.field.metadata["choices"]
    if leaf.type == tuple[str, ...]:
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
            raise wrong
        # From the command line `a,b` arrives as one text.
        items = tuple(part.strip() for item in value for part in item.split(",") if part.strip())
        for item in items:
            if choices is not None and item not in choices:
                raise ConfigError(f"got {_shown(item)}, expected some of {', '.join(choices)}")
            if items.count(item) > 1:
                raise ConfigError(f"{_shown(item)} stands twice")
        return items
    if leaf.type == PAIRS:
        return _checked_pairs(value, choices, wrong)
    if type(value) is not leaf.type:
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"got {value}, expected a finite number")
    if choices is not None and value not in choices:
        raise ConfigError(f"got {_shown(value)}, expected one of {', '.join(choices)}")
    if isinstance(value, str):
        return _checked_text(value)
    meta = leaf.field.metadata
    for name, outside, text in (
        ("low", lambda v, b: v < b, "at least"),
        ("above", lambda v, b: v <= b, "more than"),
        ("high", lambda v, b: v > b, "at most"),
        ("below", lambda v, b: v >= b, "less than"),
    ):
        if meta[name] is not None and outside(value, meta[name]):
            raise ConfigError(f"got {_shown(value)}, expected {text} {meta[name]}")
    if leaf.type is int and abs(value) > LARGEST_INT:
        raise ConfigError(f"got {_shown(value)}, expected at most {LARGEST_INT}")
    if leaf.type is float and value and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
        raise ConfigError(f"got {_shown(value)}, expected 0 or from {SMALLEST_FLOAT:g} to {LARGEST_FLOAT:g}")
    return value


def _checked_text(value: str) -> str:
    """A text as it is. Raises ConfigError where it cannot be written, or names no file that can be."""
    if "\0" in value or not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"got {_shown(value)}, expected text without null characters, in UTF-8")
    return value


def _shown(value: Any) -> str:
    """A value for a message: on one line, and short."""
    try:
        return in_brief(repr(value), 80)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def _checked_pairs(value: Any, choices: Sequence[str], wrong: ConfigError) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, (tuple, list)) or not value:
        raise wrong
    for pair in value:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise wrong
        if pair[1] not in choices:
            raise ConfigError(f"got {_shown(pair[1])} for {_shown(pair[0])}, expected {_listed(choices)}")
        try:
            re.compile(pair[0])
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{_shown(pair[0])} is not a regular expression: {error}") from error
    return tuple((pattern, mode) for pattern, mode in value)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words[:-1])) + f" or {words[-1]!r}"
