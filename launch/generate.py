"""Door to `qwenla generate`."""

import sys

from qwenla_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
