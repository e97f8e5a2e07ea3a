"""The server's process: listens, loads, serves, and ends in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from qwenla_jax.serve.app import make_app
from qwenla_jax.serve.engine_loop import EngineLoop, Served
from qwenla_jax.serve.http_protocol import HttpProtocol
from qwenla_jax.serve.passes import Passes
from qwenla_jax.serve.serve_options import ServeOptions

CLOSING_SECONDS = 10  # for clients to read what has been answered
# Clients keep a connection for 5 seconds (httpx) to a minute after an answer. A server that closes it first may do so
# while the next request is under way, which fails.
IDLE_SECONDS = 75


class HttpServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT: then /health says 503, and it ends once no answer runs, or at a second signal.

    Args:
      options: of the server.
      load: gives the model, in a thread.
      version: of the package.
    """

    def __init__(self, options: ServeOptions, load: Callable[[], Served], version: str) -> None:
        self.engine, self._passes = EngineLoop(load, options, self._exit), Passes()
        self._options, self._signals = options, 0
        config = uvicorn.Config(
            make_app(options, self.engine, self._passes, version),
            http=HttpProtocol,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=CLOSING_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, and ends at once at the second."""
        self._signals += 1
        if self._signals > 1 or self.engine.state == "failed":
            self.should_exit = self.force_exit = True
        else:
            asyncio.get_event_loop().call_soon_threadsafe(self._drain_soon)

    def _drain_soon(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        loaded = self.engine.state == "ready"
        self.engine.state = "draining"
        ends = time.monotonic() + (self._options.grace_period if loaded else 0)
        while time.monotonic() < ends or not (self.engine.idle and self._passes.idle):
            await asyncio.sleep(0.05)
        self._exit()

    def _exit(self) -> None:
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A listening address. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def serve(
    options: ServeOptions, load: Callable[[], Served], listening: socket.socket, version: str
) -> BaseException | None:
    """Serves until a signal.

    Args:
      options: of the server.
      load: gives the model.
      listening: from `bind`.
      version: of the package.

    Returns:
      why the model could not be loaded or has failed; None after a signal.
    """
    handler, log = logging.StreamHandler(), logging.getLogger("qwenla_jax.serve")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    server = HttpServer(options, load, version)
    server.run([listening])
    if not server.engine.stop():
        # It is compiling, which nothing interrupts; the interpreter must not end under it.
        sys.stdout.flush()
        os._exit(0)
    return server.engine.failure
