"""A connection of the server: uvicorn's, which waits neither for a request's head nor for a reader without an end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 60.0  # within which the head of a request has to arrive
HEAD_BYTES = 2**16
READ_SECONDS = 60.0  # within which a client has to read what waits to be sent


class HttpProtocol(AutoHTTPProtocol):
    """Closes a connection on which no request, or half the head of one, stands for too long, or one without an end.

    So it does where a client has stopped to read: its request counts as one whose client has disconnected. uvicorn
    closes a connection that is idle after a response; one on which a request has begun it keeps for ever.
    """

    transport: Any
    loop: Any
    cycle: Any
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _size = 0

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._await_head(0)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head(len(data))
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`: more waits to be sent than is kept."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _await_head(self, size: int) -> None:
        if self.cycle is None or not self.cycle.more_body:  # else it may be the body of a request that was refused
            self._size += size
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._close)
        if self._size > HEAD_BYTES:
            self._close()

    def _stop_waiting(self) -> None:
        self._size = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
