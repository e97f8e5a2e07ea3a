"""Sampling with weights gathered once and with weights gathered in every layer; prints "equal" or fails."""

import dataclasses
import os
import sys
from pathlib import Path

os.environ.pop("XLA_FLAGS", None)  # compiled as by itself
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from qwenla_jax.config.run_options import DataOptions, EvalOptions, RunOptions  # noqa: E402
from qwenla_jax.config.shared_options import MeshOptions  # noqa: E402
from qwenla_jax.planner.hlo import collectives  # noqa: E402
from qwenla_jax.train.train_runtime import build, make_run_source  # noqa: E402
from qwenla_jax.utils.compiler_options import accepted  # noqa: E402

options = RunOptions(
    data=DataOptions(batch_size=4, max_response_tokens=8),
    eval=EvalOptions(batch_size=4),
    mesh=MeshOptions(data=1, fsdp=2, tensor=2),
)
runtime, params = build(options)
source = make_run_source(options, "train")
batch = runtime.stack([source[i] for i in range(4)], runtime.collate_prompts, False)
vision, prompts = jax.tree.map(lambda x: x[0], batch)
sampling = runtime.sample_options(2, 1.0)
inputs = (params, vision, prompts, runtime.logit_bias_V, np.uint32(0), np.uint32(0), np.arange(8, dtype=np.uint32))
ids, sent = [], []
for once in (False, True):
    mesh = dataclasses.replace(options.mesh, gather_to_sample=once)
    own = dataclasses.replace(runtime, config=dataclasses.replace(runtime.config, mesh=mesh))
    with own.context():
        compiled = (
            own.sampling_program(sampling, prompts)
            .lower(*inputs)
            .compile(compiler_options=accepted({"xla_backend_optimization_level": 0}))
        )
        ids.append(np.asarray(compiled(*inputs).ids_BxR))
    result = collectives(compiled.as_text(), 4, [8])
    # What moves while tokens are sampled, of arrays as large as a layer's matrix.
    sent.append(sum(one.sent for one in result if one.kind == "all-gather" and one.payload >= 128 * 64 * 4))
assert np.array_equal(*ids), ids
assert sent[1] < sent[0] / 2, sent
print("equal")
