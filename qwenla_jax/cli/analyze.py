"""How much attention a checkpoint gives to visual tokens: qwenla analyze --model=DIR --reattention=copy

Greedy answers to held-out questions are run once more and their attention on visual tokens is collected: by position in
the response and before, in and after reflections, for the prompt's own images and the inserted ones, beside what
evenly spread attention would pay them (a mass may move only because the visual tokens become a smaller or larger share
of all tokens, so the ratio of the two is shown too). Then every question gets the image of another: how far do
log-probability and accuracy fall? And the numbers that the paper's theorems 3.1 and 3.2 are about. --json prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from qwenla_jax.cli.generate import number
from qwenla_jax.config.shared_options import MODES, MOST_INSERTIONS, MOST_PIXELS, MOST_ROWS, MOST_TOKENS
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line (`None`: that of the process). Bad values end the process with a message."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("qwenla analyze", description=__doc__, formatter_class=raw)
    add, pixels, insertions = parser.add_argument, number(int, 1, MOST_PIXELS), number(int, 0, MOST_INSERTIONS)
    add("--model", default="tiny", help="Hugging Face checkpoint folder, model of the Hub, or tiny (default)")
    add("--source", default="scenes", help="as train.py's config.data.source (default: scenes)")
    add("--max_pixels", type=pixels, help="shrink images with more (default: as the checkpoint says)")
    add("--size", type=number(int, 1), default=256, help="held-out questions (default: 256)")
    add("--reattention", default="none", choices=MODES)
    add("--keep_ratio", type=number(float, 0, 1), default=0.5, help="route: share of the visual tokens (default: 0.5)")
    add("--max_insertions", type=insertions, default=2, help="most insertions of a response (default: 2)")
    add("--max_response_tokens", type=number(int, 1, MOST_TOKENS), default=64, help="longest response (default: 64)")
    add("--max_prompt_tokens", type=number(int, 1, MOST_TOKENS), default=128, help="longest prompt (default: 128)")
    add("--batch_size", type=number(int, 1, MOST_ROWS), default=64, help="questions at once (default: 64)")
    add("--swaps", type=number(int, 1), default=4, help="images that theorem 3.1 averages over (default: 4)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of drawn questions (default: 0)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    args = parse_arguments(argv)
    skip_without_tpu()
    keep_compiled_programs()
    from qwenla_jax.config.checks import inference_relations, init_problems, source_problems
    from qwenla_jax.config.inference_config import InferenceConfig
    from qwenla_jax.config.shared_options import ReattentionOptions

    config = InferenceConfig(
        init_from=args.model,
        seed=args.seed,
        batch_size=args.batch_size,
        max_prompt_tokens=args.max_prompt_tokens,
        max_response_tokens=args.max_response_tokens,
        max_pixels=args.max_pixels,
        reattention=ReattentionOptions(args.reattention, args.keep_ratio, max_insertions=args.max_insertions),
    )
    problems = [*inference_relations(config), *init_problems(config, "tiny")]
    if problems := [*problems, *source_problems({"source": args.source}, "tiny")]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    from qwenla_jax.data.sources.factory import make_source
    from qwenla_jax.inference.runtime import build
    from qwenla_jax.study.attention_profile import attention_profile, image_swap_probe, theorem_numbers

    try:
        source = make_source(args.source, "held_out", seed=args.seed)
        runtime, params = build(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if not 1 <= args.swaps < args.batch_size or args.size <= args.swaps:
        print("--swaps: expected at least 1, and less than --batch_size and --size", file=sys.stderr)
        return 2
    result = {
        "profile": attention_profile(runtime, params, source, args.size),
        "image_swap": image_swap_probe(runtime, params, source, args.size),
        "theorems": theorem_numbers(runtime, params, source, args.size, args.swaps),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    keys = ("original", "inserted", "visual", "even", "ratio")
    print("attention on visual tokens, mean over layers and heads")
    print(f"{'tokens of a response':<24}{'tokens':>8}" + "".join(f"{key:>10}" for key in keys))
    rows = list(result["profile"]["parts"].items())
    rows += [(f"position {row['first']} to {row['last']}", row) for row in result["profile"]["positions"]]
    for name, row in rows:
        print(f"{name:<24}{row['tokens']:>8.0f}" + "".join(f"{row[key]:>10.3f}" for key in keys))
    blind = result["image_swap"]
    print(
        f"\nwith another question's image: log-probability -{blind['logp_drop']:.3f} nats a token, accuracy "
        f"{blind['accuracy']:.1%} -> {blind['accuracy_swapped']:.1%}"
    )
    print("\ntheorem 3.1 asks for information <= r x entropy (nats a token); r is the share of visual tokens")
    print(f"{'positions':<24}{'tokens':>8}{'r':>10}{'info':>10}{'entropy':>10}{'r x H':>10}")
    for row in result["theorems"]["positions"]:
        numbers = "".join(f"{row[key]:>10.4f}" for key in ("r", "information", "entropy", "bound"))
        print(f"{row['first']:>3} to {row['last']:<17}{row['tokens']:>8.0f}{numbers}")
    if jump := result["theorems"]["insertions"]:
        print(
            f"theorem 3.2: over {jump['count']:.0f} insertions r goes from {jump['r_before']:.3f} to "
            f"{jump['r_after']:.3f}; it rose in {jump['rose']:.0f} of them"
        )
    return 0
