"""Serves a model over HTTP, as OpenAI's chat completions.

    qwenla serve
    qwenla serve --model=DIR --reattention=route --host=0.0.0.0 --api-key=KEY

Without --model it is the embedded checkpoint, for rendered scenes. A page at / asks it and shows where it looks. It
listens at once; /health says 503 until the model is loaded and compiled. SIGTERM lets running answers end. Needs the
extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.cli.generate import number, text_argument
from qwenla_jax.config.schema import leaves
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu
from qwenla_jax.weights.hub import hub_name, local_folder


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        "qwenla serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for leaf in leaves(ServeOptions):
        meta, default = leaf.field.metadata, leaf.field.default
        low, high = meta["low"], math.inf if meta["high"] is None else meta["high"]
        more: dict[str, Any] = {"type": number(leaf.type, low, high) if low is not None else text_argument}
        if leaf.key in _JSON:
            more["type"] = _json(low, high, *_JSON[leaf.key])
        elif leaf.type == tuple[str, ...]:
            more |= {"action": "extend", "nargs": "+"}
            default = []
        more |= (
            {"choices": meta["choices"]}
            if meta["choices"]
            else {"metavar": "JSON" if leaf.key in _JSON else leaf.key.rpartition("_")[2].upper()}
        )
        shown = "" if default in (None, [], ()) else f"; default: {default}"
        parser.add_argument(f"--{leaf.key.replace('_', '-')}", default=default, help=meta["help"] + shown, **more)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves. Exits with 2 where an argument cannot be used, with 1 where the model fails later."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    key = os.environ.get("QWENLA_API_KEY")
    given["api_key"] = tuple(given["api_key"] or ([key] if key else []))
    hub = hub_name(given["model"])
    given["served_model_name"] = tuple(given["served_model_name"] or [hub[0] if hub else Path(given["model"]).name])
    options = ServeOptions(**given)
    skip_without_tpu()
    keep_compiled_programs()
    try:
        from qwenla_jax.serve.http_server import bind, serve
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; pip install 'qwenla_jax[serve]'")
    import qwenla_jax
    from qwenla_jax.serve.engine_loop import Served, build

    try:
        listening = bind(options.host, options.port)
    except OSError as error:
        parser.error(f"--host, --port: {options.host}:{options.port}: {error}")
    address = f"{options.host}:{listening.getsockname()[1]}"
    name = options.served_model_name[0]
    print(f"qwenla serve: http://{address}/v1, model {name}; open http://{address}/ in a browser", flush=True)

    def load() -> Served:
        return build(qwenla_jax.load(local_folder(options.model)), options)

    failure = serve(options, load, listening, qwenla_jax.__version__)
    if failure is None:
        return 0
    print(f"qwenla serve: --model: {options.model}: {type(failure).__name__}: {failure}", file=sys.stderr)
    return 2 if isinstance(failure, ValueError | OSError) else 1


def _texts(value: Any, low: int, high: int) -> Any:
    return tuple(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else None


def _entry(key: str) -> Callable[[Any, int, int], Any]:
    def take(value: Any, low: int, high: int) -> Any:
        entry = value.get(key) if isinstance(value, dict) and len(value) == 1 else None
        return entry if type(entry) is int and low <= entry <= high else None

    return take


# Flags in JSON: the form, and what takes the value out of it, None where it is of another.
_JSON = {
    "limit_mm_per_prompt": ('{"image": N}', _entry("image")),
    "mm_processor_kwargs": ('{"max_pixels": N}', _entry("max_pixels")),
    "allowed_origins": ('["http://example.org"]', _texts),
}


def _json(low: Any, high: Any, form: str, take: Callable[[Any, int, int], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = take(json.loads(text), low, high)
        except (ValueError, RecursionError):
            value = None
        if value is None:
            bounds = "" if low is None else f" with N of {low} to {high}"
            raise argparse.ArgumentTypeError(f"got {text[:60]!r}, expected {form}{bounds}")
        return value

    return read
