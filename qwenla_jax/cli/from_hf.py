"""A Hugging Face checkpoint to Orbax: qwenla convert from_hf --src=DIR --dst=DIR

Streams: bytes are copied from the safetensors files to the checkpoint's chunks, so that memory does not grow with the
model. All that is missing, unexpected or misshapen is told before anything is written. Interrupted, the same command
continues; DST appears when it is whole. Training and sampling take DST wherever they take a Hugging Face folder
(--config.init_from=DST), sharded onto their mesh as they read it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.utils.libtpu import skip_without_tpu


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("src", None, "Hugging Face folder, or a model of the Hub", required=True, flag_values=values)
    flags.DEFINE_string("dst", None, "folder to make", required=True, flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, ("float32", "bfloat16", "float16"), "type to store; default: its own", flag_values=values
    )
    flags.DEFINE_enum(
        "tags",
        "none",
        ("none", "mean", "pieces"),
        "rows of the ten tags: left as they are, the mean of all tokens' rows, or of the rows of their words' pieces",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "fsdp", 1, "cut the arrays for a mesh with so many devices along fsdp", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "tensor", 1, "and so many along tensor; each machine then reads its part", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("dry_run", False, "check, print the plan, and leave", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace what stands at dst", flag_values=values)


def main(argv: Sequence[str] | None = None) -> None:
    """Plans, then converts."""
    args = read_flags(argv, __doc__, define_flags)
    skip_without_tpu()
    from tqdm import tqdm

    from qwenla_jax.model.config import ModelConfig
    from qwenla_jax.parallel.sharding import mesh_chunks
    from qwenla_jax.weights.convert import from_hf, plan_from_hf
    from qwenla_jax.weights.hub import local_folder

    try:
        source = local_folder(args.src)
        chunks = None
        if (args.fsdp, args.tensor) != (1, 1):
            chunks = mesh_chunks(ModelConfig.from_hf(source), args.fsdp, args.tensor)
        plan = plan_from_hf(source, args.dtype, args.tags, chunks)
        print(plan)
        if args.dry_run:
            return
        with tqdm(total=plan.size, unit="B", unit_scale=True) as bar:
            print(from_hf(plan, Path(args.dst), bar.update, args.overwrite))
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
