"""Door to `qwenla study`."""

import sys

from qwenla_jax.cli.study import main

if __name__ == "__main__":
    sys.exit(main())
