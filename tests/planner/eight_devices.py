"""Traffic of a small program on 8 simulated devices, against what its author knows; prints "as known" or fails."""

import os
import sys
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

from qwenla_jax.planner.hlo import collectives  # noqa: E402


def program(x):
    """In each of 3 rounds a sum of 40 x 6 numbers over `a`; then a gather of 16 rows over `b`."""

    def round_(total, _):
        return total + jax.lax.psum(jnp.sin(total), "a"), None

    total, _ = jax.lax.scan(round_, x, None, length=3)
    return jax.lax.all_gather(total, "b", tiled=True)


mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
spread = jax.shard_map(program, mesh=mesh, in_specs=PartitionSpec("b"), out_specs=PartitionSpec(), check_vma=False)
text = jax.jit(spread).lower(jax.ShapeDtypeStruct((80, 6), jnp.float32)).compile().as_text()
result = sorted((one.kind, one.payload, one.group, one.times) for one in collectives(text, 8))
assert result == [("all-gather", 80 * 6 * 4, 2, 1), ("all-reduce", 40 * 6 * 4, 4, 3)], (result, text)
print("as known")
