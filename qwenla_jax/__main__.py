"""python -m qwenla_jax: as the command `qwenla`."""

import sys

from qwenla_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
