"""Samples answers and verifies them: qwenla distill --config=distill[:PRESET] --workdir=DIR

--make=cold_start makes the data of the cold start instead: a teacher (--config.teacher.models) inserts a reflection
into each response of --config.data.source.

A run in DIR is resumed. Questions for which no answer was accepted are in DIR/queue.jsonl: a person fills
in `response`, and `qwenla distill --workdir=DIR --take_back=queue.jsonl` adds them to DIR/accepted.jsonl.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.config.schema import ConfigError
from qwenla_jax.distill.distill_options import DistillOptions, from_config_dict
from qwenla_jax.distill.human_review import correct
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu

_RECIPES = {"answers": "distill", "cold_start": "distill:cold_start"}  # by what they make


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    config_flags.DEFINE_config_file(
        "config", None, "configs/distill.py or configs/distill.py:PRESET", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", None, "folder of the run (runs/distill); a run that is there is resumed", flag_values=values
    )
    flags.DEFINE_enum(
        "make",
        None,
        list(_RECIPES),
        "what is made; chooses the recipe where --config is left out: distill for answers, else distill:cold_start",
        flag_values=values,
    )
    flags.DEFINE_string(
        "take_back", None, "a corrected queue, in the workdir or from here; samples nothing", flag_values=values
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks everything that can be checked cheaply, then runs."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = re.search(rf"(?m)^--?make[=\n]({'|'.join(_RECIPES)})$", "\n".join(argv))
    if made and not any(arg.partition("=")[0] in ("--config", "-config") for arg in argv):
        argv.insert(0, f"--config={_RECIPES[made[1]]}")  # before parsing: settings need it
    args = read_flags(argv, __doc__, define_flags, DistillOptions())
    skip_without_tpu()
    keep_compiled_programs()
    workdir = Path(args.workdir or Path("runs") / "distill").absolute()
    if args.take_back is not None:
        if args.config is not None:
            sys.exit("--take_back goes by the settings in the workdir; leave --config out")
        try:
            sys.exit(1 if correct(workdir, args.take_back) else 0)
        except (ValueError, OSError) as error:
            sys.exit(f"{type(error).__name__}: {error}")
    if args.config is None:
        sys.exit("--config is missing; expected --config=configs/distill.py or configs/distill.py:PRESET")
    try:
        options = from_config_dict(args.config)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    if args.make not in (None, options.make):
        sys.exit(f"--make={args.make}: the settings of --config make {options.make}; leave --make or --config out")
    if not args.workdir:
        print(f"--workdir is not given: the run is in {workdir}", flush=True)
    from qwenla_jax.distill.run import run  # after the check: a wrong key is refused before jax starts
    from qwenla_jax.train.loop import RunRefused

    try:
        run(options, workdir)
    except RunRefused as error:
        sys.exit(str(error))
