"""Door to `qwenla distill`."""

import sys

from qwenla_jax.cli.distill import main

if __name__ == "__main__":
    sys.exit(main())
