"""A closed standard output ends every command quietly. Oracle: the operating system, which breaks the pipe."""

import contextlib
import os
import subprocess
import sys

import pytest

from qwenla_jax.cli import evaluate
from qwenla_jax.cli.main import CLOSED_PIPE, COMMANDS, main


@contextlib.contextmanager
def unread():
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


def status(argv):
    """The exit status of a command whose output nobody reads."""
    with unread() as stream, contextlib.redirect_stdout(stream):
        return main(argv)


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_every_command(capfd, argv):
    assert status(argv) == CLOSED_PIPE
    assert capfd.readouterr().err == ""


def test_it_is_not_a_commands_own_error(monkeypatch):
    """A command that reports errors of files does not report this one; errors of other pipes stay its own."""

    def prints(args):
        print("x" * 100_000)
        return 0

    def fails(args):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(evaluate, "_run", prints)
    assert status(["evaluate", "--task=chair"]) == CLOSED_PIPE
    monkeypatch.setattr(evaluate, "_run", fails)
    assert main(["evaluate", "--task=chair"]) == 2


def test_in_a_process_of_its_own():
    """The interpreter, which flushes when it ends, prints nothing either."""
    with unread() as stream:
        done = subprocess.run([sys.executable, "-m", "qwenla_jax", "--help"], stdout=stream, stderr=subprocess.PIPE)
    assert done.returncode == 141 and done.stderr == b""
