"""A client of HTTP/1.1 for `load_run.py`: h11 parses, and everything else a client may do badly is at hand."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import h11
from load_requests import Refused

_TEXT = re.compile(rb'"(content|reasoning)": "[^"]')  # not the empty one that a stream begins with


class Connection:
    """One connection. `slow` reads 512 bytes at a time into a buffer of the smallest size, with pauses."""

    def __init__(self, address: tuple[str, int], slow: bool = False) -> None:
        self._address, self._slow, self.used_before = address, slow, False

    async def open(self) -> Connection:
        """Connects."""
        sock = socket.socket()
        if self._slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self._address)
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=1024 if self._slow else 2**16)
        self._parser, self.used = h11.Connection(h11.CLIENT), time.monotonic()
        return self

    async def send(self, request: Refused) -> None:
        """Sends all of a request."""
        headers = [("Host", "x"), *request.headers]
        headers.append(
            ("Transfer-Encoding", "chunked") if request.chunked else ("Content-Length", str(len(request.body)))
        )
        self._write(h11.Request(method=request.method, target=request.path, headers=headers))
        for at in range(0, len(request.body), 1 << 16):
            self._write(h11.Data(data=request.body[at : at + (1 << 16)]))
            await self.writer.drain()
        self._write(h11.EndOfMessage())

    def _write(self, event: Any) -> None:
        self.writer.write(self._parser.send(event) or b"")

    async def receive(self) -> AsyncIterator[h11.Event]:
        """Events of the response up to its end. Raises OSError or h11's RemoteProtocolError where it breaks off."""
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                data = await self.reader.read(512 if self._slow else 1 << 16)
                if self._slow:
                    await asyncio.sleep(0.05)
                if not data and self._parser.their_state is h11.SEND_RESPONSE:
                    raise ConnectionResetError("the server has closed the connection")
                self._parser.receive_data(data)
                continue
            if isinstance(event, h11.EndOfMessage):
                break
            yield event
        if self._parser.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
            self._parser.start_next_cycle()
            self.used, self.used_before = time.monotonic(), True
        else:
            self.close()

    @property
    def usable(self) -> bool:
        """Whether another request can be sent; the server closes idle connections after 5 s."""
        idle = self._parser.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}
        return idle and not self.writer.is_closing() and time.monotonic() - self.used < 2

    def close(self) -> None:
        """At once, as a client does that is killed."""
        self.writer.transport.abort()


class Result:
    """What came back: the status, the headers, the content, and seconds to the first token and to the end."""

    def __init__(self) -> None:
        self.status, self.headers = 0, {}
        self.content, self.first, self.seconds = b"", None, 0.0

    headers: dict[str, str]
    first: float | None


async def exchange(connection: Connection, request: Refused, leave_after: int | None = None) -> Result:
    """Sends a request and reads its response, or no more than `leave_after` pieces of it."""
    result, pieces, start = Result(), 0, time.monotonic()
    await connection.send(request)
    async for event in connection.receive():
        if isinstance(event, h11.Response):
            result.status = event.status_code
            result.headers = {name.decode(): value.decode() for name, value in event.headers}
        elif isinstance(event, h11.Data):
            result.content += bytes(event.data)
            pieces += 1
            if result.first is None and _TEXT.search(event.data):
                result.first = time.monotonic() - start
        if leave_after is not None and pieces >= leave_after and result.status:
            connection.close()
            break
    result.seconds = time.monotonic() - start
    return result


def chat_request(body: dict[str, Any], stream: bool) -> Refused:
    """A request of the pool."""
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return Refused("", 200, json.dumps(body | more).encode())


def answer_of(content: bytes, stream: bool) -> dict[str, Any]:
    """All that a response says about its answers, without its number and time.

    Raises:
      ValueError: it is not complete.
    """
    if not stream:
        got = json.loads(content)
        return {"choices": [_of_choice(choice) for choice in got["choices"]], "usage": got["usage"]}
    *events, last = content.decode().split("\n\n")[:-1]
    if last != "data: [DONE]":
        raise ValueError(f"the stream ends with {last[:200]!r}")
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        if "error" in chunk:
            raise ValueError(f"the stream has the error {chunk['error']}")
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], {"index": part["index"], "message": {}, "logprobs": None})
            delta, message = part["delta"], whole["message"]
            for name in ("reasoning", "content"):
                message[name] = message.get(name, "") + (delta.get(name) or "")
            message |= {name: delta[name] for name in ("sections", "insertions") if name in delta}
            if part["logprobs"]:
                before = whole["logprobs"]["content"] if whole["logprobs"] else []
                whole["logprobs"] = {"content": before + part["logprobs"]["content"]}
            whole |= {name: part[name] for name in ("finish_reason", "token_ids") if part.get(name) is not None}
    return {"choices": [_of_choice(choices[index]) for index in sorted(choices)], "usage": usage}


def _of_choice(choice: dict[str, Any]) -> dict[str, Any]:
    message, logprobs = choice["message"], choice["logprobs"]
    taken = {name: message[name] for name in ("content", "sections", "insertions")}
    taken |= {name: choice[name] for name in ("index", "finish_reason", "token_ids")}
    return taken | {"reasoning": message["reasoning"] or None, "logprobs": logprobs and logprobs["content"]}
