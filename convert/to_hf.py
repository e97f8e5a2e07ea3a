"""Back to Hugging Face: python convert/to_hf.py --src DIR --dst DIR

DIR is what convert/from_hf.py made, of which the very files come back, byte for byte; or the work folder of a training
run, whose newest checkpoint (or --step) is written as a folder that transformers loads unmodified. Adapters of a run
are merged into the weights; --adapter writes them alone, as a folder that PEFT loads.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

from qwenla_jax.utils.libtpu import skip_without_tpu

_SRC = flags.DEFINE_string("src", None, "folder of convert/from_hf.py, or of a training run", required=True)
_DST = flags.DEFINE_string("dst", None, "folder to make", required=True)
_STEP = flags.DEFINE_integer("step", None, "of a training run: the checkpoint; default: the newest", lower_bound=0)
_DTYPE = flags.DEFINE_enum("dtype", None, ("float32", "bfloat16", "float16"), "of a training run: type to store")
_ADAPTER = flags.DEFINE_bool("adapter", False, "of a training run with config.lora: its adapters alone, for PEFT")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what stands at dst")


def main(argv: list[str]) -> None:
    """Looks what the source is, and writes it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    skip_without_tpu()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from tqdm import tqdm

    from qwenla_jax.model.convert import to_hf
    from qwenla_jax.model.orbax_io import is_orbax
    from qwenla_jax.train.export import export_run

    source, target = Path(_SRC.value), Path(_DST.value)
    try:
        if is_orbax(source):
            for name, value in (("step", _STEP.value), ("dtype", _DTYPE.value)):
                if value is not None:
                    raise ValueError(f"--{name} is for training runs; {source} is a converted checkpoint")
            if _ADAPTER.value:
                raise ValueError(f"--adapter is for training runs; {source} is a converted checkpoint")
            with tqdm(unit="B", unit_scale=True) as bar:
                print(to_hf(source, target, bar.update, _OVERWRITE.value))
        else:
            print(export_run(source, target, _STEP.value, _DTYPE.value, _OVERWRITE.value, _ADAPTER.value))
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
