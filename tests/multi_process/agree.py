"""One of two processes that agree on things: agree.py PORT NUMBER; prints "agreed" or fails."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"

from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from qwenla_jax.config.shared_options import MeshOptions  # noqa: E402
from qwenla_jax.parallel import distributed  # noqa: E402
from qwenla_jax.parallel.mesh import make_mesh  # noqa: E402
from qwenla_jax.parallel.sharding import batch_sharding  # noqa: E402
from qwenla_jax.run.workdir import Hold, WorkdirError  # noqa: E402

port, me = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", 2, me)
assert distributed.is_multiprocess() and distributed.is_primary() == (me == 0)

message = distributed.gather({"from": me, "text": "é" * (1000 * me)})
assert message == [{"from": 0, "text": ""}, {"from": 1, "text": "é" * 1000}]
assert distributed.broadcast(lambda: f"by {me}") == "by 0"
for text in ("all of them", "again"):
    try:
        distributed.broadcast(lambda text=text: (_ for _ in ()).throw(WorkdirError(text)))
        raise SystemExit("nothing was raised")
    except WorkdirError as error:
        assert str(error) == text
parts = distributed.gather(list(range(7))[distributed.share(7)])
assert parts == [[0, 1, 2], [3, 4, 5, 6]]

message = ""
try:
    with distributed.together(ValueError):
        if me == 1:
            raise ValueError("only here")
except ValueError as error:
    message = str(error)
assert distributed.gather(message) == ["process 1: ValueError: only here", "only here"]
with distributed.together(ValueError):
    pass

mesh = make_mesh(MeshOptions(2, 2, 1))
whole_BxD = np.arange(24, dtype=np.float32).reshape(8, 3)
placed = distributed.place({"x": whole_BxD}, batch_sharding(mesh))["x"]
assert placed.shape == (8, 3) and len(placed.addressable_shards) == 2
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole_BxD[shard.index])
assert {shard.index[0].start for shard in placed.addressable_shards} == ({0, 2} if me == 0 else {4, 6})
np.testing.assert_array_equal(jax.jit(lambda x: x.sum(0))(placed), whole_BxD.sum(0))

try:
    Hold(Path("/nowhere"))
except WorkdirError as error:
    assert "process 0" in str(error)
print("agreed", flush=True)
