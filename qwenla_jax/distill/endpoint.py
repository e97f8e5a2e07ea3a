"""One HTTP endpoint that is sent JSON: within a deadline, of bounded size, and without telling secrets.

Whatever the other side does, a request ends as a `Reply` or as a `Trouble`. The HTTP client's own limits of time are
for one read each, which a server that sends a byte now and then never reaches; so there is a deadline for all of it.
"""

from __future__ import annotations

import asyncio
import http.cookiejar
import json
import os
import re
import threading
import urllib.parse
import urllib.request
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenla_jax.utils.visible import in_brief, visible

if TYPE_CHECKING:
    import httpx2

LARGEST_REPLY = 4 << 20  # bytes
LARGEST_ERROR = 1 << 16  # bytes that are read of the body of an error
_GRACE_S = 5.0  # so much later than its deadline a request is given up even where the client does not end it
_SHORTEST_SECRET = 6  # characters; shorter ones are placeholders such as EMPTY, and stand in ordinary words


class Trouble(Exception):
    """A request came to no reply; the text says why, on one line and without secrets."""


class Reply(NamedTuple):
    """What came back.

    Attributes:
      status: of HTTP.
      retry_after_s: the pause that the endpoint asks for, in seconds; 0 where it asks for none, or names a date.
      body: bytes; of an error as many as came, at most `LARGEST_ERROR`.
    """

    status: int
    retry_after_s: float
    body: bytes


def address_problem(url: str) -> str | None:
    """What is wrong with an endpoint's address, None where nothing is. What may be a password is not told."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is none raises
    except ValueError:
        return "it is not an address, expected http://HOST/v1 or https://HOST/v1"
    if "@" in url or "?" in url or "#" in url:
        return "it holds a user name, a password or parameters, expected only https://HOST/v1"
    if re.search(r"[\s\\]", url) or not url.isprintable():
        return "it holds a blank or a control character, expected http://HOST/v1 or https://HOST/v1"
    if parts.scheme not in ("http", "https") or not host:
        return f"got {in_brief(url)!r}, expected http://HOST/v1 or https://HOST/v1"
    return None


def key_problem(key: str) -> str | None:
    """What is wrong with an API key, None where nothing is. The key is not told."""
    if not key:
        return "it is empty"
    if not re.fullmatch(r"[!-~]+", key):
        return "it holds a blank, a line break or another character that no key has"
    return None


def read_key(variable: str | None) -> str | None:
    """The API key in an environment variable, without the blanks around it; None where no variable is named.

    Raises:
      ValueError: there is no key in it, or none that can be sent. Neither the key nor the name is told: keys have been
        given as names.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    problem = key_problem(key)
    if problem is not None:
        problem = problem if key else "there is no such environment variable, or it is empty; expected the name of one"
        raise ValueError(problem)
    return key


class _NoCookies(http.cookiejar.CookieJar):
    def extract_cookies(self, response: Any, request: Any) -> None:
        """Keeps none."""


class Endpoint:
    """Posts to one URL; safe to use from several threads. To be closed, or used as a context manager.

    Args:
      url: where to.
      timeout_s: seconds for one request, from looking up the name to the last byte.
      api_key: sent as a bearer token; None: not sent.

    Raises:
      ValueError: url or api_key cannot be used.
    """

    def __init__(self, url: str, timeout_s: float, api_key: str | None = None) -> None:
        for what, problem in (
            ("the address", address_problem(url)),
            ("the API key", None if api_key is None else key_problem(api_key)),
        ):
            if problem is not None:
                raise ValueError(f"{what} of the endpoint: {problem}")
        self.url = url
        self._timeout_s = timeout_s
        # No compression: what unpacks has no bound.
        self._headers = {"Content-Type": "application/json", "User-Agent": "qwenla_jax", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._secrets = _spellings([api_key or "", *_proxy_passwords()])
        whole = "|".join(map(re.escape, self._secrets))
        self._finder = re.compile(whole, re.IGNORECASE) if whole else None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx2.AsyncClient | None = None

    def post(self, body: bytes) -> Reply:
        """Sends a body and waits for what comes back.

        Raises:
          Trouble: nothing came back in time, or what came is no reply.
        """
        pending = asyncio.run_coroutine_threadsafe(self._post(body), self._running())
        try:
            return pending.result(self._timeout_s + _GRACE_S)
        except TimeoutError as error:
            pending.cancel()
            raise Trouble(f"no whole reply within {self._timeout_s:g} s") from error

    def scrub(self, text: str) -> str:
        """The text without secrets, and without the beginning of one at its end, where it was broken off."""
        text = self._finder.sub("[secret]", text) if self._finder is not None else text
        ends = [text[-size:] for size in range(_SHORTEST_SECRET, max(map(len, self._secrets), default=0))]
        half = [end for end in ends if any(secret.lower().startswith(end.lower()) for secret in self._secrets)]
        return text[: -len(half[-1])] + "[secret]" if half else text

    def message(self, body: bytes, most: int = 200) -> str:
        """What a body says, for a message: on one line, without secrets and control characters."""
        return in_brief(self.scrub(body.decode("utf-8", "replace")), most)

    def close(self) -> None:
        """Ends the connections."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(loop), loop)

    def __enter__(self) -> Endpoint:
        """The endpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop that all requests run in, in a thread of its own."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), name="endpoint", daemon=True).start()
            return self._loop

    async def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
        loop.stop()

    async def _post(self, body: bytes) -> Reply:
        status, check_stop, got, encoding = 0, 0.0, bytearray(), ""
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._client is None:
                    self._client = _make_client(self._headers, self._timeout_s)
                async with self._client.stream("POST", self.url, content=body) as response:
                    check_stop = _seconds(response.headers.get("Retry-After", ""))
                    encoding = response.headers.get("Content-Encoding", "identity")
                    status = response.status_code
                    most = LARGEST_REPLY if response.is_success else LARGEST_ERROR
                    async for part in response.aiter_raw():
                        got += part
                        if len(got) > most:
                            break
        except Exception as error:  # of many types, by whatever layer found something wrong
            # Of an error the status is what counts, and it is known.
            if status < 300:
                late = isinstance(error, TimeoutError)
                what = f"no whole reply within {self._timeout_s:g} s" if late else f"{type(error).__name__}: {error}"
                raise Trouble(in_brief(self.scrub(what))) from None  # the cause may hold the headers
        if status < 300 and len(got) > LARGEST_REPLY:
            raise Trouble(f"a reply of more than {LARGEST_REPLY} bytes")
        if status < 300 and encoding.lower() != "identity":
            raise Trouble(f"a reply in the encoding {visible(encoding)[:40]}, which was not asked for")
        return Reply(status, check_stop, bytes(got))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _make_client(headers: dict[str, str], timeout_s: float) -> httpx2.AsyncClient:
    import httpx2  # a run that asks nobody does not load it

    return httpx2.AsyncClient(
        headers=headers,
        timeout=timeout_s,  # of one read; `_post` has the deadline
        follow_redirects=False,  # the key would go along
        cookies=_NoCookies(),
        # A connection that is kept may be closed by the other side just when it is used again.
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
    )


def _seconds(value: str) -> float:
    return float(value) if re.fullmatch(r"[0-9]{1,6}", value) else 0.0


def _spellings(secrets: list[str]) -> list[str]:
    """The secrets as they are, and as they look in JSON and in a URL; the longest first."""
    known = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]
    forms = {form for s in known for form in (s, json.dumps(s)[1:-1], urllib.parse.quote(s, ""))}
    return sorted(forms, key=len, reverse=True)


def _proxy_passwords() -> list[str]:
    result = []
    for url in urllib.request.getproxies().values():
        userinfo, at, _ = url.rpartition("@")
        if at:
            password = userinfo.rpartition("/")[2].partition(":")[2]
            result += [password, urllib.parse.unquote(password)]
    return result
