"""A Hugging Face checkpoint to Orbax: python convert/from_hf.py --src DIR --dst DIR

Streams: bytes are copied from the safetensors files to the checkpoint's chunks, so that memory does not grow with the
model. All that is missing, unexpected or misshapen is told before anything is written. Interrupted, the same command
goes on; DST appears when it is whole. Training and sampling take DST wherever they take a Hugging Face folder
(--config.init_from=DST), sharded onto their mesh as they read it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from qwenla_jax.utils.libtpu import skip_without_tpu

_SRC = flags.DEFINE_string("src", None, "Hugging Face folder of a Qwen2.5-VL", required=True)
_DST = flags.DEFINE_string("dst", None, "folder to make", required=True)
_DTYPE = flags.DEFINE_enum("dtype", None, ("float32", "bfloat16", "float16"), "type to store; default: its own")
_TAGS = flags.DEFINE_enum(
    "tags",
    "none",
    ("none", "mean", "pieces"),
    "rows of the ten tags: left as they are, the mean of all tokens' rows, or of the rows of their words' pieces",
)
_FSDP = flags.DEFINE_integer("fsdp", 1, "cut the arrays for a mesh with so many devices along fsdp", lower_bound=1)
_TENSOR = flags.DEFINE_integer("tensor", 1, "and so many along tensor; each machine then reads its part", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check, print the plan, and leave")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what stands at dst")


def main(argv: list[str]) -> None:
    """Plans, then converts."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    skip_without_tpu()
    from tqdm import tqdm

    from qwenla_jax.config import ModelConfig
    from qwenla_jax.model.convert import from_hf, plan_from_hf
    from qwenla_jax.train.sharding import mesh_chunks

    try:
        source = Path(_SRC.value)
        if not source.is_dir():
            raise FileNotFoundError(f"--src: there is no folder {source}")
        chunks = None
        if (_FSDP.value, _TENSOR.value) != (1, 1):
            chunks = mesh_chunks(ModelConfig.from_hf(source), _FSDP.value, _TENSOR.value)
        plan = plan_from_hf(source, _DTYPE.value, _TAGS.value, chunks)
        print(plan)
        if _DRY_RUN.value:
            return
        with tqdm(total=plan.size, unit="B", unit_scale=True) as bar:
            print(from_hf(plan, Path(_DST.value), bar.update, _OVERWRITE.value))
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
