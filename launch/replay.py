"""Computes the step of a capsule again: python launch/replay.py --capsule=WORKDIR/capsules/step_000123

A run that ends because its updates were not finite leaves such a folder. Exits with 0 where the step comes out bit for
bit as it was, with 1 where it does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

from qwenla_jax.utils.libtpu import skip_without_tpu

_CAPSULE = flags.DEFINE_string("capsule", None, "folder of the capsule", required=True)


def main(argv: list[str]) -> None:
    """Reads, computes, tells."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    skip_without_tpu()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from qwenla_jax.train.replay import replay

    try:
        found = replay(Path(_CAPSULE.value))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(found)
    sys.exit(0 if found.reproduced else 1)


if __name__ == "__main__":
    app.run(main)
