"""Door to `qwenla analyze`."""

import sys

from qwenla_jax.cli.analyze import main

if __name__ == "__main__":
    sys.exit(main())
