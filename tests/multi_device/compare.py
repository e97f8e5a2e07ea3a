"""Sampling and one update on meshes and on one device: compare.py WAY MESH..; prints "equal" or fails.

The programs are the run's own. What they send between devices is checked too, see `traffic.py`.
"""

import os
import sys

os.environ.pop("XLA_FLAGS", None)  # compiled as by itself
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses  # noqa: E402
import functools  # noqa: E402
import types  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import traffic  # noqa: E402
from models import (  # noqa: E402
    CLOSE,
    END,
    FAMILY,
    IMAGE,
    OPEN,
    START,
    STOP,
    VIDEO,
    looking_questions,
    questions,
    small_config,
)

from qwenla_jax.config.run_options import BrpoOptions, DataOptions, LoraOptions, OptimOptions, RunOptions  # noqa: E402
from qwenla_jax.config.shared_options import MeshOptions, ReattentionOptions  # noqa: E402
from qwenla_jax.model import lora  # noqa: E402
from qwenla_jax.model.qwen_vl import QwenVL, init_params  # noqa: E402
from qwenla_jax.parallel.mesh import make_mesh  # noqa: E402
from qwenla_jax.parallel.sharding import param_shardings  # noqa: E402
from qwenla_jax.sampling.token import suppression_bias  # noqa: E402
from qwenla_jax.train.adapters import kernels_to_adapt  # noqa: E402
from qwenla_jax.train.brpo.reference import make_reference  # noqa: E402
from qwenla_jax.train.brpo.update import RolloutBatch  # noqa: E402
from qwenla_jax.train.optimizer import make_optimizer  # noqa: E402
from qwenla_jax.train.programs import update_program  # noqa: E402
from qwenla_jax.train.train_runtime import TrainRuntime  # noqa: E402
from qwenla_jax.train.train_state import create, state_shardings  # noqa: E402
from qwenla_jax.utils.compiler_options import accepted  # noqa: E402

Q, G, R, E, RATE = 8, 2, 8, 2, 1e-3


@dataclasses.dataclass(frozen=True)
class Way:
    """What is compared.

    Attributes:
      reattention: how reflections look again.
      vocab, text_ff, vision_ff: sizes that may or may not divide over 8 devices; as in the released models the 2 key
        heads never do.
      beta: weight of the KL term.
      rank: of adapters on every kernel that can have one; None: the model itself is trained.
      family: of the model.
      int8: sampled with int8 kernels, and corrected.
      group_parts: parts of a group in the update on eight devices; on one device it is whole.
      together: whether eight devices read keys and values in pages, those of all rows together; one reads rows whole.
    """

    reattention: ReattentionOptions
    vocab: int
    text_ff: int
    vision_ff: int
    beta: float = 0.0
    rank: int | None = None
    family: str = FAMILY
    int8: bool = False
    group_parts: int = 1
    together: bool = False


LOOK = {"max_insertions": E, "rows_at_once": 4}
WAYS = {
    "copy": Way(ReattentionOptions(mode="copy", **LOOK), 104, 80, 24, beta=0.1, group_parts=G),
    "route": Way(ReattentionOptions(mode="route", form="bias", **LOOK), 97, 44, 20, together=True),
    "qwen3_vl": Way(ReattentionOptions(mode="route", **LOOK), 104, 80, 24, beta=0.1, family="qwen3_vl"),
    "lora": Way(ReattentionOptions(), 104, 80, 24, beta=0.1, rank=6, int8=True),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_config(way):
    """Three layers, 8 query heads over 2 key heads; few sizes are the same, so that arrays are told apart."""
    config = small_config(way.family, initializer_range=0.2)
    text = dataclasses.replace(
        config.text, vocab_size=way.vocab, hidden_size=64, intermediate_size=way.text_ff, num_layers=3, num_heads=8
    )
    vision = dataclasses.replace(config.vision, intermediate_size=way.vision_ff, out_hidden_size=64)
    return dataclasses.replace(config, text=text, vision=vision)


def make_options(way, sizes, devices=1):
    """A run's settings. AdamW's first update is the gradient's sign, which rounding decides where that is near 0: with
    so large an eps it is no steeper in the gradient than 1."""
    sampled = {"rollout_weights": "int8", "importance_sampling": "sequence_truncate"} if way.int8 else {}
    return RunOptions(
        data=DataOptions(batch_size=Q, max_response_tokens=R),
        optim=OptimOptions(learning_rate=RATE, warmup_ratio=0.0, eps=RATE),
        brpo=BrpoOptions(group_size=G, group_parts=way.group_parts if devices > 1 else 1, beta=way.beta, **sampled),
        lora=LoraOptions(rank=way.rank, modules=("(decoder/layers|visual/(blocks|merger))/.*/kernel",)),
        mesh=MeshOptions(*sizes),
        reattention=way.reattention,
    )


@functools.cache
def start(way):
    """Parameters on the host. Adapters are random, B too: at its first zeros no gradient reaches A."""
    config = make_config(way)
    kernels = kernels_to_adapt(make_options(way, (1, 1, 1)), config)

    @jax.jit
    def make():
        params = init_params(config, jax.random.key(7))
        own = lora.adapters(params, kernels, way.rank or 1, 8.0, jax.random.key(3), "float32")
        return lora.joined(params, own)

    rng = np.random.default_rng(5)
    noise = lambda path, x: x + 0.1 * rng.normal(size=x.shape).astype("f4") * (path[-1].key == "lora_b")  # noqa: E731
    return jax.tree_util.tree_map_with_path(noise, jax.device_get(make()))


def make_runtime(way, sizes, devices):
    """A run's fixed parts around a small model; of the tokenizer there are ids, and the trigger's tokens."""
    options, config = make_options(way, sizes, devices), make_config(way)
    mesh = make_mesh(options.mesh, devices)
    shardings = param_shardings(config, mesh, kernels_to_adapt(options, config), way.rank or 1)
    bias = suppression_bias(way.vocab, way.vocab, [IMAGE, VIDEO, START, END])
    bias[OPEN] += 4.0
    never = lambda: (IMAGE, VIDEO, START, END)  # noqa: E731
    ids = types.SimpleNamespace(reflection_open=OPEN, reflection_close=CLOSE, stop=lambda: (STOP,), suppressed=never)
    tokenizer = types.SimpleNamespace(ids=ids, encode={"<REFLECTION>": [OPEN]}.get)
    return TrainRuntime(options.inference, mesh, QwenVL(config), shardings, tokenizer, None, None, bias, options)


def compute(way, sizes, devices):
    """Responses, and an update's metrics, gradient and parameters."""
    runtime = make_runtime(way, sizes, devices)
    options, insertions = runtime.options, runtime.reattention().inserts
    params, old = (jax.device_put(start(way), runtime.shardings) for _ in range(2))
    vision, prompts = looking_questions(Q)[:2] if insertions else questions(Q)
    vision = vision.replace(shards=runtime.row_shards)
    numbers = np.arange(Q * G, dtype=np.uint32)
    inputs = (params, vision, prompts, runtime.logit_bias_V, np.uint32(0), np.uint32(0), numbers)
    sampling = runtime.rollout_options()
    if devices > 1 and way.together:
        sampling = dataclasses.replace(sampling, page=4, together=True)
    with runtime.context():
        sampler = runtime.sampling_program(sampling, prompts).lower(*inputs).compile(accepted(QUICK))
        rollout = sampler(*inputs)
        optimizer = make_optimizer(options.optim, 10, params)
        states = state_shardings(params, runtime.shardings, optimizer, runtime.mesh)
        state = jax.jit(lambda p: create(p, optimizer), out_shardings=states)(old)
        rollout_batch = RolloutBatch(
            ids_BxR=np.asarray(rollout.ids_BxR),
            logp_BxR=np.asarray(rollout.logp_BxR),
            length_B=np.asarray(rollout.length_B),
            advantage_B=np.random.default_rng(0).normal(size=Q * G).astype(np.float32),
            counted_B=np.ones(Q * G, np.float32),
            trained_B=np.ones(Q * G, np.float32),
            selected_BxExX=np.asarray(rollout.selected_BxExX) if insertions else None,
        )
        batch = jax.tree.map(lambda x: np.asarray(x)[None], (vision, prompts, rollout_batch))
        arguments = (state, make_reference(runtime, params), *batch, runtime.logit_bias_V)
        update = update_program(runtime, optimizer, states).lower(*arguments).compile(accepted(QUICK))
        new, metrics = update(*arguments)
    first = new.opt_state.inner_states["train"].inner_state[1][0].mu
    traffic.check_layouts(new, states, first, runtime)
    traffic.check_memory(update, state, new, first)
    if devices > 1:
        traffic.check_sampler(sampler.as_text(), runtime, params)
        traffic.check_update(update.as_text(), runtime, params)
    rollout, metrics, first, params = jax.device_get((rollout, metrics, first, new.params))
    return rollout, metrics, jax.tree.map(lambda m: m / (1 - options.optim.b1), first), params


def compare(way, sizes, reference):
    """Fails where a mesh of these sizes gives something else than one device."""
    rollout, *results = compute(way, sizes, 8)
    rollout1, *results1 = reference
    for name in ("ids_BxR", "length_B", "inserted_B", "selected_BxExX"):
        assert np.array_equal(getattr(rollout, name), getattr(rollout1, name)), (name, sizes)
    results, results1 = ([other, rollout.logp_BxR] for other, rollout in ((results, rollout), (results1, rollout1)))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(results1), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=f"{sizes} {jax.tree_util.keystr(path)}")


def check_reference(way, reference):
    """What is compared must say something: all counts of insertions, a gradient and an update well above 1e-5."""
    rollout, metrics, gradient, params = reference
    assert set(rollout.inserted_B.tolist()) == (set(range(E + 1)) if way.reattention.mode != "none" else {0})
    largest = lambda tree: max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))  # noqa: E731
    moved = jax.tree.map(np.subtract, params, start(way))
    assert metrics["num_tokens"] > Q * G and largest(gradient) > 1e-2 and largest(moved) > RATE / 2


if __name__ == "__main__":
    chosen = WAYS[sys.argv[1]]
    alone = compute(chosen, (1, 1, 1), 1)
    check_reference(chosen, alone)
    for mesh in sys.argv[2:]:
        compare(chosen, [int(n) for n in mesh.split(",")], alone)
    print("equal")
