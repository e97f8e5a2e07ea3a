"""Programs that the launchers call, replaced by one that writes down its arguments and plays a part."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A stub. It notes its argument vector and standard input, then answers as the first of the PARTS does whose words all
# stand among its arguments: prints (the last answer for ever, earlier ones once), and ends with a status.
STUB = """#!{python}
import fcntl, json, sys
from pathlib import Path
home, name = Path({home!r}), {name!r}
stdin = sys.stdin.read() if {reads!r} else ""
with open(home / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(home / "calls.jsonl", "a") as calls:
        print(json.dumps([[name, *sys.argv[1:]], stdin]), file=calls)
    parts = json.loads((home / "parts.json").read_text())
    for part in parts:
        if name == part["name"] and all(any(word in arg for arg in sys.argv[1:]) for word in part["words"]):
            answer = part["answers"].pop(0) if len(part["answers"]) > 1 else part["answers"][0]
            (home / "parts.json").write_text(json.dumps(parts))
            print(answer["out"])
            print(answer["err"], file=sys.stderr)
            sys.exit(answer["status"])
"""


class Stage:
    """A folder of stubs in front of PATH, and what they were called with."""

    def __init__(self, home: Path) -> None:
        self.home, self.bin, self.parts = home, home / "bin", []
        self.bin.mkdir(parents=True)
        (home / "parts.json").write_text("[]")
        self.env = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(home),
            "LC_ALL": "C.UTF-8",
        }

    def stub(self, *names: str, reads: bool = False) -> None:
        for name in names:
            self.script(name, STUB.format(python=sys.executable, home=str(self.home), name=name, reads=reads))

    def script(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def plays(self, name: str, words: Iterable[str], *answers: str, status: int = 0, err: str = "") -> None:
        """`name` called with all of `words` gives these answers in turn, the last of them for ever."""
        given = [{"out": answer, "err": err, "status": status} for answer in answers]
        self.parts.append({"name": name, "words": list(words), "answers": given})
        (self.home / "parts.json").write_text(json.dumps(self.parts))

    def run(self, *command: str | Path, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command],
            env=self.env | env,
            cwd=self.home,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def calls(self) -> list[list[str]]:
        """Argument vectors so far, in order."""
        return [argv for argv, _ in self.calls_with_input()]

    def calls_with_input(self) -> list[tuple[list[str], str]]:
        path = self.home / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def forget(self) -> None:
        (self.home / "calls.jsonl").unlink(missing_ok=True)


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path / "stage")
