"""A server in a process of its own, for checks that are no part of the suite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """Starts a server and waits until it is ready. `seconds` is the time to /health's 200.

    Args:
      log: file for what it writes to standard error.
      flags: of `qwenla serve`.
      port: 0 for any free one.
      python: the interpreter.
    """

    def __init__(self, log: Path, flags: Sequence[str], port: int = 0, python: str = sys.executable) -> None:
        self.log, begun = log, time.monotonic()
        with log.open("w") as stderr:
            command = [python, "-m", "qwenla_jax", "serve", f"--port={port}", *flags]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, cwd=ROOT
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            raise RuntimeError(f"the server has ended:\n{log.read_text()}")
        self.url = words[2].removesuffix("/v1,")
        while (
            get(f"{self.url}/health")[0] != 200
        ):  # while it loads, on a machine with much else to do, it may be silent
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended:\n{log.read_text()}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - begun

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def get(url: str) -> tuple[int, str]:
    """Status and text; status 0 where there is no answer within a minute."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def metric(url: str, name: str) -> float:
    """The sum of a metric's samples; `url` is the server's."""
    lines = get(f"{url.rstrip('/')}/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
