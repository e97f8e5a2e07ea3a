"""Back to Hugging Face: qwenla convert to_hf --src=DIR --dst=DIR

DIR is what convert/from_hf.py made, of which the very files come back, byte for byte; or the work folder of a training
run, whose newest checkpoint (or --step) is written as a folder that transformers loads unmodified. Adapters of a run
are merged into the weights; --adapter writes them alone, as a folder that PEFT loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.utils.libtpu import skip_without_tpu


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string(
        "src", None, "folder of convert/from_hf.py, or of a training run", required=True, flag_values=values
    )
    flags.DEFINE_string("dst", None, "folder to make", required=True, flag_values=values)
    flags.DEFINE_integer(
        "step", None, "of a training run: the checkpoint; default: the newest", lower_bound=0, flag_values=values
    )
    flags.DEFINE_enum(
        "dtype", None, ("float32", "bfloat16", "float16"), "of a training run: type to store", flag_values=values
    )
    flags.DEFINE_bool(
        "adapter", False, "of a training run with config.lora: its adapters alone, for PEFT", flag_values=values
    )
    flags.DEFINE_bool("overwrite", False, "replace what stands at dst", flag_values=values)


def main(argv: Sequence[str] | None = None) -> None:
    """Looks what the source is, and writes it."""
    args = read_flags(argv, __doc__, define_flags)
    skip_without_tpu()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from tqdm import tqdm

    from qwenla_jax.tools.export import export_run
    from qwenla_jax.weights.convert import to_hf
    from qwenla_jax.weights.orbax import is_orbax

    source, target = Path(args.src), Path(args.dst)
    try:
        if is_orbax(source):
            for name, value in (("step", args.step), ("dtype", args.dtype)):
                if value is not None:
                    raise ValueError(f"--{name} is for training runs; {source} is a converted checkpoint")
            if args.adapter:
                raise ValueError(f"--adapter is for training runs; {source} is a converted checkpoint")
            with tqdm(unit="B", unit_scale=True) as bar:
                print(to_hf(source, target, bar.update, args.overwrite))
        else:
            print(export_run(source, target, args.step, args.dtype, args.overwrite, args.adapter))
            print(f"with its model card, README.md; to publish it: hf upload ORG/NAME {target}")
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
