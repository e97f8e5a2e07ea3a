"""Door to `qwenla convert from_hf`."""

import sys

from qwenla_jax.cli.from_hf import main

if __name__ == "__main__":
    sys.exit(main())
