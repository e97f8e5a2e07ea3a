"""Stands between harnesses and a server, and keeps every request with its answer.

    python tests/serve/harnesses/record.py SERVER_URL FOLDER --port=8902

http://127.0.0.1:8902/RUN/v1/... goes to SERVER_URL/v1/... unchanged, and is a line of FOLDER/RUN.jsonl afterwards:

    path, user_agent, body   what arrived; of `GET` no body
    status, answer           what went back: an object, or the objects of a stream's events
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FORWARDED = ("authorization", "content-type", "accept", "user-agent")


class Recorder(ThreadingHTTPServer):
    """The server in between.

    Args:
      port: to listen at.
      url: of the server behind.
      folder: of the records.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, port: int, url: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.behind, self.folder, self.lock = urllib.parse.urlsplit(url), folder, threading.Lock()

    def keep(self, run: str, record: dict[str, Any]) -> None:
        """Adds a line."""
        with self.lock, (self.folder / f"{run}.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")


class Handler(BaseHTTPRequestHandler):
    """Forwards; an answer goes back as it comes."""

    server: Recorder

    def do_GET(self) -> None:
        """Forwards a GET."""
        self._forward(None)

    def do_POST(self) -> None:
        """Forwards a POST."""
        self._forward(self.rfile.read(int(self.headers.get("content-length", 0))))

    def _forward(self, body: bytes | None) -> None:
        _, run, rest = self.path.split("/", 2)
        assert self.server.behind.hostname is not None
        behind = http.client.HTTPConnection(self.server.behind.hostname, self.server.behind.port)
        headers = {name: self.headers[name] for name in FORWARDED if name in self.headers}
        behind.request(self.command, f"/{rest}", body, headers)
        answer, got = behind.getresponse(), b""
        self.send_response(answer.status)
        for name in ("content-type", "retry-after"):
            if (value := answer.getheader(name)) is not None:
                self.send_header(name, value)
        self.end_headers()
        while part := answer.read1(65536):
            got += part
            self.wfile.write(part)
            self.wfile.flush()
        record = {"path": f"/{rest}", "user_agent": self.headers.get("user-agent"), "status": answer.status}
        record |= {"body": json.loads(body) if body else None, "answer": _objects(got.decode())}
        self.server.keep(run, record)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _objects(text: str) -> Any:
    """The object of an answer, or those of its events."""
    if not text.startswith("data:"):
        return json.loads(text) if text else None
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(event) for event in events if event != "[DONE]"]


def main() -> None:
    """Records until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    Recorder(args.port, args.url, args.folder).serve_forever()


if __name__ == "__main__":
    main()
