"""Trains one stage: qwenla train --config=RECIPE[:PRESET] --workdir=DIR [--config.KEY=VALUE ...]

    qwenla train --config=brpo --workdir=runs/brpo
    qwenla train --config=brpo:7b --config.init_from=MODEL --config.data.source=we_math:FOLDER --dry_run
    qwenla train --config=sft_copy --config.init_from=BASE --config.data.source=DISTILLED/accepted.jsonl

--list names the recipes and their presets; a file is as good, configs/brpo.py or the settings.json of a run. With
--config, --help shows its values. A run that is in the work folder is resumed. In a checkout python launch/train.py
does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from qwenla_jax.cli.command_line import print_config, read_flags
from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError
from qwenla_jax.recipes.by_name import listing
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_multi_string(
        "against", [], "with --check_data: an evaluation to compare with, too; repeatable", flag_values=values
    )
    flags.DEFINE_bool(
        "check_data",
        False,
        "read every record, name the invalid ones and the leaked images, and leave (1 if any)",
        flag_values=values,
    )
    config_flags.DEFINE_config_file("config", None, "configs/STAGE.py or configs/STAGE.py:PRESET", flag_values=values)
    flags.DEFINE_bool(
        "preflight", False, "take three steps in no folder, say what was found, and leave", flag_values=values
    )
    flags.DEFINE_bool("list", False, "name the recipes and their presets, and leave", flag_values=values)
    flags.DEFINE_bool(
        "print_config", False, "print all settings as a file for --config=FILE.json, and leave", flag_values=values
    )
    flags.DEFINE_bool("dry_run", False, "say what the run would be, load nothing, and leave", flag_values=values)
    flags.DEFINE_bool(
        "distributed",
        False,
        "this is one of several processes; on TPU pods and under SLURM they find each other",
        flag_values=values,
    )
    flags.DEFINE_string("coordinator", None, "elsewhere: HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "elsewhere: how many", 1, 10**6, flag_values=values)
    flags.DEFINE_integer("process_id", None, "elsewhere: which of them this is, from 0", 0, 10**6, flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "folder of the run (runs/STAGE); a run that is there is resumed", flag_values=values
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks everything that can be checked cheaply, then runs."""
    args = read_flags(argv, __doc__, define_flags, RunOptions())
    skip_without_tpu()
    keep_compiled_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    if args.list:
        return print(listing())
    if args.config is None:
        sys.exit("--config is missing; expected --config=RECIPE or --config=RECIPE:PRESET; --list names them")
    if args.print_config:
        return print_config(args, RunOptions)
    try:
        options = from_config_dict(args.config)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    if "://" in (args.workdir or ""):
        sys.exit(f"--workdir: got {args.workdir}, expected a folder: mount the bucket and name it by its path")
    if args.against and not args.check_data:
        sys.exit("--against: nothing is compared without --check_data")
    workdir = Path(args.workdir or Path("runs") / options.stage).absolute()
    if not (args.workdir or args.dry_run or args.check_data or args.preflight):
        print(f"--workdir is not given: the run is in {workdir}", flush=True)
    # After the check: a wrong key is refused before jax starts.
    from qwenla_jax.run.checkpoints import SaveError
    from qwenla_jax.run.signals import Stopped
    from qwenla_jax.tools.data_check import check_data
    from qwenla_jax.tools.dry_run import describe_run
    from qwenla_jax.tools.preflight import examine
    from qwenla_jax.train.health import Failed
    from qwenla_jax.train.loop import RunRefused, run

    if args.distributed:
        import jax

        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    try:
        if args.dry_run:
            try:
                print("\n".join(describe_run(options)))
            except (ValueError, OSError, ModuleNotFoundError) as error:
                raise RunRefused(f"{type(error).__name__}: {error}") from error
            return
        if args.check_data:
            try:
                result = check_data(options, args.against)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                raise RunRefused(f"{type(error).__name__}: {error}") from error
            print(result.text())
            sys.exit(0 if result.ok else 1)
        if args.preflight:
            checks = examine(options)
            print("\n".join(map(str, checks)))
            sys.exit(0 if all(check.ok for check in checks) else "preflight advises against this run")
        run(options, workdir)
    except (RunRefused, Failed, SaveError) as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
