"""Asks a model about images.

    qwenla generate --model=tiny --image=FILE --question="How many circles?"
    qwenla generate --model=DIR --image=FILE --question=TEXT --reattention=route --keep_ratio=0.25 --json

Prints the answer by sections, and where the model looked at its images again: how many visual tokens were put into
the sequence once more, which, and how much attention went to visual tokens before and in the reflection. With --json
one JSON object goes to standard output: text, token_ids, sections, reattention, skipped, stopped, seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwenla_jax.config.shared_options import MODES, MODES_HELP
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu
from qwenla_jax.utils.unicode import half_character


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2; --help has the rest."""
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")


def number(kind: Callable[[str], Any], low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """A parser of numbers in a range.

    Args:
      kind: int or float.
      low, high: the bounds.
      above: whether `low` itself is out.
    """
    what = "a whole number" if kind is int else "a number"
    bounds = f"{'above' if above else 'of at least'} {low}" + ("" if math.isinf(high) else f" and at most {high}")

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Not a number is in no range; what is above 0 must be so in 32 bits.
        inside = value is not None and low <= value <= high and not (above and value == low)
        if value is None or not inside or 0 < abs(value) < 1e-30:
            raise argparse.ArgumentTypeError(f"got {_brief(repr(text))}, expected {what} {bounds}")
        return value

    return read


def text_argument(text: str) -> str:
    """A text; bytes of a command line that are none become halves of characters."""
    if (message := half_character(text)) is not None:
        raise argparse.ArgumentTypeError(f"it {message}")
    return text


def not_empty(text: str) -> str:
    """A text with something in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, expected a text")
    return text_argument(text)


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = _Parser("qwenla generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        required=True,
        help="folder of a checkpoint in Hugging Face format, or tiny: the embedded one, for rendered scenes",
    )
    add(
        "--image",
        metavar="FILE",
        action="append",
        required=True,
        help="an image (PNG, JPEG, ...); give the flag again for each further image",
    )
    add("--question", metavar="TEXT", type=not_empty, required=True, help="what to ask")
    add(
        "--reattention",
        choices=MODES,
        default="copy",
        help=f"{MODES_HELP}; default: %(default)s",
    )
    add(
        "--keep_ratio",
        metavar="SHARE",
        type=number(float, 0, 1),
        default=0.5,
        help="route: share of the visual tokens that is kept, 0 to 1; default: %(default)s",
    )
    add(
        "--max_insertions",
        metavar="N",
        type=number(int, 0, 256),
        default=2,
        help="most insertions of a response; later reflections are text alone; default: %(default)s",
    )
    add(
        "--temperature",
        metavar="T",
        type=number(float, 0, 1e6),
        default=0.0,
        help="0 is greedy, 1 the model's own distribution; default: %(default)s",
    )
    add(
        "--top_p",
        metavar="P",
        type=number(float, 0, 1, above=True),
        default=1.0,
        help="with a temperature: sample from the most likely tokens that hold this probability, above 0 to 1; "
        "default: %(default)s",
    )
    add(
        "--seed",
        metavar="N",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="with a temperature: of the random numbers, 0 to 4294967295; default: %(default)s",
    )
    add(
        "--max_new_tokens",
        metavar="N",
        type=number(int, 1, 2**18),
        default=1024,
        help="longest response in tokens; default: %(default)s",
    )
    add(
        "--max_pixels",
        metavar="N",
        type=number(int, 1, 2**26),
        default=None,
        help="larger images are shrunk to so many pixels; default: the checkpoint's own bound",
    )
    said = "text of a system turn; default: no such turn"
    add("--system", metavar="TEXT", type=text_argument, default=None, help=said)
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Checks flags and files before anything heavy, asks, prints. Exits with 2 where an argument cannot be used."""
    parser = make_parser()
    args = parser.parse_args(argv)
    skip_without_tpu()
    keep_compiled_programs()
    from qwenla_jax.weights.hf import EMBEDDED

    folder = EMBEDDED if args.model == "tiny" else Path(args.model)
    if not folder.is_dir():
        parser.error(
            f"--model: {folder}: no such folder; expected one in Hugging Face format, with a config.json, or tiny"
        )
    import qwenla_jax
    from qwenla_jax.data.images.decode import open_image
    from qwenla_jax.inference.ask import check_checkpoint

    try:
        for name in args.image:
            open_image(name)  # a wrong file is refused before the checkpoint is read
    except (ValueError, OSError) as error:
        parser.error(f"--image: {error}")
    try:
        checkpoint = qwenla_jax.load(folder)
        check_checkpoint(checkpoint)
    except (ValueError, OSError) as error:
        text = str(error)
        parser.error(f"--model: {text if text.startswith(str(folder)) else f'{folder}: {text}'}")
    options = ("reattention", "keep_ratio", "max_insertions", "temperature", "top_p", "seed", "max_new_tokens")
    options += ("max_pixels",)
    try:
        answer = qwenla_jax.ask(
            checkpoint, args.image, args.question, system=args.system, **{name: getattr(args, name) for name in options}
        )
    except ValueError as error:
        parser.error(f"--image: {error}" if str(error).startswith(tuple(args.image)) else str(error))
    if args.json:
        print(json.dumps(answer.to_dict()))
    else:
        qwenla_jax.show(answer, file=sys.stdout)


def _one_line(message: str) -> str:
    """A message without line breaks, for lists of problems have them; a long list is cut."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    more = f" ... and {len(lines) - 6} more lines" if len(lines) > 6 else ""
    return _brief(" ".join(lines[:6]), 1000) + more


def _brief(text: str, most: int = 80) -> str:
    """A text without control characters, cut."""
    from qwenla_jax.utils.visible import in_brief

    return in_brief(text, most)
