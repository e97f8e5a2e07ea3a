"""Oracle: the bytes of the arrays before saving, and checkpoint folders broken by hand."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from qwenla_jax.config.run_options import CheckpointOptions, LogOptions, OptimOptions, RunOptions
from qwenla_jax.config.schema import differences, to_dict
from qwenla_jax.run.checkpoints import FREE_KEYS, CheckpointError, Checkpoints, abstract, versions


@struct.dataclass
class State:
    step: object
    params: object
    opt: object
    key: object
    count: int
    nothing: object = None


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "visual": {"kernel": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)},
        "decoder": {"scale": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16), "odd": jnp.float32(-0.0)},
    }
    # Values that a detour over text or another type would lose.
    params["visual"]["kernel"] = params["visual"]["kernel"].at[0].set(jnp.array([np.nan, -np.inf, 1e-42], jnp.float32))
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    return State(jnp.int32(seed), params, opt, jnp.array([1, 2**32 - 1], jnp.uint32), count=3)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(b, jax.Array):
            assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        else:
            assert (type(a), a) == (type(b), b)


@pytest.fixture
def options():
    return RunOptions(steps=10, checkpoint=CheckpointOptions(every=4, keep=2))


@pytest.fixture
def saved(tmp_path, options):
    with Checkpoints(tmp_path, options) as checkpoints:
        checkpoints.save(4, make_state(), {"seconds": 1.5})
    return tmp_path


def test_restored_bit_for_bit(saved, options):
    with Checkpoints(saved, options) as checkpoints:
        assert checkpoints.latest_step() == 4
        assert_same_bits(checkpoints.restore(make_state(1)), make_state())
        assert_same_bits(checkpoints.restore(abstract(make_state(1)), 4), make_state())


def test_record(saved, options):
    with Checkpoints(saved, options) as checkpoints:
        meta = checkpoints.meta()
    assert meta["step"] == 4 and meta["config"] == to_dict(options) and meta["extra"] == {"seconds": 1.5}
    assert meta["versions"] == versions() and meta["versions"]["jax"] == jax.__version__


def test_sharding_asked_for_is_the_sharding_given(saved, options):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if isinstance(x, jax.Array) else x,
        make_state(),
    )
    with Checkpoints(saved, options) as checkpoints:
        assert all(x.sharding == sharding for x in jax.tree.leaves(checkpoints.restore(like).params))


def test_due_and_kept(tmp_path, options):
    with Checkpoints(tmp_path, options) as checkpoints:
        assert checkpoints.latest_step() is None
        assert [s for s in range(1, 11) if checkpoints.due(s)] == [4, 8, 10]
        for step in (4, 8, 10):
            checkpoints.save(step, make_state(step))
        checkpoints.save(10, make_state(99))  # there already
        checkpoints.wait()
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["10", "8"]
        assert_same_bits(checkpoints.restore(make_state()), make_state(10))
        assert_same_bits(checkpoints.restore(make_state(), 8), make_state(8))
        with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
            checkpoints.restore(make_state(), 4)
    rare = dataclasses.replace(options, checkpoint=CheckpointOptions(every=0))
    with Checkpoints(tmp_path / "other", rare) as checkpoints:
        assert [s for s in range(1, 11) if checkpoints.due(s)] == [10]
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoints.restore(make_state())


def test_saving_does_not_see_what_happens_to_a_donated_buffer(tmp_path, options):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros((1000, 500)))
    with Checkpoints(tmp_path, options) as checkpoints:
        checkpoints.save(4, {"x": x})
        for _ in range(20):
            x = step(x)
        checkpoints.wait()
        assert float(checkpoints.restore({"x": x})["x"].max()) == 1.0


def test_other_settings_are_refused_by_name_and_cadence_may_differ(saved, options):
    cadence = dataclasses.replace(options, steps=99, log=LogOptions(every=7), checkpoint=CheckpointOptions(every=1))
    with Checkpoints(saved, cadence) as checkpoints:
        assert_same_bits(checkpoints.restore(make_state()), make_state())
    other = dataclasses.replace(options, seed=1, optim=OptimOptions(b1=0.8))
    with Checkpoints(saved, other) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(make_state())
    assert str(error.value).splitlines()[1:] == [
        "config.optim.b1: 0.9 in the checkpoint, 0.8 now",
        "config.seed: 0 in the checkpoint, 1 now",
    ]


def test_settings_of_another_version():
    def changed(old, now):
        return differences(old, now, FREE_KEYS, "checkpoint")

    old = to_dict(RunOptions())
    del old["optim"]["eps"]  # added since, and at its default
    assert changed(old, RunOptions()) == []
    now = RunOptions(optim=OptimOptions(eps=1e-5))
    assert changed(old, now) == ["config.optim.eps: 1e-08 in the checkpoint, 1e-05 now"]
    old = to_dict(RunOptions()) | {"gone": 1}
    assert changed(old, RunOptions()) == ["config.gone: 1 in the checkpoint, '(absent)' now"]


def test_another_state_is_refused_by_name(saved, options):
    state = make_state()
    renamed = dataclasses.replace(state, params={"visual": state.params["visual"], "head": jnp.zeros(2)})
    narrower = dataclasses.replace(state, key=jnp.zeros(3, jnp.uint32))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if isinstance(x, jax.Array) else x, state)
    with Checkpoints(saved, options) as checkpoints:
        for other, message in (
            (renamed, "params/head: not in the checkpoint"),
            (renamed, "params/decoder/odd: in the checkpoint, but not in this run"),
            (narrower, r"key: uint32\[2\] in the checkpoint, uint32\[3\] now"),
            (rounded, r"params/visual/kernel: float32\[7, 3\] in the checkpoint, bfloat16\[7, 3\] now"),
        ):
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(other)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA"])
def test_a_broken_checkpoint_is_refused_by_name(saved, options, name):
    (saved / "checkpoints" / "4" / "state" / name).write_bytes(b"broken")
    with Checkpoints(saved, options) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoints/4: "):
            checkpoints.restore(make_state())


def test_a_broken_record_is_refused_by_name(saved, options):
    (saved / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    with Checkpoints(saved, options) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoints/4: the settings cannot be read"):
            checkpoints.meta()


KILLED = """
import os, sys
import jax.numpy as jnp
from qwenla_jax.run.checkpoints import Checkpoints
from qwenla_jax.config.run_options import RunOptions
checkpoints = Checkpoints(sys.argv[1], RunOptions())
checkpoints.save(1, {"x": jnp.ones(3)})
checkpoints.wait()
checkpoints.save(2, {"x": jnp.full(20_000_000, 2.0)})
os._exit(0)  # in the middle of the write
"""


def test_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, env=env, capture_output=True)
    folder = tmp_path / "checkpoints"
    assert any(path.name.startswith("2.") for path in folder.iterdir())  # the half-written one
    with Checkpoints(tmp_path, RunOptions()) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.restore({"x": jnp.zeros(3)})["x"].tolist() == [1, 1, 1]
        checkpoints.save(2, {"x": jnp.zeros(3)})
    with Checkpoints(tmp_path, RunOptions()) as checkpoints:
        assert checkpoints.latest_step() == 2
