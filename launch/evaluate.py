"""Door to `qwenla evaluate`."""

import sys

from qwenla_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
