"""The engine on meshes and on one device: engine.py MESH..; prints "equal" or fails.

Batches of questions in every mode, greedy and drawn, through fewer slots than questions, so that slots are used again.
On a mesh the rows' pages are read together, as on accelerators; on one device each row's by themselves.
"""

import os
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses  # noqa: E402
from pathlib import Path  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "sampling"), str(HERE.parent), str(HERE.parents[1])]

import engine_test as one_device  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from qwenla_jax.config.shared_options import MeshOptions  # noqa: E402
from qwenla_jax.parallel.mesh import make_mesh  # noqa: E402
from qwenla_jax.parallel.sharding import param_shardings  # noqa: E402
from qwenla_jax.sampling import engine  # noqa: E402
from qwenla_jax.sampling.engine import Engine  # noqa: E402
from qwenla_jax.sampling.request import Request  # noqa: E402

G, QUESTIONS = one_device.G, one_device.QUESTIONS
SETTINGS = [(mode, *drawn) for mode in one_device.MODES for drawn in one_device.DRAWS]


def rollouts(sizes):
    """What every question of every batch comes to, on a mesh of these sizes."""
    (model, params), (vision, prompts) = one_device.model(), one_device.asked()
    mesh = make_mesh(MeshOptions(*sizes), int(np.prod(sizes)))
    if mesh.size > 1:
        engine.paged = lambda options, sizes, on_one_cpu: dataclasses.replace(options, page=8, together=True)
    shardings, shards = param_shardings(model.config, mesh), sizes[0] * sizes[1]
    one = Engine(
        model,
        jax.device_put(params, shardings),
        dataclasses.replace(one_device.OPTIONS, shards=shards),
        dataclasses.replace(one_device.BUCKETS, frames=(QUESTIONS * one_device.IMAGES,)),
        max(shards, one_device.SLOTS),
        one_device.BIAS,
        one_device.STEPS,
        questions=QUESTIONS,
        token_bytes=one_device.in_text,
        mesh=mesh,
        shardings=shardings,
    )
    batches = [
        Request(
            vision.replace(shards=shards),
            prompts,
            np.arange(QUESTIONS * G) + 100 * number,
            QUESTIONS - number % 3,
            5 + number,
            temperature=temperature,
            top_p=top_p,
            reattention=mode,
        )
        for number, (mode, temperature, top_p) in enumerate(SETTINGS)
    ]
    return {(batch, question): rollout for batch, question, rollout in one.run(batches)}


if __name__ == "__main__":
    reference = rollouts((1, 1, 1))
    assert sum(rollout.inserted_B.sum() for rollout in reference.values()) > QUESTIONS * len(SETTINGS)
    for argument in sys.argv[1:]:
        got = rollouts(tuple(int(size) for size in argument.split(",")))
        assert got.keys() == reference.keys()
        differing = [key for key, want in reference.items() if not one_device.agrees(got[key], want)]
        assert not differing, (argument, differing)
        largest = max(np.abs(got[key].logp_BxR - want.logp_BxR).max() for key, want in reference.items())
        tokens = sum(int(want.length_B.sum()) for want in reference.values())
        print(f"{argument}: {tokens} tokens, log-probabilities within {largest:.1e}")
    print("equal")
