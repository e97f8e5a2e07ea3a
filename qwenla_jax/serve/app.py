"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import json
import logging
import random
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwenla_jax.serve.attention_request import AttentionRequest, attention_answer, parse_attention
from qwenla_jax.serve.chat_answer import ChatAnswer
from qwenla_jax.serve.chat_prompt import to_example
from qwenla_jax.serve.engine_loop import EngineLoop, Question, to_question
from qwenla_jax.serve.page_routes import page_routes
from qwenla_jax.serve.passes import Passes
from qwenla_jax.serve.prometheus import ServerMetrics
from qwenla_jax.serve.protocol import ApiError, ChatRequest, parse_request, unknown_model
from qwenla_jax.serve.serve_options import ServeOptions

BODY_SECONDS = 60.0  # within which a body has to arrive
HELD_BODIES = 8  # all bodies that wait together may be so many times as large as one
Handler = Callable[[Request], Awaitable[Response]]
log = logging.getLogger("qwenla_jax.serve")


def make_app(options: ServeOptions, engine: EngineLoop, passes: Passes, version: str) -> Starlette:
    """The application; it starts the engine's thread when it starts itself.

    Args:
      options: of the server.
      engine: not started yet.
      passes: over answers; they are stopped when the application ends.
      version: of the package.
    """
    server = _Server(options, engine, passes, version)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        passes.stop()

    routes = [
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
        Route("/v1/reattention/attention", server.guarded(server.attention), methods=["POST"]),
        Route("/v1/models", server.guarded(server.models)),
        Route("/v1/models/{name:path}", server.guarded(server.models)),
        Route("/health", server.health),
        Route("/version", server.version),
        Route("/metrics", server.metrics_page),
        *page_routes(options, version),
    ]
    middleware = []
    if options.allowed_origins:
        allowed = list(options.allowed_origins)
        middleware.append(Middleware(CORSMiddleware, allow_origins=allowed, allow_methods=["*"], allow_headers=["*"]))
    # Among `handlers` Starlette would raise it once more, and uvicorn log its message.
    middleware.append(Middleware(ExceptionMiddleware, handlers={Exception: _unexpected}))
    handlers = {HTTPException: _http_error, ApiError: _api_error}
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII, because a text of JSON may hold halves of characters, which UTF-8 has no bytes for.
    return Response(json.dumps(content), status, headers, "application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return _json(error.body, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    answer = await _api_error(request, ApiError(error.status_code, message, code="unknown_url"))
    answer.headers.update(error.headers or {})  # which methods a path allows
    return answer


async def _unexpected(request: Request, error: Exception) -> Response:
    _log_error(error)
    return await _api_error(request, ApiError(500, "internal error", code="internal_error"))


def _log_error(error: BaseException) -> None:
    # Without the message, which could hold a part of the prompt.
    log.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


class _Events(StreamingResponse):
    """A stream; `closed` is called when it ends, however it does."""

    def __init__(self, content: AsyncIterator[str], closed: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()


class _Held:
    """Bytes of a body that are kept."""

    size = 0


class _Server:
    """The handlers and what they share."""

    def __init__(self, options: ServeOptions, engine: EngineLoop, passes: Passes, version: str) -> None:
        self._options, self._engine, self._passes, self._version = options, engine, passes, version
        self._keys = [hashlib.sha256(key.encode()).digest() for key in options.api_key]
        self._metrics = ServerMetrics(options.served_model_name[0], lambda: engine.running, lambda: engine.waiting)
        self._random = random.Random(options.seed)
        self._created = int(time.time())
        self._held = 0  # bytes of bodies that are not prompts yet

    def guarded(self, handler: Handler) -> Handler:
        """The handler for whoever has a key."""

        async def guard(request: Request) -> Response:
            if self._keys:
                scheme, _, given = request.headers.get("authorization", "").partition(" ")
                digest = hashlib.sha256(given.encode("latin-1", "replace")).digest()
                if scheme.lower() != "bearer" or not any(
                    [hmac.compare_digest(digest, key) for key in self._keys]
                ):  # a list: all are compared
                    raise ApiError(
                        401, "expected Authorization: Bearer KEY with a key of this server", code="invalid_api_key"
                    )
            return await handler(request)

        return guard

    async def health(self, request: Request) -> Response:
        """200 once requests are served, else 503."""
        self._engine.ready()
        return Response()

    async def version(self, request: Request) -> Response:
        """The package's version."""
        return _json({"version": self._version})

    async def metrics_page(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """All names of the model, or one."""
        options, wanted = self._options, request.path_params.get("name")
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "qwenla_jax",
                "root": options.served_model_name[0],
                "parent": None,
                "max_model_len": options.max_model_len,
            }
            for name in options.served_model_name
            if wanted in (None, name)
        ]
        if not cards:
            raise unknown_model(wanted)
        return _json(cards[0] if wanted is not None else {"object": "list", "data": cards})

    async def chat(self, request: Request) -> Response:
        """Chat completions."""
        arrived = time.perf_counter()

        async def answer(data: bytes, held: _Held) -> Response:
            chat = await asyncio.to_thread(parse_request, data, self._options)
            del data
            return await self._while_connected(request, self._answer(chat, held, arrived))

        return await self._with_body(request, answer)

    async def attention(self, request: Request) -> Response:
        """Attention of an answer on its images, from one more pass over it."""

        async def answer(data: bytes, held: _Held) -> Response:
            asked = await asyncio.to_thread(parse_attention, data, self._options)
            del data
            return await self._while_connected(request, self._attention(asked))

        return await self._with_body(request, answer)

    async def _attention(self, asked: AttentionRequest) -> Response:
        inputs = asked, self._engine.ready(), self._options.limit_mm_per_prompt
        with self._passes.place():
            return _json(await self._passes.run(attention_answer, *inputs))

    async def _with_body(self, request: Request, answer: Callable[[bytes, _Held], Awaitable[Response]]) -> Response:
        """The answer to a request with a body, whose bytes are counted until it is there."""
        held = _Held()
        self._engine.ready()
        try:
            return await answer(await asyncio.wait_for(self._body(request, held), BODY_SECONDS), held)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from error
        finally:
            self._release(held)

    async def _body(self, request: Request, held: _Held) -> bytes:
        """The body; one that is too large is read to its end but not kept, so that the client gets the error."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "expected Content-Type: application/json", code="unsupported_media_type")
        most, size, chunks = self._options.max_body_mb << 20, 0, []
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                chunks.clear()
                self._release(held)
                continue
            chunks.append(chunk)
            held.size += len(chunk)
            self._held += len(chunk)
            if self._held > HELD_BODIES * most:
                raise ApiError(429, "too many large requests are waiting", code="queue_full", retry_after=5)
        if size > most:
            raise ApiError(413, f"the body has {size} bytes, at most {most} are read", code="request_too_large")
        return b"".join(chunks)

    def _release(self, held: _Held) -> None:
        self._held -= held.size
        held.size = 0

    async def _answer(self, chat: ChatRequest, held: _Held, arrived: float) -> Response:
        """The answer, or its stream."""
        served = self._engine.ready()

        def prepare() -> Question:
            bounds = self._options.limit_mm_per_prompt, served.buckets.prompts[-1]
            example = to_example(chat.messages, served.tok, served.processor, served.layout, *bounds)
            return to_question(chat, example, served, self._random)

        base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        with contextlib.ExitStack() as place:
            if chat.return_reattention:
                place.enter_context(self._passes.place())
            question = await self._engine.ask(chat.n, prepare)
            answer = ChatAnswer(chat, served, question, self._options.answer)
            closed = functools.partial(self._closed, base["id"], question, answer, arrived, place.pop_all())
        chat.messages.clear()
        self._release(held)
        self._metrics.prompt_tokens.inc(len(question.example.ids_T))
        if chat.stream:
            return _Events(self._stream(base, answer, arrived), closed)
        try:
            async for _ in self._parts(answer, arrived):
                pass
            return _json(base | {"object": "chat.completion", "choices": answer.choices(), "usage": answer.usage()})
        finally:
            closed()

    async def _while_connected(self, request: Request, answer: Any) -> Response:
        """The answer, which is cancelled where the client has gone."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else Response(status_code=499)
        finally:
            for task in tasks:
                task.cancel()

    async def _parts(self, answer: ChatAnswer, arrived: float) -> AsyncIterator[int]:
        """The number of each answer that got something, until all have ended."""
        first = True
        while not answer.ended:
            part = await answer.question.parts.get()
            if part.error is not None:
                raise part.error
            if first and part.ids:
                self._metrics.first_token.observe(time.perf_counter() - arrived)
                first = False
            if part.rollout is not None and answer.chat.return_reattention:
                await self._passes.run(answer.measure, part)
            answer.add(part)
            yield part.choice

    async def _stream(self, base: dict[str, Any], answer: ChatAnswer, arrived: float) -> AsyncIterator[str]:
        base = base | {"object": "chat.completion.chunk"}
        event = lambda content: f"data: {json.dumps(content)}\n\n"  # noqa: E731
        try:
            for choice in answer.first_chunks():
                yield event(base | {"choices": [choice]})
            async for number in self._parts(answer, arrived):
                for choice in answer.chunks(number):
                    yield event(base | {"choices": [choice]})
            if answer.chat.include_usage:
                yield event(base | {"choices": [], "usage": answer.usage()})
        except ApiError as error:
            yield event(error.body)
        except Exception as error:
            _log_error(error)
            yield event(ApiError(500, "internal error", code="internal_error").body)
        yield "data: [DONE]\n\n"

    def _closed(
        self, number: str, question: Question, answer: ChatAnswer, arrived: float, place: contextlib.ExitStack
    ) -> None:
        """Counts a request, and cancels what nobody waits for."""
        place.close()
        seconds = time.perf_counter() - arrived
        cancelled = self._engine.cancel(question)
        metrics, tokens = self._metrics, sum(answer.lengths())
        metrics.generation_tokens.inc(tokens)
        metrics.ended["abort"].inc(cancelled)
        for reason in answer.reasons():
            metrics.ended[reason].inc()
        inserted, skipped = answer.insertions()
        metrics.insertions.inc(inserted)
        metrics.skipped.inc(skipped)
        if answer.ended:
            metrics.latency.observe(seconds)
            self._engine.took(seconds)
        state = "ended" if answer.ended else "cancelled"
        log.info("%s %s: %d + %d tokens in %.2f s", number, state, len(question.example.ids_T), tokens, seconds)
