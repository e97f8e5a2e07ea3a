"""A server of `load_run.py`, in a process of its own, and what can be read of it from outside."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from load_requests import KEY, MAX_BODY_MB, MAX_IMAGES

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--max-model-len=512",
    f'--limit-mm-per-prompt={{"image": {MAX_IMAGES}}}',
    "--max-num-seqs=8",
    "--max-queued-requests=64",
    f"--max-body-mb={MAX_BODY_MB}",
    f"--api-key={KEY}",
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The server at a moment: seconds since the run began, requests that had ended, its memory in MB, open files."""

    seconds: float
    requests: int
    memory: float
    files: int
    threads: int


class Server:
    """Starts it. `seconds` is the time to /health's 200."""

    def __init__(self, log: Path, port: int = 0) -> None:
        self.log, begun = log, time.monotonic()
        with log.open("w") as stderr:
            command = [sys.executable, "-m", "qwenla_jax", "serve", f"--port={port}", "--grace-period=1", *FLAGS]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, cwd=ROOT
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            raise RuntimeError(f"the server has ended:\n{log.read_text()}")
        self.url = words[2].removesuffix("/v1,")
        host, port_text = self.url.removeprefix("http://").split(":")
        self.address = host, int(port_text)
        while self.get("/health")[0] != 200:  # while it loads, on a machine with much else to do, it may be silent
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended:\n{log.read_text()}")
            time.sleep(0.2)
        self.seconds = time.monotonic() - begun

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; status 0 where there is no answer within a minute."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def sample(self, seconds: float, requests: int) -> Sample:
        """Reads /proc."""
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        memory = int(status["VmRSS"].split()[0]) / 1024
        return Sample(seconds, requests, memory, len(list((folder / "fd").iterdir())), int(status["Threads"]))

    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def errors(self) -> int:
        """Lines of its log that begin a traceback."""
        return sum(" in" == line[-3:] or line.startswith("Traceback") for line in self.log.read_text().splitlines())

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
