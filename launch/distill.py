"""Samples answers and verifies them: python launch/distill.py --config=configs/distill.py --workdir=DIR

What is found in DIR is gone on with. Questions for which no answer was accepted are in DIR/queue.jsonl: a person fills
in `response`, and `python launch/distill.py --workdir=DIR --take_back=queue.jsonl` adds them to DIR/accepted.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from qwenla_jax.distill.options import DistillOptions, from_config_dict
from qwenla_jax.distill.take_back import correct
from qwenla_jax.train.command_line import run_app
from qwenla_jax.train.schema import ConfigError
from qwenla_jax.utils.libtpu import skip_without_tpu

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/distill.py or configs/distill.py:PRESET")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (runs/distill); a run that is there is resumed")
_TAKE_BACK = flags.DEFINE_string("take_back", None, "a corrected queue, in the workdir or from here; samples nothing")


def main(argv: list[str]) -> None:
    """Checks everything that can be checked cheaply, then runs."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    skip_without_tpu()
    workdir = Path(_WORKDIR.value or Path("runs") / "distill").absolute()
    if _TAKE_BACK.value is not None:
        if _CONFIG.value is not None:
            sys.exit("--take_back goes by the settings in the workdir; leave --config out")
        try:
            sys.exit(1 if correct(workdir, _TAKE_BACK.value) else 0)
        except (ValueError, OSError) as error:
            sys.exit(f"{type(error).__name__}: {error}")
    if _CONFIG.value is None:
        sys.exit("--config is missing; expected --config=configs/distill.py or configs/distill.py:PRESET")
    try:
        options = from_config_dict(_CONFIG.value)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    if not _WORKDIR.value:
        print(f"--workdir is not given: the run is in {workdir}", flush=True)
    from qwenla_jax.distill.run import run  # after the check: a wrong key is refused before jax starts
    from qwenla_jax.train.loop import Refused

    try:
        run(options, workdir)
    except Refused as error:
        sys.exit(str(error))


if __name__ == "__main__":
    run_app(main, __doc__, DistillOptions())
