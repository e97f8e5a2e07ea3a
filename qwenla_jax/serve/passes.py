"""Passes over answers, for their attention: one runs at a time, a few more wait, and no more requests are admitted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwenla_jax.serve.protocol import ApiError

MOST_PASSES = 16  # that run or wait, those of requests whose answer is still on its way included


class Passes:
    """Runs passes in a thread, in the order of the calls. All methods belong to one asyncio loop."""

    def __init__(self) -> None:
        self._places = 0
        self._turn = asyncio.Lock()  # of the pass that runs
        self._thread = ThreadPoolExecutor(1, "attention")

    @property
    def idle(self) -> bool:
        """Whether no request has a place and no pass runs."""
        return self._places == 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A request's place, from its admission until its last pass has ended. Raises ApiError 429 if none is free."""
        if self._places >= MOST_PASSES:
            raise ApiError(429, f"{self._places} passes over answers are waiting", code="queue_full", retry_after=5)
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def run(self, function: Callable[..., Any], *inputs: object) -> Any:
        """One pass of a request that has a place. One that waits can be cancelled; one that runs keeps the place."""
        await self._turn.acquire()
        running = asyncio.get_running_loop().run_in_executor(self._thread, function, *inputs)
        running.add_done_callback(lambda _: self._turn.release())
        try:
            return await asyncio.shield(running)
        finally:
            if not running.done():  # the client has gone
                self._places += 1
                running.add_done_callback(self._ended)

    def _ended(self, _: object) -> None:
        self._places -= 1

    def stop(self) -> None:
        """Ends the thread after the pass that runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)
