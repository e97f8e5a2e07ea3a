"""Door to `qwenla replay`."""

import sys

from qwenla_jax.cli.replay import main

if __name__ == "__main__":
    sys.exit(main())
