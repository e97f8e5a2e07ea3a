"""From `sys.argv` to checked settings: whatever stands there, settings come of it or one clear text."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from qwenla_jax.train.schema import ConfigError, check_command_line, config_file, describe
from qwenla_jax.utils.visible import in_brief


def run_app(main: Callable[[list[str]], None], doc: str | None, options: Any) -> None:
    """Runs a command: its help, or `main` with the arguments that are no flags. Ends the process.

    Args:
      main: the command.
      doc: what it is for.
      options: the default settings, for the help and for the names of its settings.
    """
    if any(arg in ("-h", "--help", "-help") for arg in sys.argv[1:]):
        print(doc, describe(options), sep="\n")

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return parse_flags(argv, type(options))
        except ConfigError as error:
            sys.exit(str(error))

    app.run(main, flags_parser=parse)


def parse_flags(argv: Sequence[str], cls: type, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags, of which `--config` is a file of settings.

    Args:
      argv: as `sys.argv`.
      cls: the settings' dataclass.
      values: where the flags are defined.

    Returns:
      the arguments that are no flags.

    Raises:
      ConfigError: a flag, a setting or the file of settings cannot be used; one line a problem.
      Exception: whatever else the code in the file of settings raises: its writer wants to see where.
    """
    path = config_file(argv[1:])
    if path is not None and not os.path.isfile(path):
        raise ConfigError(f"--config: there is no file {in_brief(path)!r}; expected one such as configs/brpo.py")
    try:
        check_command_line(argv[1:], cls)
    except ConfigError as error:
        raise ConfigError(f"ConfigError: {error}") from error
    try:
        rest = values(list(argv))
        if (config := values["config"].value) is not None:
            config.to_dict()  # a file that could not be opened shows here
        return rest
    except Exception as error:
        first = _first(error)  # config_flags wraps what it catches, traceback and all
        if path is not None and _comes_from(first, path):
            if not isinstance(first, ValueError):
                raise first from None
            error = first
        told = str(error) if isinstance(error, (flags.Error, ValueError)) else f"{type(error).__name__}: {error}"
        raise ConfigError(in_brief(told, 500)) from None


def _first(error: BaseException) -> BaseException:
    """What was raised first, of errors that were raised while others were handled."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _comes_from(error: BaseException, path: str) -> bool:
    """Whether code in a file raised an error, or is no code."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    files += [error.filename] if isinstance(error, SyntaxError) and error.filename else []
    return os.path.abspath(path) in map(os.path.abspath, files)
