"""Serves a model over HTTP, as OpenAI's chat completions.

    qwenla serve
    qwenla serve --model=DIR --reattention=route --host=0.0.0.0 --api-key=KEY

Without --model it is the embedded checkpoint, for rendered scenes. Flags are named as vLLM's. It listens at once;
/health says 503 until the model is loaded and compiled. SIGTERM lets running answers end. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.cli.generate import number, text_argument
from qwenla_jax.config.shared_options import MODES, MODES_HELP, MOST_IMAGES, MOST_INSERTIONS, MOST_PIXELS, MOST_TOKENS
from qwenla_jax.serve.serve_options import ANSWERS, ServeOptions
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu

_KEY = "QWENLA_API_KEY"


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    defaults = ServeOptions()
    parser = argparse.ArgumentParser(
        "qwenla serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default=defaults.model, help="a folder, a model of the Hugging Face Hub, or tiny; default: tiny")
    add("--host", default="127.0.0.1", help="address to listen at; default: %(default)s")
    add("--port", type=number(int, 0, 65535), default=8000, help="0: any free one; default: %(default)s")
    add(
        "--api-key",
        action="append",
        type=text_argument,
        default=[],
        help=f"key that opens /v1; repeat it for several; default: ${_KEY}, or none",
    )
    add("--served-model-name", nargs="+", type=text_argument, help="names of the model; default: that of --model")
    add(
        "--max-model-len",
        type=number(int, 64, MOST_TOKENS),
        default=defaults.max_model_len,
        help="most tokens of a prompt and its answer; default: %(default)s",
    )
    add(
        "--limit-mm-per-prompt",
        metavar="JSON",
        type=_json_number("image", 1, MOST_IMAGES),
        default=defaults.max_images,
        help="most images of a request, such as '{\"image\": 4}'; default: 8",
    )
    add(
        "--mm-processor-kwargs",
        metavar="JSON",
        type=_json_number("max_pixels", 1, MOST_PIXELS),
        help="larger images are shrunk, such as '{\"max_pixels\": 262144}'; default: the checkpoint's bound, and half "
        "of the context an image",
    )
    add(
        "--max-num-seqs",
        type=number(int, 1, 1024),
        default=defaults.max_num_seqs,
        help="answers that are decoded at once; default: %(default)s",
    )
    add(
        "--max-queued-requests",
        type=number(int, 0, 2**20),
        default=defaults.max_queued,
        help="answers that may wait; more get 429; default: %(default)s",
    )
    add(
        "--max-body-mb",
        type=number(int, 1, 4096),
        default=defaults.max_body_bytes >> 20,
        help="largest request; larger ones get 413; default: %(default)s",
    )
    add(
        "--allowed-origins",
        metavar="JSON",
        type=_json_texts,
        default=defaults.allowed_origins,
        help="origins of other web pages that may call the server, such as '[\"*\"]'; default: none",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), help="of requests that have none; default: by chance")
    add(
        "--answer",
        choices=ANSWERS,
        default=defaults.answer,
        help="content: conclusion, sections (the whole text) or think (<think> tags around what precedes the "
        "conclusion); default: %(default)s",
    )
    add("--reattention", choices=MODES, default=defaults.reattention, help=f"{MODES_HELP}; default: %(default)s")
    add("--keep-ratio", type=number(float, 0, 1), default=defaults.keep_ratio, help="route: default: %(default)s")
    add(
        "--max-insertions",
        type=number(int, 0, MOST_INSERTIONS),
        default=defaults.max_insertions,
        help="most insertions of an answer, whatever a request says; default: %(default)s",
    )
    add(
        "--grace-period",
        type=number(float, 0, 3600),
        default=defaults.grace_seconds,
        help="seconds, at least, that /health says 503 after SIGTERM; default: %(default)s",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves. Exits with 2 where an argument cannot be used, with 1 where the model fails later."""
    parser = make_parser()
    args = parser.parse_args(argv)
    skip_without_tpu()
    keep_compiled_programs()
    try:
        from qwenla_jax.serve.http_server import bind, serve
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; pip install 'qwenla_jax[serve]'")
    import qwenla_jax
    from qwenla_jax.serve.engine_loop import Served, build
    from qwenla_jax.weights.hub import local_folder

    environment = os.environ.get(_KEY)
    options = ServeOptions(
        model=args.model,
        names=tuple(args.served_model_name or [Path(args.model).name]),
        api_keys=tuple(args.api_key or ([environment] if environment else [])),
        max_model_len=args.max_model_len,
        max_images=args.limit_mm_per_prompt,
        max_pixels=args.mm_processor_kwargs,
        max_num_seqs=args.max_num_seqs,
        max_queued=args.max_queued_requests,
        max_body_bytes=args.max_body_mb << 20,
        seed=args.seed,
        answer=args.answer,
        reattention=args.reattention,
        keep_ratio=args.keep_ratio,
        max_insertions=args.max_insertions,
        allowed_origins=args.allowed_origins,
        grace_seconds=args.grace_period,
        version=qwenla_jax.__version__,
    )
    try:
        listening = bind(args.host, args.port)
    except (OSError, OverflowError) as error:
        parser.error(f"--host, --port: {args.host}:{args.port}: {error}")
    print(f"qwenla serve: http://{args.host}:{listening.getsockname()[1]}/v1, model {options.names[0]}", flush=True)

    def load() -> Served:
        return build(qwenla_jax.load(local_folder(args.model)), options)

    failure = serve(options, load, listening)
    if failure is None:
        return 0
    print(f"qwenla serve: --model: {args.model}: {type(failure).__name__}: {failure}", file=sys.stderr)
    return 2 if isinstance(failure, ValueError | OSError) else 1


def _json_number(key: str, low: int, high: int) -> Any:
    """A parser of {"key": number}, or of key=number."""

    def read(text: str) -> int:
        try:
            value = json.loads(text) if text.lstrip().startswith("{") else {key: int(text.removeprefix(f"{key}="))}
        except ValueError:
            value = {}
        if set(value) != {key} or type(value[key]) is not int or not low <= value[key] <= high:
            raise argparse.ArgumentTypeError(f'got {text[:60]!r}, expected {{"{key}": N}} with N of {low} to {high}')
        return value[key]

    return read


def _json_texts(text: str) -> tuple[str, ...]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise argparse.ArgumentTypeError(f"got {text[:60]!r}, expected a list of texts in JSON")
    return tuple(value)
