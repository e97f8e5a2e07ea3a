"""Plans by arithmetic and their rooflines, by hand numbers; the programs of one step, compiled for a TPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fit_options import LARGE
from programs import needs_tpu_compiler

from qwenla_jax.config.run_options import DataOptions, EvalOptions, RunOptions
from qwenla_jax.config.shared_options import MeshOptions
from qwenla_jax.model import kernels
from qwenla_jax.planner import arithmetic
from qwenla_jax.planner.chips import CHIPS, chip, parse_topology, slices, tpu_devices
from qwenla_jax.planner.compiled import Load
from qwenla_jax.planner.fit_report import compile_fit, describe, estimate, roofline, smallest
from qwenla_jax.planner.flops import Work
from qwenla_jax.planner.hlo import Collective
from qwenla_jax.planner.published import published_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_roofline_is_the_slowest_of_three():
    v5p = chip("v5p")  # 459e12 operations, 2765e9 bytes and 600e9 bytes a second
    assert roofline(v5p, Work(459e12, 1.0), 1.0) == (1.0, "compute")
    assert roofline(v5p, Work(459e12, 2 * 2765e9), 600e9) == (2.0, "memory")
    assert roofline(v5p, Work(1.0, 2765e9), 3 * 600e9) == (3.0, "links")


def test_topologies_by_name():
    assert parse_topology("v5p:2x2x4").chips == 16
    assert parse_topology("h200:8").chips == 8
    wrong = {"v5p": "CHIP:SHAPE", "v7:2x2": "no chip 'v7'", "v5e:2x2x2": "3 sides", "h100:0": "CHIP"}
    for name, match in wrong.items():
        with pytest.raises(ValueError, match=match):
            parse_topology(name)
    for one in CHIPS:
        counts = [topology.chips for topology in slices(one)]
        assert counts == sorted(counts) and one.source.startswith("https://")


@pytest.mark.parametrize(
    ("size", "chips", "rows", "mesh"),
    [
        ("7b", 16, 8, (1, 8, 2)),
        ("7b", 4, 8, (1, 4, 1)),
        ("72b", 128, 16, (1, 16, 8)),
        ("7b", 256, 256, (4, 64, 1)),
        # 28 heads do not divide by 8.
        ("7b", 64, 8, None),
    ],
)
def test_a_mesh_is_chosen_that_rows_and_heads_divide_over(size, chips, rows, mesh):
    options = dataclasses.replace(
        LARGE, data=dataclasses.replace(LARGE.data, batch_size=2 * rows), eval=EvalOptions(batch_size=2048)
    )
    if mesh is None:
        with pytest.raises(ValueError, match="28 heads do not divide"):
            arithmetic.choose_mesh(options, published_config(size), chips)
        return
    result = arithmetic.choose_mesh(options, published_config(size), chips)
    assert (result.data, result.fsdp, result.tensor) == mesh


def test_a_mesh_that_is_asked_for_is_kept():
    asked = dataclasses.replace(LARGE, mesh=MeshOptions(2, 4, 2))
    assert arithmetic.choose_mesh(asked, published_config("7b"), 16) == asked.mesh


def test_the_7b_on_16_chips_by_hand():
    fit = estimate(LARGE, parse_topology("v5p:2x2x4"), Load(512))
    assert fit.mesh == (1, 8, 2) and fit.source == "arithmetic" and fit.fits
    # 8,292,166,656 parameters in float32, moments twice as much, the reference in bfloat16; a little is not split.
    share = 8_292_166_656 / 16
    for name, size in (("parameters", 4), ("optimiser", 8), ("reference", 2)):
        assert share * size <= fit.components[name] <= share * size * 1.01
    # 28 layers keep their inputs of 3,584 for 8 rows of 1,024 tokens and a prompt of 512; the tower 32 of 1,280 for
    # 2,048 slots; keys and values of the prompt, 2 of 4 heads on a chip, and their gradient.
    kept = 2 * (28 * 3584 * (8 * 1024 + 512) + 32 * 1280 * 2048) + 2 * (2 * 28 * 2 * 128 * 2) * 512
    assert fit.components["activations"] == kept
    update = fit.phases["update"]
    assert update.peak_bytes == fit.peak_bytes == sum(fit.components.values())
    # 6 N operations a token with backward, 2 N again for remat, 2 N for the reference; attention and tower on top.
    tokens = 128 * 1023 + 16 * 512
    dense = 10 * 6.525e9 * tokens / 16
    assert dense < update.flops < 1.35 * dense


def test_weights_gathered_once_save_what_a_token_costs():
    each = estimate(LARGE, parse_topology("v5p:2x2x4"), Load(512)).phases["rollout"]
    options = dataclasses.replace(LARGE, mesh=dataclasses.replace(LARGE.mesh, gather_to_sample=True))
    once = estimate(options, parse_topology("v5p:2x2x4"), Load(512)).phases["rollout"]
    assert each.sent["all-gather"] == pytest.approx(1024 * once.sent["all-gather"])
    assert (each.bound, once.bound) == ("links", "memory")


def test_int8_rollouts_save_a_byte_a_weight():
    options = dataclasses.replace(LARGE, mesh=dataclasses.replace(LARGE.mesh, gather_to_sample=True))
    int8 = dataclasses.replace(options, brpo=dataclasses.replace(options.brpo, rollout_weights="int8"))
    one, other = (estimate(each, parse_topology("v5p:2x2x4"), Load(512)).phases for each in (options, int8))
    # 28 layers of 3584 x (3584 + 512 + 512) + 3584 x 3584 + 3 x 3584 x 18944, halved over tensor.
    kernels = 28 * (3584 * 8192 + 3 * 3584 * 18944)
    assert one["rollout"].peak_bytes - other["rollout"].peak_bytes == pytest.approx(kernels / 2)
    # Read with each of 1,024 tokens, in both parts; sent once a step and part to each of 8, by the other 7.
    assert one["rollout"].hbm_bytes - other["rollout"].hbm_bytes == pytest.approx(2 * 1024 * kernels / 2)
    saved = one["rollout"].sent["all-gather"] - other["rollout"].sent["all-gather"]
    assert saved == pytest.approx(2 * kernels / 2 * 7 / 8)
    assert one["update"].hbm_bytes == other["update"].hbm_bytes


def test_a_long_answer_by_hand():
    """The 7B with 32,768 new tokens on 16 chips: a question a chip, 14 of 28 heads, 2 of 4 key heads."""
    data = dataclasses.replace(LARGE.data, max_response_tokens=32_768)
    whole = dataclasses.replace(LARGE, data=data)
    one_by_one = dataclasses.replace(whole, brpo=dataclasses.replace(LARGE.brpo, group_parts=8))
    fits = [estimate(options, parse_topology("v6e:4x4"), Load(512)) for options in (whole, one_by_one)]
    assert [fit.mesh for fit in fits] == [(1, 8, 2)] * 2 and [fit.fits for fit in fits] == [False, True]
    for fit, rows in zip(fits, (8, 1), strict=True):
        kept = 2 * (28 * 3584 * (rows * 32_768 + 512) + 32 * 1280 * 2048) + 2 * (2 * 28 * 2 * 128 * 2) * 512
        inner = 3 * 4 * 18_944 / 2 * rows * 32_768
        weights = 2 * 2 * (3584 * 128 * (2 * 28 + 2 * 4) + 3 * 3584 * 18_944) / 2 + 2 * 2 * 3584 * 152_064 / 2
        copied = 2 * 2 * 2 * (2 * 128) * rows * (512 + 32_768)  # a row's keys and values, and their gradient
        assert fit.components["activations"] == kept
        assert fit.components["temporaries"] == pytest.approx(inner + weights + copied)
    more = fits[1].phases["update"].flops / fits[0].phases["update"].flops
    assert 1 < more < 1.05  # prompts and images eight times
    # Without splash, scores of 128 queries of all 14 heads and 8 rows, three times, by the same formula.
    plain = estimate(dataclasses.replace(whole, attention="xla"), parse_topology("v6e:4x4"), Load(512))
    scores = 3 * 4 * 14 * 8 * 128 * (512 + 32_768)
    assert plain.peak_bytes - fits[0].peak_bytes == pytest.approx(scores - 2 * 2 * 2 * (2 * 128) * 8 * (512 + 32_768))


def test_a_collective_on_a_ring():
    assert Collective("all-reduce", 80, 4, 2, "").sent == 2 * 80 * 3 / 4 * 2
    assert Collective("all-gather", 80, 4, 2, "").sent == 80 * 3 / 4 * 2


def test_the_smallest_slice_is_the_first_that_leaves_a_tenth():
    topology, fit = smallest(LARGE, chip("v5p"), Load(512))
    assert fit.headroom >= 0.1 and topology.chips == fit.chips
    below = [other for other in slices(chip("v5p")) if other.chips < topology.chips]
    assert all(estimate(LARGE, other, Load(512)).headroom < 0.1 for other in below)
    # 72B: parameters, moments and reference alone are 14 bytes x 73.4e9, more than 4 GPUs of 80 GB have.
    assert smallest(dataclasses.replace(LARGE, preset="72b"), chip("h100"), Load(512))[0].chips > 8


def test_a_person_reads_it():
    text = "\n".join(describe(estimate(LARGE, parse_topology("h200:8"), Load(512)), parse_topology("h200:4")))
    for part in ("by arithmetic, nothing compiled", "parameters", "% free: fits", "h200:4"):
        assert part in text


HOLDS = """
import sys
from qwenla_jax.planner.chips import parse_topology, tpu_devices
print(len(tpu_devices(parse_topology("v5e:2x2"))), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@needs_tpu_compiler
def test_the_tiny_model_compiles_for_a_tpu(monkeypatch):
    """Beside two plans that hold the compiler, and after they were killed; with the attention that a TPU would have."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    others = [subprocess.Popen([sys.executable, "-c", HOLDS], **pipes, cwd=ROOT) for _ in range(2)]
    try:
        message = [other.stdout.readline() for other in others]
        assert message == [b"4\n"] * 2, [other.communicate()[1].decode()[-2000:] for other in others]
        assert len(tpu_devices(parse_topology("v5e:2x2"))) == 4
    finally:
        for other in others:
            other.kill()
            other.communicate()
    options = RunOptions(
        remat="full",
        data=DataOptions(batch_size=4, max_response_tokens=16),
        eval=EvalOptions(batch_size=4),
        mesh=MeshOptions(data=1, fsdp=4, tensor=1),
    )
    for name in ("FEWEST_QUERIES", "SMALLEST_HEAD"):
        monkeypatch.setattr(kernels, name, 16)
    shapes, splash = [], kernels.splash_attention
    monkeypatch.setattr(kernels, "splash_attention", lambda q, kv: shapes.append(q.shape) or splash(q, kv))
    fit = compile_fit(options, parse_topology("v5e:2x2"), Load(64, 112, 112), quick=True)
    # Prompts and responses in the decoder's heads of 32, windows in the tower's of 16; here there is none of it.
    assert {shape[-1] for shape in shapes} == {16, 32} and kernels.kernel_here("auto") == "xla"
    assert fit.problem is None and fit.fits and fit.source == "compiled quickly"
    assert fit.phases["update"].sent and np.isfinite(fit.step_s)
    for phase in (fit.phases["rollout"], fit.phases["update"]):
        assert phase.moved_bytes > phase.least_bytes > 0 and 0 <= phase.exposed <= sum(phase.sent.values())
    assert "of what it has to be" in "\n".join(describe(fit, None))
    assert fit.peak_bytes >= sum(fit.components[name] for name in ("parameters", "optimiser"))
    assert jax.config.jax_optimization_level == "UNKNOWN"  # as it was
