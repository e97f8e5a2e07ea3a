"""Door to `qwenla convert to_hf`."""

import sys

from qwenla_jax.cli.to_hf import main

if __name__ == "__main__":
    sys.exit(main())
