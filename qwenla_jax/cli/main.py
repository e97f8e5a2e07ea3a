"""The command `qwenla`: one subcommand an entry point, imported when it is called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

CLOSED_PIPE = 141  # 128 + SIGPIPE: what a shell reports for a program whose output nobody reads any more

COMMANDS = {
    "train": "train one stage: cold start, BRPO, SFT with COPY or ROUTE",
    "generate": "ask a model about images, with re-attention",
    "serve": "answer over HTTP, as OpenAI's chat completions",
    "evaluate": "answer a benchmark's questions and score the answers",
    "distill": "sample answers, verify them, keep what passes",
    "analyze": "measure attention on visual tokens, and what an image swap costs",
    "study": "all five stages at the embedded size, and the report",
    "fit": "memory, traffic and least step time on chips that are not there",
    "convert": "checkpoints from and to Hugging Face",
    "replay": "compute a dumped training step again",
}


def usage() -> str:
    """The help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    example = "qwenla train --config=brpo --workdir=runs/brpo"
    return "\n".join(
        ["usage: qwenla COMMAND [FLAGS]", "", *lines, "", "qwenla COMMAND --help tells a command's flags.", example]
    )


class _ClosedPipe(SystemExit):
    """Standard output is closed; no OSError, which commands report as an error of theirs."""


class _Stdout:
    """Standard output that raises `_ClosedPipe` where its reader has gone.

    The signal SIGPIPE is no alternative: it would also end a run that writes to a process of the rewards that has died.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError as error:
            raise _ClosedPipe(CLOSED_PIPE) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError as error:
            raise _ClosedPipe(CLOSED_PIPE) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; its exit status, `CLOSED_PIPE` where the reader of its output ended first."""
    stdout: Any = sys.stdout
    sys.stdout = guarded = _Stdout(stdout)
    try:
        try:
            return _run(argv)
        finally:
            guarded.flush()
    except _ClosedPipe:
        # The interpreter flushes once more when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stdout.fileno())
        os.close(nowhere)
        return CLOSED_PIPE
    finally:
        sys.stdout = stdout


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name == "--version":
        from qwenla_jax import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(COMMANDS)}"
        print(f"qwenla: there is no command {name!r}{hint}", file=sys.stderr)
        return 2
    if name == "train":
        from qwenla_jax.cli import train as command
    elif name == "generate":
        from qwenla_jax.cli import generate as command
    elif name == "serve":
        from qwenla_jax.cli import serve as command
    elif name == "evaluate":
        from qwenla_jax.cli import evaluate as command
    elif name == "distill":
        from qwenla_jax.cli import distill as command
    elif name == "analyze":
        from qwenla_jax.cli import analyze as command
    elif name == "study":
        from qwenla_jax.cli import study as command
    elif name == "fit":
        from qwenla_jax.cli import fit as command
    elif name == "convert":
        from qwenla_jax.cli import convert as command
    else:
        from qwenla_jax.cli import replay as command
    return command.main(rest) or 0
