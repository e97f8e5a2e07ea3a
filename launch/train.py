"""Trains one stage: python launch/train.py --config=configs/brpo.py --workdir=DIR"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from qwenla_jax.train.command_line import run_app
from qwenla_jax.train.options import RunOptions, from_config_dict
from qwenla_jax.train.schema import ConfigError
from qwenla_jax.utils.libtpu import skip_without_tpu

_AGAINST = flags.DEFINE_multi_string("against", [], "with --check_data: an evaluation to compare with, too; repeatable")
_CHECK_DATA = flags.DEFINE_bool(
    "check_data", False, "read every record, name the broken ones and the leaked pictures, and leave (1 if any)"
)
_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/STAGE.py or configs/STAGE.py:PRESET")
_DOCTOR = flags.DEFINE_bool("doctor", False, "take three steps in no folder, say what was found, and leave")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "say what the run would be, load nothing, and leave")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "this is one of several processes; on TPU pods and under SLURM they find each other"
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "elsewhere: HOST:PORT of process 0")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "elsewhere: how many", 1, 10**6)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "elsewhere: which of them this is, from 0", 0, 10**6)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (runs/STAGE); a run that is there is resumed")


def main(argv: list[str]) -> None:
    """Checks everything that can be checked cheaply, then runs."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    skip_without_tpu()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    if _CONFIG.value is None:
        sys.exit("--config is missing; expected --config=configs/STAGE.py or --config=configs/STAGE.py:PRESET")
    try:
        options = from_config_dict(_CONFIG.value)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    if "://" in (_WORKDIR.value or ""):
        sys.exit(f"--workdir: got {_WORKDIR.value}, expected a folder: mount the bucket and name it by its path")
    if _AGAINST.value and not _CHECK_DATA.value:
        sys.exit("--against: nothing is compared without --check_data")
    workdir = Path(_WORKDIR.value or Path("runs") / options.stage).absolute()
    if not (_WORKDIR.value or _DRY_RUN.value or _CHECK_DATA.value or _DOCTOR.value):
        print(f"--workdir is not given: the run is in {workdir}", flush=True)
    # After the check: a wrong key is refused before jax starts.
    from qwenla_jax.train.checkpoint import SaveError
    from qwenla_jax.train.data_check import check_data
    from qwenla_jax.train.doctor import examine
    from qwenla_jax.train.guard import Failed
    from qwenla_jax.train.interrupt import Stopped
    from qwenla_jax.train.loop import Refused, run
    from qwenla_jax.train.plan import describe_run

    if _DISTRIBUTED.value:
        import jax

        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        if _DRY_RUN.value:
            try:
                print("\n".join(describe_run(options)))
            except (ValueError, OSError, ModuleNotFoundError) as error:
                raise Refused(f"{type(error).__name__}: {error}") from error
            return
        if _CHECK_DATA.value:
            try:
                found = check_data(options, _AGAINST.value)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                raise Refused(f"{type(error).__name__}: {error}") from error
            print(found.text())
            sys.exit(0 if found.ok else 1)
        if _DOCTOR.value:
            checks = examine(options)
            print("\n".join(map(str, checks)))
            sys.exit(0 if all(check.ok for check in checks) else "the doctor advises against this run")
        run(options, workdir)
    except (Refused, Failed, SaveError) as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    run_app(main, __doc__, RunOptions())
