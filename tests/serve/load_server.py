"""A server of `load_run.py`, in a process of its own, and what can be read of it from outside."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from load_requests import KEY, MAX_BODY_MB, MAX_IMAGES
from server_process import ServerProcess, get, metric

FLAGS = (
    "--grace-period=1",
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


class Server(ServerProcess):
    """The server under load."""

    def __init__(self, log: Path, port: int = 0) -> None:
        super().__init__(log, FLAGS, port)
        host, port_text = self.url.removeprefix("http://").split(":")
        self.address = host, int(port_text)

    def get(self, path: str) -> tuple[int, str]:
        """See `server_process.get`."""
        return get(self.url + path)

    def metric(self, name: str) -> float:
        """See `server_process.metric`."""
        return metric(self.url, name)

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
