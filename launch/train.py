"""Door to `qwenla train`."""

import sys

from qwenla_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
