"""Asks a model about images.

    qwenla generate --model=tiny --image=scene:7 --question="How many circles?"
    qwenla generate --model=DIR --image=FILE --question=TEXT --reattention=route --keep_ratio=0.25 --json

    qwenla generate --model=tiny --image=scene:7 --interactive

Prints the answer by sections, and every insertion before a reflection: how many visual tokens were inserted, which
ones, and how much attention visual tokens received before and in the reflection. --json prints one JSON object
instead: text, token_ids, sections, reattention, skipped, stopped, seconds. --stream prints the text while it is
generated, and then what was inserted. --interactive does so too, and reads further questions about the same images, one
a line, until the input ends or a line is empty; each is asked by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qwenla_jax.config.shared_options import MODES, MODES_HELP
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu
from qwenla_jax.utils.unicode import half_character

if TYPE_CHECKING:
    from qwenla_jax.data.synthetic.scenes import Scene

_SCENE = "scene:"


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
    _add_question(parser.add_argument_group("model, images and question").add_argument)
    _add_reattention(parser.add_argument_group("re-attention").add_argument)
    _add_sampling(parser.add_argument_group("sampling").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    return parser


def _add_question(add: Callable[..., Any]) -> None:
    """Model, images and question."""
    add(
        "--model",
        metavar="MODEL",
        required=True,
        help="folder of a checkpoint in Hugging Face format, a model of the Hugging Face Hub, or tiny: the embedded "
        "one, for rendered scenes",
    )
    add(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="an image (PNG, JPEG, ...), or scene:N, a rendered scene of number N, which needs no file; give the flag "
        "again for each further image",
    )
    add(
        "--video",
        metavar="FILE",
        action="append",
        default=[],
        help="a video file (extra `video`), or a folder of its frames as images; videos follow the images. Only images "
        "are inserted, so --reattention is none with it",
    )
    add(
        "--fps",
        metavar="N",
        type=number(float, 0, 1000, above=True),
        default=2.0,
        help="frames a second that are taken of a video file, and of a folder's images; default: %(default)s",
    )
    add(
        "--max_pixels",
        metavar="N",
        type=number(int, 1, 2**26),
        default=None,
        help="larger images are shrunk to so many pixels; default: the checkpoint's own bound",
    )
    add("--question", metavar="TEXT", type=not_empty, help="what to ask; needed, but with --interactive")
    add("--interactive", action="store_true", help="read questions from the input, one a line; an empty line ends")
    add(
        "--system",
        metavar="TEXT",
        type=text_argument,
        default=None,
        help="text of a system turn; default: no such turn",
    )


def _add_reattention(add: Callable[..., Any]) -> None:
    """Which insertions, and how many."""
    add(
        "--reattention",
        choices=MODES,
        help=f"{MODES_HELP}; default: copy, with a video none",
    )
    add(
        "--keep_ratio",
        metavar="RATIO",
        type=number(float, 0, 1),
        default=0.5,
        help="route: ratio of the visual tokens that are selected, 0 to 1; default: %(default)s",
    )
    add(
        "--max_insertions",
        metavar="N",
        type=number(int, 0, 256),
        default=2,
        help="most insertions of a response; later reflections are text alone; default: %(default)s",
    )


def _add_sampling(add: Callable[..., Any]) -> None:
    """How tokens are sampled."""
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
        "--presence_penalty",
        metavar="X",
        type=number(float, -2, 2),
        default=0.0,
        help="subtracted from the logits of tokens of the response, once, -2 to 2; default: %(default)s",
    )
    add(
        "--frequency_penalty",
        metavar="X",
        type=number(float, -2, 2),
        default=0.0,
        help="subtracted from the logits of tokens of the response, for each time they have been, -2 to 2; "
        "default: %(default)s",
    )
    add(
        "--repetition_penalty",
        metavar="X",
        type=number(float, 0, 1e6, above=True),
        default=1.0,
        help="divides positive logits, and multiplies negative ones, of tokens of prompt and response, above 0; "
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


def _add_output(add: Callable[..., Any]) -> None:
    """The form in which the answer is printed."""
    add("--stream", action="store_true", help="print the text while it is generated, not by sections at the end")
    add("--json", action="store_true", help="print one JSON object instead of text")


def main(argv: Sequence[str] | None = None) -> None:
    """Checks flags and files before anything heavy, asks, prints. Exits with 2 where an argument cannot be used."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.image and not args.video:
        parser.error("--image or --video: expected at least one")
    if not (args.question or args.interactive):
        parser.error("--question: expected one, or --interactive")
    if args.json and args.stream:
        parser.error("--stream: it prints text as it comes, and --json one object; expected one of the two")
    args.reattention = args.reattention or ("none" if args.video else "copy")
    if args.video and args.reattention != "none":
        parser.error(f"--video: re-attention inserts images only; expected --reattention=none, got {args.reattention}")
    skip_without_tpu()
    keep_compiled_programs()
    from qwenla_jax.weights.hub import local_folder

    try:
        folder = local_folder(args.model)
    except (ValueError, OSError) as error:
        parser.error(f"--model: {error}")
    import qwenla_jax
    from qwenla_jax.data.images.decode import open_image
    from qwenla_jax.data.images.video_file import read_video
    from qwenla_jax.data.synthetic.scene_questions import caption_of
    from qwenla_jax.inference.ask import Asker
    from qwenla_jax.inference.show import show, show_notes, show_part

    try:
        scenes = {name: _scene(name) for name in args.image if name.startswith(_SCENE)}
        for name in args.image:
            if name not in scenes:
                open_image(name)  # a wrong file is refused before the checkpoint is read
    except (ValueError, OSError) as error:
        parser.error(f"--image: {error}")
    try:
        videos = [read_video(name, args.fps) for name in args.video]
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(f"--video: {error}")
    options = ("reattention", "keep_ratio", "max_insertions", "temperature", "top_p", "seed", "max_new_tokens")
    options += ("max_pixels", "system", "presence_penalty", "frequency_penalty", "repetition_penalty")
    try:
        asker = Asker(qwenla_jax.load(folder), **{name: getattr(args, name) for name in options})
    except (ValueError, OSError) as error:
        text = str(error)
        parser.error(f"--model: {text if text.startswith(str(folder)) else f'{folder}: {text}'}")
    images = [scenes[name].image if name in scenes else name for name in args.image]
    streams = not args.json and (args.stream or args.interactive)
    try:
        if not args.json:
            for name, scene in scenes.items():
                print(f"({name} shows: {caption_of(scene)})")
        for question in _questions(args.question, args.interactive):
            answer = asker.ask(
                images, question, videos=videos, on_text=(lambda part: show_part(part, sys.stdout)) if streams else None
            )
            if args.json:
                print(json.dumps(answer.to_dict()), flush=True)
            elif streams:
                show_notes(answer, sys.stdout)
            else:
                show(answer, sys.stdout)
    except ValueError as error:
        parser.error(f"--image: {error}" if str(error).startswith(tuple(args.image)) else str(error))


def _questions(first: str | None, interactive: bool) -> Iterator[str]:
    """The question of the command line, and those of the input."""
    if first:
        yield first
    if not interactive:
        return
    prompt = "question (an empty line ends): " if sys.stdin.isatty() else ""
    print(prompt, end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.strip()
        print(prompt, end="", file=sys.stderr, flush=True)


def _scene(name: str) -> Scene:
    """The rendered scene of a name such as scene:7, one that the embedded checkpoint was not trained on.

    Raises:
      ValueError: no number from 0 to SCENES - 1 follows.
    """
    from qwenla_jax.data.synthetic.scenes import make_scene
    from qwenla_jax.data.synthetic.source import SCENES

    number = name.removeprefix(_SCENE)
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) < SCENES):
        raise ValueError(f"{name}: expected {_SCENE}N with a whole number N of at least 0 and at most {SCENES - 1}")
    return make_scene(seed=0, split=1, index=int(number))


def _one_line(message: str) -> str:
    """A message without line breaks, for lists of problems have them; a long list is cut."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    more = f" ... and {len(lines) - 6} more lines" if len(lines) > 6 else ""
    return _brief(" ".join(lines[:6]), 1000) + more


def _brief(text: str, most: int = 80) -> str:
    """A text without control characters, cut."""
    from qwenla_jax.utils.visible import in_brief

    return in_brief(text, most)
