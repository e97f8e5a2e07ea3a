"""Runs sampling and one update of each stage on a mesh and on one of its devices; prints "equal" or fails."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from models import IMAGE, STOP, VOCAB, questions, small_model  # noqa: E402

from qwenla_jax.sampling.logits import forbidden_bias  # noqa: E402
from qwenla_jax.sampling.loop import SampleOptions, sample  # noqa: E402
from qwenla_jax.train.brpo_step import Judged, make_brpo_step  # noqa: E402
from qwenla_jax.train.mesh import make_mesh  # noqa: E402
from qwenla_jax.train.optimizer import make_optimizer  # noqa: E402
from qwenla_jax.train.options import BrpoOptions, MeshOptions, OptimOptions  # noqa: E402
from qwenla_jax.train.sharding import (  # noqa: E402
    activation_rules,
    batch_sharding,
    param_shardings,
    replicated,
)
from qwenla_jax.train.state import create, state_shardings  # noqa: E402

BIAS = forbidden_bias(VOCAB, VOCAB, [IMAGE])
G, R = 2, 8


def compute(sizes, devices):
    """Token ids, log-probabilities, and an update's metrics and gradient."""
    mesh = make_mesh(MeshOptions(*sizes), devices)
    model, params = small_model()
    layouts = param_shardings(model.config, mesh)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    params = jax.device_put(params, layouts)
    vision, prompts = questions(8)
    options = SampleOptions(G, R, 1.0, 1.0, (STOP,))
    with jax.set_mesh(mesh), activation_rules():
        sampler = jax.jit(
            functools.partial(sample, model, options),
            in_shardings=(layouts, rows, rows, whole, whole, whole, rows),
            out_shardings=rows,
        )
        numbers = np.arange(8 * G, dtype=np.uint32)
        rollout = sampler(params, vision, prompts, BIAS, np.uint32(0), np.uint32(0), numbers)
        optimizer = make_optimizer(OptimOptions(learning_rate=1e-3, warmup_ratio=0.0), 10, params)
        states = state_shardings(params, layouts, optimizer, mesh)
        state = jax.jit(lambda p: create(p, optimizer), out_shardings=states)(params)
        rng = np.random.default_rng(0)
        judged = Judged(
            np.asarray(rollout.ids_BxR),
            np.asarray(rollout.logp_BxR),
            np.asarray(rollout.length_B),
            rng.normal(size=8 * G).astype(np.float32),
            np.ones(8 * G, np.float32),
        )
        parts = batch_sharding(mesh, leading=1)
        step = jax.jit(
            make_brpo_step(model, optimizer, BrpoOptions(group_size=G)),
            in_shardings=(states, layouts, parts, parts, parts, whole),
            out_shardings=(states, whole),
        )
        batch = jax.tree.map(lambda x: np.asarray(x)[None], (vision, prompts, judged))
        lowered = step.lower(state, params, *batch, BIAS)
        new, metrics = step(state, params, *batch, BIAS)
    for leaf, layout in zip(jax.tree.leaves(new), jax.tree.leaves(states), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim), (leaf.sharding, layout)
    kernel = new.params["decoder"]["layers"]["mlp"]["gate"]["kernel"]
    share = kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert share == kernel.size, "the parameters are not split"
    # The gradient and not the parameters: AdamW's first update is its sign, which rounding decides where it is near 0.
    first_moment = new.opt_state.inner_states["train"].inner_state[1][0].mu
    gradient = jax.tree.map(lambda m: m / (1 - OptimOptions().b1), first_moment)
    return jax.device_get((judged, metrics, gradient)), lowered.compile().as_text()


if __name__ == "__main__":
    sizes = [int(n) for n in sys.argv[1].split(",")]
    (judged, metrics, gradient), text = compute(sizes, 8)
    (judged1, metrics1, gradient1), text1 = compute((1, 1, 1), 1)
    assert np.array_equal(judged.ids_BxR, judged1.ids_BxR)
    np.testing.assert_allclose(judged.logp_BxR, judged1.logp_BxR, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics1[name], atol=1e-4, rtol=1e-4, err_msg=name)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient1), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert "all-reduce" in text and "all-reduce" not in text1
    print("equal")
