"""Door to `qwenla fit`."""

import sys

from qwenla_jax.cli.fit import main

if __name__ == "__main__":
    sys.exit(main())
