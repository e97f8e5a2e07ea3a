"""Sampling and one update on meshes and on one device: compare.py WAY_TO_LOOK MESH..; prints "equal" or fails.

WAY_TO_LOOK "lora" is "none" with low-rank adapters on all kernels that can have them.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from models import (  # noqa: E402
    CLOSE,
    END,
    IMAGE,
    OPEN,
    START,
    STOP,
    VIDEO,
    VOCAB,
    looking_questions,
    questions,
    small_model,
)

from qwenla_jax.model import lora  # noqa: E402
from qwenla_jax.reattention.trigger import TEXT_ONLY, LookOptions  # noqa: E402
from qwenla_jax.sampling.logits import forbidden_bias  # noqa: E402
from qwenla_jax.sampling.loop import SampleOptions, sample  # noqa: E402
from qwenla_jax.train.brpo_step import Judged, make_brpo_gradient  # noqa: E402
from qwenla_jax.train.mesh import make_mesh  # noqa: E402
from qwenla_jax.train.optimizer import make_optimizer  # noqa: E402
from qwenla_jax.train.options import BrpoOptions, MeshOptions, OptimOptions  # noqa: E402
from qwenla_jax.train.sharding import (  # noqa: E402
    activation_rules,
    batch_sharding,
    param_shardings,
    replicated,
)
from qwenla_jax.train.state import create, make_update, state_shardings  # noqa: E402

BIAS = forbidden_bias(VOCAB, VOCAB, [IMAGE, VIDEO, START, END])
BIAS[OPEN] += 2.0
G, R = 2, 8
TAG = {"max_insertions": 2, "rows_at_once": 4, "open_id": OPEN, "close_id": CLOSE}
LOOKS = {
    "none": TEXT_ONLY,
    "copy": LookOptions("copy", **TAG),
    "route": LookOptions("route", form="bias", **TAG),
}
ALL_LINEAR = ("(decoder/layers|visual/(blocks|merger))/.*/kernel",)
RANK = 4
QUICK = {"xla_backend_optimization_level": 0}


def with_adapters(config, params):
    """The parameters with random adapters, B too: at its first zeros no gradient reaches A."""
    kernels = lora.kernels_for(config, ALL_LINEAR)
    own = lora.adapters(params, kernels, RANK, 8.0, jax.random.key(3), "float32")
    rng = np.random.default_rng(5)
    noise = lambda path, x: x + 0.1 * rng.normal(size=x.shape).astype("f4") * (path[-1].key == "lora_b")  # noqa: E731
    return kernels, lora.joined(params, jax.tree_util.tree_map_with_path(noise, own))


def compute(sizes, devices, look, adapted):
    """Token ids, log-probabilities, and an update's metrics and gradient."""
    mesh = make_mesh(MeshOptions(*sizes), devices)
    model, params = small_model(initializer_range=0.2)
    kernels, params = with_adapters(model.config, params) if adapted else ((), params)
    layouts = param_shardings(model.config, mesh, kernels, RANK)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    params = jax.device_put(params, layouts)
    vision, prompts = looking_questions(8)[:2] if look.inserts else questions(8)
    options = SampleOptions(G, R, 1.0, 1.0, (STOP,), look, mesh.shape["data"] * mesh.shape["fsdp"])
    with jax.set_mesh(mesh), activation_rules():
        sampler = jax.jit(
            functools.partial(sample, model, options),
            in_shardings=(layouts, rows, rows, whole, whole, whole, rows),
            out_shardings=rows,
            compiler_options=QUICK,
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
            np.ones(8 * G, np.float32),
            np.asarray(rollout.kept_BxExX) if look.inserts else None,
        )
        parts = batch_sharding(mesh, leading=1)
        step = jax.jit(
            make_update(make_brpo_gradient(model, BrpoOptions(group_size=G), 8, look=look), optimizer),
            in_shardings=(states, {} if adapted else layouts, parts, parts, parts, whole),
            out_shardings=(states, whole),
            compiler_options=QUICK,
        )
        batch = jax.tree.map(lambda x: np.asarray(x)[None], (vision, prompts, judged))
        reference = {} if adapted else params  # with adapters it is their base
        compiled = step.lower(state, reference, *batch, BIAS).compile()
        new, metrics = compiled(state, reference, *batch, BIAS)
    for leaf, layout in zip(jax.tree.leaves(new), jax.tree.leaves(states), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim), (leaf.sharding, layout)
    kernel = new.params["decoder"]["layers"]["mlp"]["gate"]["kernel"]
    share = kernel.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert share == kernel.size, "the parameters are not split"
    if adapted:
        gate = new.params["decoder"]["layers"]["mlp"]["gate"]
        for name, axis in (("lora_a", "fsdp"), ("lora_b", "tensor")):
            share = gate[name].addressable_shards[0].data.size * mesh.shape[axis]
            assert share == gate[name].size, f"{name} is not split"
    # The gradient and not the parameters: AdamW's first update is its sign, which rounding decides where it is near 0.
    first_moment = new.opt_state.inner_states["train"].inner_state[1][0].mu
    gradient = jax.tree.map(lambda m: m / (1 - OptimOptions().b1), first_moment)
    return jax.device_get((judged, metrics, gradient, rollout.inserted_B)), compiled.as_text()


def compare(sizes, look, adapted, reference):
    """Fails where a mesh of these sizes gives something else than one device."""
    (judged, metrics, gradient, inserted_B), text = compute(sizes, 8, look, adapted)
    (judged1, metrics1, gradient1, inserted1_B), text1 = reference
    assert np.array_equal(judged.ids_BxR, judged1.ids_BxR)
    assert np.array_equal(inserted_B, inserted1_B) and (set(inserted_B.tolist()) == {0, 1, 2}) == look.inserts
    assert not look.inserts or np.array_equal(judged.kept_BxExX, judged1.kept_BxExX)
    np.testing.assert_allclose(judged.logp_BxR, judged1.logp_BxR, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics1[name], atol=1e-4, rtol=1e-4, err_msg=name)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient1), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert "all-reduce" in text and "all-reduce" not in text1


if __name__ == "__main__":
    lora_too = sys.argv[1] == "lora"
    way = LOOKS["none" if lora_too else sys.argv[1]]
    alone = compute((1, 1, 1), 1, way, lora_too)
    for mesh in sys.argv[2:]:
        compare([int(n) for n in mesh.split(",")], way, lora_too, alone)
    print("equal")
