"""From `sys.argv` to checked settings: whatever stands there, settings come of it or one clear text."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from qwenla_jax.config.schema import ConfigError, build, check_command_line, config_file, describe, to_json
from qwenla_jax.recipes.by_name import RECIPES, recipe_path
from qwenla_jax.utils.visible import in_brief


def read_flags(
    argv: Sequence[str] | None,
    doc: str | None,
    define: Callable[[flags.FlagValues], None],
    options: Any = None,
) -> flags.FlagValues:
    """The flags of a command; ends the process with the help, or with one text that says what is wrong.

    The help shows the values of `--config` where that is given, else the defaults.

    Args:
      argv: the arguments after the command's name; None: those of the process.
      doc: what the command is for.
      define: defines its flags.
      options: the default settings of a command with `--config`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    values = flags.FlagValues()
    define(values)
    rest = [arg for arg in argv if arg not in ("-h", "--help", "-help")]
    wants_help = len(rest) < len(argv)
    help = _flags_help(values)
    for flag in flags.FLAGS.flags_by_module_dict().get("absl.logging", []):
        values[flag.name] = flag
    try:
        if not wants_help or config_file(_recipe_paths(rest)) is not None:
            rest = parse_flags(["", *rest], type(options), values)
        if wants_help and "config" in values and values["config"].value is not None:
            options = build(type(options), values["config"].value.to_dict())
    except ConfigError as error:
        sys.exit(str(error))
    if wants_help:
        print(doc, help, *([describe(options)] if options is not None else []), sep="\n")
        sys.exit(0)
    if len(rest) > 1:
        sys.exit(f"unexpected arguments: {' '.join(rest[1:])}")
    return values


def print_config(args: flags.FlagValues, cls: type) -> None:
    """Prints the settings of `--config` with all changes as a file for `--config`; ends the process where wrong."""
    try:
        print(to_json(build(cls, args.config.to_dict())))
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")


def _flags_help(values: flags.FlagValues) -> str:
    """One paragraph a flag."""
    lines = []
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{name}{default}\n      {flag.help}")
    return "\n".join(lines) + "\n"


def _recipe_paths(argv: Sequence[str]) -> list[str]:
    """The arguments, with the path of the recipe in `--config=brpo:7b`, and of what reads a JSON file."""
    argv = list(argv)
    for index, arg in enumerate(argv):
        if arg in ("--config", "-config") and index + 1 < len(argv):
            argv[index : index + 2] = [f"--config={argv[index + 1]}"]
            arg = argv[index]
        if arg.startswith(("--config=", "-config=")):
            name, _, preset = arg.partition("=")[2].partition(":")
            argv[index] = f"--config={recipe_path(name, preset)}"
    return argv


def parse_flags(argv: Sequence[str], cls: type, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags, of which `--config` is a file of settings.

    Args:
      argv: as `sys.argv`.
      cls: the settings' dataclass; another class where the command has none.
      values: where the flags are defined.

    Returns:
      the arguments that are no flags.

    Raises:
      ConfigError: a flag, a setting or the file of settings cannot be used; one line a problem.
      Exception: whatever else the code in the file of settings raises: its writer wants to see where.
    """
    argv = [*argv[:1], *_recipe_paths(argv[1:])]
    path = config_file(argv[1:])
    if path is not None and not os.path.isfile(path):
        raise ConfigError(
            f"--config: there is no file {in_brief(path)!r}; expected one, or a recipe such as brpo or brpo:7b, of "
            f"{', '.join(RECIPES)}"
        )
    try:
        if dataclasses.is_dataclass(cls):
            check_command_line(argv[1:], cls)
    except ConfigError as error:
        raise ConfigError(f"ConfigError: {error}") from error
    try:
        rest = values(list(argv))
        if "config" in values and (config := values["config"].value) is not None:
            config.to_dict()  # a file that could not be opened shows here
        return rest
    except Exception as error:
        first = _first(error)  # config_flags wraps what it catches, traceback and all
        if path is not None and _comes_from(first, path):
            if not isinstance(first, ValueError):
                raise first from None
            error = first
        message = str(error) if isinstance(error, (flags.Error, ValueError)) else f"{type(error).__name__}: {error}"
        raise ConfigError(in_brief(message, 500)) from None


def _first(error: BaseException) -> BaseException:
    """What was raised first, of errors that were raised while others were handled."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _comes_from(error: BaseException, path: str) -> bool:
    """Whether code in a file of settings, or in a recipe that it takes, raised an error; or is no code."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    files += [error.filename] if isinstance(error, SyntaxError) and error.filename else []
    ours = {os.path.abspath(path), *(os.path.abspath(recipe.__file__ or "") for recipe in RECIPES.values())}
    return not ours.isdisjoint(map(os.path.abspath, files))
