"""Puts a server under load, and compares every answer with that to the same request alone.

    python tests/serve/load_run.py --clients=64 --requests=10000 --seed=0 --report=load.md

Clients send requests of a pool, one after another: whole and streamed, read slowly, cancelled, left half sent; and
requests that must be refused, oversized ones and decompression bombs among them. The same seed draws the same requests.
Then the server is killed with SIGKILL amid requests, started again, asked again, and ended with SIGTERM amid requests.
The report is Markdown; the exit code is 1 where anything in it fails. No part of the test suite, for it takes long.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import h11

sys.path.insert(0, str(Path(__file__).resolve().parent))

from load_client import Connection, Result, answer_of, chat_request, exchange
from load_report import Facts, report
from load_requests import CHAT, KEY, Refused, large_images, make_pool, make_refused
from load_server import Server

KINDS = {"whole": 40, "stream": 40, "slow stream": 3, "cancelled": 6, "half-open": 0.5, "refused": 10.5}
LARGE = 0.003  # share of answers that are about an image of many pixels
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
BROKEN = (OSError, h11.RemoteProtocolError)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A request of the run. `kind` of KINDS; `item` of the pool; `how` a number that tells how it is cancelled."""

    kind: str
    item: int
    how: int


def draw(seed: int, count: int, pool: int, large: int) -> list[Drawn]:
    """All requests of a run; the last `large` items of the pool are drawn rarely."""
    rng, result = random.Random(seed), []
    for _ in range(count):
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        item = rng.randrange(pool - large)
        if rng.random() < LARGE:
            item = pool - 1 - rng.randrange(large)
        result.append(Drawn(kind, item, rng.randrange(2**16)))
    return result


async def alone(server: Server, pool: list[dict[str, Any]], items: list[int]) -> dict[tuple[int, bool], Any]:
    """Answers, one request at a time, whole and streamed."""
    answers = {}
    for item in items:
        for stream in (False, True):
            connection = await Connection(server.address).open()
            result = await exchange(connection, chat_request(pool[item], stream))
            connection.close()
            if result.status != 200:
                raise RuntimeError(f"item {item} alone: {result.status} {result.content[:300]!r}")
            answers[item, stream] = answer_of(result.content, stream)
        whole, streamed = answers[item, False], answers[item, True]
        for one, other in zip(whole["choices"], streamed["choices"], strict=True):
            for name in ("token_ids", "sections", "insertions", "finish_reason", "logprobs"):
                if one[name] != other[name]:
                    raise RuntimeError(f"item {item} alone: its stream has other {name}: {one[name]}, {other[name]}")
    return answers


class Run:
    """The clients and what they see; `facts` has the counts."""

    def __init__(self, server: Server, pool: list[dict[str, Any]], answers: Any, facts: Facts, patience: float) -> None:
        self._server, self._pool, self._answers, self._facts = server, pool, answers, facts
        self._patience, self._refused = patience, make_refused()
        self._each_refused = iter(self._refused)  # every kind once, and then as they are drawn
        self._half: list[tuple[Connection, asyncio.Task[bytes]]] = []

    async def run(self, drawn: list[Drawn], clients: int, ends: float) -> None:
        """All clients, each taking the next request once its last has ended, until `ends` (of time.monotonic)."""
        left, facts = collections.deque(drawn), self._facts
        start = time.monotonic()

        async def client(number: int) -> None:
            connection = None
            while left and time.monotonic() < ends:
                one = left.popleft()
                try:
                    connection = await asyncio.wait_for(self._one(one, number, connection), self._patience)
                except TimeoutError:
                    facts.fail(f"{one}: no answer within {self._patience:.0f} s")
                    connection = None
                except (*BROKEN, ValueError, KeyError, h11.LocalProtocolError) as error:
                    facts.fail(f"{one}: {type(error).__name__}: {str(error)[:300]}")
                    connection = None
                facts.done[number] += 1
            if connection is not None:
                connection.close()

        watching = asyncio.ensure_future(self._watch(start))
        await asyncio.gather(*(client(number) for number in range(clients)))
        facts.seconds = time.monotonic() - start
        watching.cancel()
        await self._end_half_open()

    async def _watch(self, start: float) -> None:
        facts = self._facts
        while True:
            facts.samples.append(self._server.sample(time.monotonic() - start, sum(facts.done.values())))
            before = time.monotonic()
            status, _ = await asyncio.to_thread(self._server.get, "/health")
            facts.health.append(time.monotonic() - before)
            if status != 200:
                facts.fail(f"/health: {status}")
            await asyncio.sleep(3)

    async def _one(self, one: Drawn, number: int, connection: Connection | None) -> Connection | None:
        """Sends one; returns the connection where it can be used again."""
        facts = self._facts
        facts.kinds[one.kind] += 1
        if connection is not None and (not connection.usable or one.kind in ("slow stream", "half-open", "cancelled")):
            connection.close()
            connection = None
        if one.kind == "half-open":
            await self._half_open(one)
            return None
        if connection is None:
            connection = await Connection(self._server.address, one.kind == "slow stream").open()
        if one.kind == "refused":
            return await self._refuse(one, connection)
        stream = one.kind in ("stream", "slow stream") or (one.kind == "cancelled" and one.how % 4 > 1)
        request = chat_request(self._pool[one.item], stream)
        if one.kind == "cancelled":
            await self._cancel(one, request, connection)
            return None
        result, connection = await self._admitted(connection, request, one.kind == "slow stream")
        facts.statuses[one.kind, result.status] += 1
        if result.status != 200:
            facts.fail(f"{one}: {result.status} {result.content[:300]!r}")
            return None
        facts.compare(str(one), answer_of(result.content, stream), self._answers[one.item, stream])
        if one.kind == "slow stream":
            connection.close()
            return None
        facts.latency[number].append(result.seconds)
        if result.first is not None and stream:
            facts.first[number].append(result.first)
        return connection if connection.usable else None

    async def _admitted(self, connection: Connection, request: Refused, slow: bool) -> tuple[Result, Connection]:
        """The response, however often the server says 429 before it."""
        while True:
            again = connection.used_before
            try:
                result = await exchange(connection, request)
            except BROKEN:
                if not again:
                    raise
                result = None  # closed as idle at the moment that the request was sent
            if result is not None and (result.status != 429 or request.status == 429):
                return result, connection
            connection.close()
            if result is not None:
                self._facts.retried += 1
                await asyncio.sleep(int(result.headers["retry-after"]))
            connection = await Connection(self._server.address, slow).open()

    async def _cancel(self, one: Drawn, request: Refused, connection: Connection) -> None:
        """Leaves: a moment after all is sent, or after the response's head, or amid a stream."""
        try:
            if one.how % 4 in (0, 2):
                await connection.send(request)
                await asyncio.sleep((one.how >> 2) % 256 / 256)
            else:
                result = await exchange(connection, request, (one.how >> 2) % 4)
                self._facts.statuses[one.kind, result.status] += 1
                if result.status not in (200, 429):
                    self._facts.fail(f"{one}: {result.status}")
        finally:
            connection.close()

    async def _refuse(self, one: Drawn, connection: Connection) -> Connection | None:
        weights = [request.weight for request in self._refused]
        (request,) = random.Random(one.how).choices(self._refused, weights)
        request = next(self._each_refused, request)
        # An image is decoded only once there is a place in the queue: 429 may come first.
        result, connection = await self._admitted(connection, request, False)
        self._facts.refused[request.name, request.status, result.status] += 1
        if result.status != request.status:
            self._facts.fail(f"{request.name}: {result.status}, expected {request.status}: {result.content[:200]!r}")
        return connection if connection.usable else None

    async def _half_open(self, one: Drawn) -> None:
        """Sends a part of the head, or the head and a part of the body, and stays."""
        connection = await Connection(self._server.address).open()
        head = HEAD.encode()
        part = head[: 10 + one.how % (len(head) - 10)] if one.how % 2 else head + b'Content-Length: 900\r\n\r\n{"mess'
        connection.writer.write(part)
        await connection.writer.drain()
        self._half.append((connection, asyncio.ensure_future(connection.reader.read(1 << 12))))

    async def _end_half_open(self) -> None:
        facts = self._facts
        for connection, reading in self._half:
            name = "still open" if not reading.done() else "closed" if reading.exception() else _first(reading.result())
            facts.half_open[name] += 1
            reading.cancel()
            connection.close()


def _first(data: bytes) -> str:
    return f"answered {data.split()[1].decode()}" if data.startswith(b"HTTP/1.1 ") else "closed"


async def settle(server: Server, facts: Facts, files: int) -> None:
    """The server is empty again once everybody has gone."""
    for _ in range(600):
        facts.running, facts.waiting = (server.metric(f"vllm:num_requests_{name}{{") for name in ("running", "waiting"))
        facts.last = server.sample(facts.seconds, sum(facts.done.values()))
        if facts.running == facts.waiting == 0 and facts.last.files <= files:
            break
        await asyncio.sleep(0.2)
    facts.ended = {
        name: server.metric(f'vllm:request_success_total{{finished_reason="{name}"')
        for name in ("stop", "length", "abort")
    }
    facts.insertions = server.metric("qwenla:insertions_total")
    facts.errors_logged = server.errors()


async def amid(server: Server, pool: list[dict[str, Any]], what: signal.Signals) -> list[Any]:
    """Sends a signal to the server amid 16 streams; what the streams gave, answers or errors."""
    begun = 0
    all_begun = asyncio.Event()

    async def stream(item: int) -> Any:
        nonlocal begun
        connection = await Connection(server.address).open()
        content = b""
        try:
            await connection.send(chat_request(pool[item], True))
            async for event in connection.receive():
                if isinstance(event, h11.Response):
                    begun += 1
                    if begun == 16:
                        all_begun.set()
                elif isinstance(event, h11.Data):
                    content += bytes(event.data)
            return answer_of(content, True)
        except (*BROKEN, ValueError) as error:
            return error
        finally:
            connection.close()

    streams = [asyncio.ensure_future(stream(item)) for item in range(16)]
    await all_begun.wait()
    server.process.send_signal(what)
    return await asyncio.gather(*streams)


async def main_run(args: argparse.Namespace, facts: Facts, folder: Path) -> None:
    """Everything, in its order."""
    pool = make_pool(args.seed, args.pool) + large_images()
    server = Server(folder / "log")
    try:
        facts.start_seconds = server.seconds
        answers = await alone(server, pool, list(range(len(pool))))
        facts.note_pool(pool, answers)
        files = server.sample(0, 0).files
        cpu = server.cpu_seconds()
        drawn = draw(args.seed, args.requests, len(pool), 2)
        run = Run(server, pool, answers, facts, args.patience)
        await run.run(drawn, args.clients, time.monotonic() + 60 * args.minutes)
        facts.cpu_seconds = server.cpu_seconds() - cpu
        await settle(server, facts, files)
        facts.files_before = files
        print(f"the load has ended after {facts.seconds:.0f} s", file=sys.stderr, flush=True)
        if args.load_only:
            return
        broken = await amid(server, pool, signal.SIGKILL)
        facts.killed = sum(isinstance(each, Exception) for each in broken)
        facts.kill_code = server.process.wait()
        server = Server(folder / "log-2", server.address[1])
        facts.restart_seconds = server.seconds
        items = list(range(0, len(pool), max(1, len(pool) // 30)))
        for key, answer in (await alone(server, pool, items)).items():
            facts.compare(f"after the restart: {key}", answer, answers[key], "restart")
        for item, answer in enumerate(await amid(server, pool, signal.SIGTERM)):
            facts.compare(f"amid SIGTERM: {item}", answer, answers[item, True], "drain")
        facts.term_code = await asyncio.to_thread(server.process.wait)
        facts.errors_logged += server.errors()
    finally:
        if server.process.poll() is None:
            server.kill()


def main() -> int:
    """Runs it; 0 where all holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=100, help="distinct requests that are answered")
    parser.add_argument("--minutes", type=float, default=1e6, help="no request begins after so many")
    parser.add_argument("--patience", type=float, default=900, help="seconds after which a request counts as lost")
    parser.add_argument("--most_growth_mb", type=float, default=48, help="of the server, after a tenth of the requests")
    parser.add_argument("--load_only", action="store_true", help="neither kill the server nor start it again")
    parser.add_argument("--report", type=Path, help="file for the report, besides the output")
    args = parser.parse_args()
    facts = Facts(
        {name: getattr(args, name) for name in ("clients", "requests", "seed", "most_growth_mb", "load_only")}
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(main_run(args, facts, Path(folder)))
        except Exception as error:  # what was seen before it is reported nevertheless
            facts.fail("".join(traceback.format_exception(error)))
    text, failed = report(facts)
    print(text)
    if args.report:
        args.report.write_text(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
