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
      question: the text. The embedded checkpoint reflects after a countdown.
    """

    scene: int
    question: str


# Chosen so that the reasoning is wrong and the reflection corrects it, which is not the rule.
EXAMPLES = (
    PageExample(29, "Is there a purple circle?", 0),
    PageExample(40, "What color is the big circle?", 0),
    PageExample(36, "How many yellow shapes are there?", 2),
    PageExample(20, "Are there more triangles than circles?", 2),
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
    examples = [{"image": f"page/scene-{example.scene}.png", "question": example.question} for example in EXAMPLES]
    return {
        "version": version,
        "model": options.served_model_name[0],
        "embedded": options.model == "tiny",
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
