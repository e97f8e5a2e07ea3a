"""The command `qwenla`: one subcommand an entry point. Each of them imports jax only once its flags are read."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from qwenla_jax import __version__
from qwenla_jax.cli import analyze, convert, distill, evaluate, fit, generate, replay, study, train

COMMANDS = {
    "train": (train, "train one stage: cold start, BRPO, SFT with COPY or ROUTE"),
    "generate": (generate, "ask a model about images, with re-attention"),
    "evaluate": (evaluate, "answer a benchmark's questions and score the answers"),
    "distill": (distill, "sample answers, verify them, keep what passes"),
    "analyze": (analyze, "measure attention on visual tokens, and what an image swap costs"),
    "study": (study, "all five stages at the embedded size, and the report"),
    "fit": (fit, "memory, traffic and least step time on chips that are not there"),
    "convert": (convert, "checkpoints from and to Hugging Face"),
    "replay": (replay, "compute a dumped training step again"),
}


def usage() -> str:
    """The help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    example = "qwenla train --config=brpo --workdir=runs/brpo"
    return "\n".join(
        ["usage: qwenla COMMAND [FLAGS]", "", *lines, "", "qwenla COMMAND --help tells a command's flags.", example]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(COMMANDS)}"
        print(f"qwenla: there is no command {name!r}{hint}", file=sys.stderr)
        return 2
    return COMMANDS[name][0].main(rest) or 0
