"""The requests of `load_run.py`: a pool whose answers are compared, and requests that must be refused."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random
import struct
import zlib
from typing import Any

from qwenla_jax.data.synthetic.scenes import make_scene

KEY = "sk-of-the-load-run"
CHAT = "/v1/chat/completions"
MAX_BODY_MB, MAX_IMAGES = 4, 4  # of the server
QUESTIONS = (
    "Is there a purple square?",
    "How many circles are there?",
    "What color is the big triangle?",
    "Which shape is left of the red circle? Answer in one word.",
    "Describe all that is on the image, " + "from left to right, " * 20 + "and then say how many shapes it has.",
)
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "none"},
    {"mode": "copy"},
    {"mode": "route", "keep_ratio": 0.25},
    {"mode": "route", "keep_ratio": 0.5, "max_insertions": 1},
)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A request that gets an error of HTTP, and nothing else.

    Attributes:
      name: for the report.
      status: the expected one.
      body: its content.
      method, path, headers: of the request.
      chunked: whether the body comes without its length.
      weight: how often it is drawn.
    """

    name: str
    status: int
    body: bytes
    method: str = "POST"
    path: str = CHAT
    headers: tuple[tuple[str, str], ...] = (("Authorization", f"Bearer {KEY}"), ("Content-Type", "application/json"))
    chunked: bool = False
    weight: float = 1.0


def data_url(data: bytes, kind: str = "png") -> str:
    """An image as a request has it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def images_url(images: list[str], text: str) -> list[dict[str, Any]]:
    """One message of a user."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _scene(rng: random.Random) -> str:
    """A rendered scene, as it is or of another size and format."""
    image = make_scene(0, 1, rng.randrange(1000)).image
    size = rng.choice([None, None, (56, 84), (140, 112), (640, 480)])
    image = image if size is None else image.resize(size)
    kind = rng.choice(["PNG", "JPEG", "WEBP"])
    stream = io.BytesIO()
    image.save(stream, kind)
    return data_url(stream.getvalue(), kind.lower())


def make_pool(seed: int, size: int) -> list[dict[str, Any]]:
    """Bodies of requests, without `stream`: text only, one image, several; all modes; greedy and seeded; n of 1 and 2.

    One in twelve has a limit of 64 tokens, at temperature 1, so that some of their answers reflect; the rest have 4 to
    18. One in eight asks for log-probabilities.
    """
    rng, pool = random.Random(seed), []
    for number in range(size):
        long = number % 12 == 0
        images = [_scene(rng) for _ in range(1 if long else rng.choice([0, 1, 1, 1, 2, 3]))]
        text = rng.choice(QUESTIONS[:2] if long else QUESTIONS)
        messages = images_url(images, text)
        if rng.random() < 0.2:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        body: dict[str, Any] = {"messages": messages, "reattention": MODES[rng.randrange(len(MODES))]}
        if long:
            body |= {"temperature": 1, "seed": rng.getrandbits(32), "max_tokens": 64}
            body["reattention"] = MODES[1 + rng.randrange(3)]
        elif rng.random() < 0.4:
            body |= {"temperature": 0, "max_tokens": rng.randint(4, 18)}
        else:
            drawn = {"temperature": rng.choice([0.7, 1.0]), "top_p": rng.choice([0.9, 1.0])}
            body |= drawn | {"seed": rng.getrandbits(32), "max_tokens": rng.randint(4, 18)}
        if rng.random() < 0.2:
            body["n"] = 2
        if rng.random() < 0.125:
            body |= {"logprobs": True, "top_logprobs": rng.choice([0, 5, 20])}
        body |= {"return_token_ids": True, "return_selection": True, "separate_reasoning": rng.random() < 0.5}
        pool.append(body)
    return pool


def _zeros(size: int) -> bytes:
    """So many zeros, compressed."""
    pressed = zlib.compressobj(9)
    piece = bytes(1 << 20)
    parts = [pressed.compress(piece[: min(1 << 20, size - at)]) for at in range(0, size, 1 << 20)]
    return b"".join([*parts, pressed.flush()])


def _png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> str:
    """A grey PNG of parts that are written by hand."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = b""
    for kind, content in ((b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")):
        parts += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data_url(b"\x89PNG\r\n\x1a\n" + parts)


def large_images() -> list[dict[str, Any]]:
    """Requests for the pool whose small files are large images: 48 million pixels, and 256 MB behind 100 x 100."""
    urls = (_png(8000, 6000, _zeros(8001 * 6000)), _png(100, 100, _zeros(256 << 20)))
    asked = {"temperature": 0, "max_tokens": 6, "return_token_ids": True, "return_selection": True}
    return [{"messages": images_url([url], QUESTIONS[0])} | asked for url in urls]


def make_refused() -> list[Refused]:
    """One of each kind."""
    text = [{"role": "user", "content": QUESTIONS[0]}]
    scene = make_scene(0, 1, 7).image
    stream, gif = io.BytesIO(), io.BytesIO()
    scene.save(stream, "PNG")
    scene.save(gif, "GIF")
    tiny = _zeros(101 * 100)
    large = json.dumps({"messages": [{"role": "user", "content": "a" * ((MAX_BODY_MB << 20) + 1)}]}).encode()
    images = {
        "image of 400 million pixels": _png(20_000, 20_000, _zeros(1000)),
        "image of 80 million pixels": _png(10_000, 8000, _zeros(10_001 * 8000)),
        "image with 256 MB of text": _png(100, 100, tiny, (b"zTXt", b"k\0\0" + _zeros(256 << 20))),
        "image with 300 texts of 512 kB": _png(100, 100, tiny, *[(b"zTXt", b"k\0\0" + _zeros(1 << 19))] * 300),
        "image with a profile of 256 MB": _png(100, 100, tiny, (b"iCCP", b"k\0\0" + _zeros(256 << 20))),
        "image that is cut off": data_url(stream.getvalue()[:-400]),
        "image of one line": _png(6000, 10, _zeros(6001 * 10)),
        "GIF": data_url(gif.getvalue(), "gif"),
        "image by address": "http://127.0.0.1:9/a.png",
        "file by address": "file:///etc/hostname",
    }
    fields: dict[str, tuple[int, dict[str, Any]]] = {
        "unknown model": (404, {"model": "other"}),
        "tools": (400, {"tools": [{}]}),
        "logit_bias": (400, {"logit_bias": {"1": 2}}),
        "response_format": (400, {"response_format": {"type": "json_object"}}),
        "n of 0": (400, {"n": 0}),
        "n above the queue": (400, {"n": 128}),
        "temperature of a text": (400, {"temperature": "hot"}),
        "unknown mode": (400, {"reattention": {"mode": "twice"}}),
        "too many images": (400, {"messages": images_url([data_url(stream.getvalue())] * (MAX_IMAGES + 1), "?")}),
        "prompt too long": (400, {"messages": [{"role": "user", "content": "long " * 3000}]}),
        "10,000 messages": (400, {"messages": text * 10_000}),
    }
    bodies: dict[str, tuple[int, bytes]] = {
        "no JSON": (400, b"{"),
        "no UTF-8": (400, b'{"messages": "\xff"}'),
        "deep JSON": (400, b"[" * 1_000_000),
        "deep JSON in a message": (400, b'{"messages": [' + b'{"content": [' * 100_000),
        "deep JSON in another field": (400, b'{"x": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        "number of 100,000 digits": (400, b'{"seed": ' + b"9" * 100_000 + b"}"),
        "body too large": (413, large),
    }
    for name, url in images.items():
        bodies[name] = 400, json.dumps({"messages": images_url([url], "?")}).encode()
    for name, (status, more) in fields.items():
        bodies[name] = status, json.dumps({"messages": text} | more).encode()
    fine = json.dumps({"messages": text, "max_tokens": 4}).encode()
    heavy = ("image of 80", "image with", "10,000", "body")
    result = [
        Refused(name, status, body, weight=0.3 if name.startswith(heavy) else 1.0)
        for name, (status, body) in bodies.items()
    ]
    json_type = ("Content-Type", "application/json")
    result += [
        Refused("body too large, in chunks", 413, large, chunked=True, weight=0.3),
        Refused("wrong key", 401, fine, headers=(("Authorization", "Bearer sk-wrong"), json_type), weight=3),
        Refused("no key", 401, fine, headers=(json_type,)),
        Refused("not declared as JSON", 415, fine, headers=(("Authorization", f"Bearer {KEY}"),)),
        Refused("unknown path", 404, fine, path="/v1/completions"),
        Refused("wrong method", 405, b"", method="GET"),
    ]
    return result
