"""Moves checkpoints: qwenla convert from_hf|to_hf --help tells each one's flags

from_hf   a Hugging Face folder to Orbax, without holding the model in memory
to_hf     back, byte for byte; or a training run to a folder that transformers and PEFT load
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwenla_jax.cli import from_hf, to_hf

DIRECTIONS = {"from_hf": from_hf, "to_hf": to_hf}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the direction that the first argument names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    direction, rest = argv[0].replace("-", "_"), argv[1:]
    if direction not in DIRECTIONS:
        sys.exit(f"qwenla convert: got {argv[0]!r}, expected one of {', '.join(DIRECTIONS)}")
    DIRECTIONS[direction].main(rest)
