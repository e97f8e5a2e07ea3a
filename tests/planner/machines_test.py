"""The presets for given machines: they fit where they say, by hand numbers and by EasyR1's own settings."""

import dataclasses

import pytest

from qwenla_jax.cli.fit import options_of
from qwenla_jax.planner.chips import parse_topology
from qwenla_jax.planner.compiled import Load
from qwenla_jax.planner.fit_report import estimate
from qwenla_jax.recipes.by_name import get_config

MACHINES = {  # as in docs/recipes.md
    "3b_80gb": "h100:1",
    "3b_v5e8": "v5e:2x4",
    "7b_8x80gb": "h100:8",
    "7b_v5p8": "v5p:2x2x1",
    "7b_geometry3k": "h100:8",
}


def preset(name, **brpo):
    options = options_of(get_config("brpo", name))
    return dataclasses.replace(options, brpo=dataclasses.replace(options.brpo, **brpo))


@pytest.mark.parametrize("name", MACHINES)
def test_it_fits_with_the_longest_prompts(name):
    options, topology = preset(name), parse_topology(MACHINES[name])
    assert options.preset == name
    longest = options.data.max_prompt_tokens
    image = (1280, 1024) if name == "7b_geometry3k" else (640, 480)
    fit = estimate(options, topology, Load(longest, *image))
    assert fit.fits and fit.chips == topology.chips


def test_adapters_on_one_gpu_by_hand():
    fit = estimate(preset("3b_80gb"), parse_topology("h100:1"), Load(512))
    base = 3_754_622_976
    # Rank 64 on q, o (2,048 to 2,048), k, v (2,048 to 256), gate, up and down (2,048 and 11,008), of 36 layers.
    adapters = 36 * 64 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11_008))
    want = {"parameters": 2 * base + 4 * adapters, "optimiser": 8 * adapters, "reference": 0, "gradient": 8 * adapters}
    for name, size in want.items():
        assert fit.components[name] == pytest.approx(size, rel=1e-4, abs=1e4), name
    # Forward of reference and policy, the latter again in the backward pass, and the gradient of the activations: two
    # operations each a decoder's number (without embedding) and token; attention, head and tower come on top.
    tokens = 128 * 1023 + 16 * 512
    dense = 4 * 2 * 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008) * tokens
    assert dense < fit.phases["update"].flops < 1.25 * dense


def test_each_round_of_sampling_reads_the_weights_again():
    once, twice = (
        estimate(preset("7b_v5p8", rollout_batch=n), parse_topology("v5p:2x2x1"), Load(512)) for n in (16, 8)
    )
    decoder = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944) + 3584 * 152_064
    more = twice.phases["rollout"].hbm_bytes - once.phases["rollout"].hbm_bytes
    assert more == pytest.approx(1024 * 2 * decoder, rel=0.02)  # and the prompts' pass; shared keys are read no more
    assert twice.phases["rollout"].sent["all-gather"] == 2 * once.phases["rollout"].sent["all-gather"]
    assert once.phases["update"] == twice.phases["update"]


def test_geometry3k_is_easyr1s_setting():
    """examples/config.yaml and examples/qwen2_5_vl_7b_geo3k_grpo.sh of EasyR1 at commit b44b311."""
    options = preset("7b_geometry3k")
    data, optim, brpo = options.data, options.optim, options.brpo
    assert (data.batch_size, brpo.group_size) == (512, 5)  # rollout_batch_size, rollout.n
    assert (data.max_prompt_tokens, data.max_response_tokens) == (2048, 2048)
    assert (data.min_pixels, data.max_pixels) == (262_144, 4_194_304)
    assert (optim.learning_rate, optim.weight_decay, optim.warmup_ratio, optim.clip_norm) == (1e-6, 1e-2, 0.0, 1.0)
    assert (optim.b1, optim.b2, brpo.beta, brpo.kl, brpo.temperature) == (0.9, 0.999, 1e-2, "k3", 1.0)
    assert options.steps == 15 * (2101 // 512)  # total_epochs; the last, smaller batch of an epoch is left out there
