"""Computes a dumped step again: qwenla replay --step_dump=WORKDIR/step_dumps/step_000123

A run that ends because its updates were not finite leaves such a folder. Exits with 0 where the step comes out bit for
bit as it was, with 1 where it does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("step_dump", None, "folder of the step dump", required=True, flag_values=values)


def main(argv: Sequence[str] | None = None) -> None:
    """Computes the step again and prints the comparison."""
    args = read_flags(argv, __doc__, define_flags)
    skip_without_tpu()
    keep_compiled_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from qwenla_jax.tools.replay import replay

    try:
        result = replay(Path(args.step_dump))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(result)
    sys.exit(0 if result.reproduced else 1)
