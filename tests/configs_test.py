"""The recipes' numbers against the paper's, with the place where the paper gives each.

The paper (arXiv 2505.23558v2) gives them for the 7B model; the other sizes carry the same.
"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("3b", "7b", "32b", "72b", *(f"qwen3vl-{size}" for size in ("2b", "4b", "8b", "32b")))
BRPO = "section BRPO, settings"
SFT = "section Visual re-attention, SFT settings"

# file -> (setting, value, place)
PAPER = {
    "brpo": [
        ("stage", "brpo", BRPO),
        ("optim.trainable", ((".*", "train"),), f"{BRPO}: full parameters"),
        ("dtype", "bfloat16", f"{BRPO}: bf16"),
        ("optim.learning_rate", 1e-6, f"{BRPO}: lr 1e-6"),
        ("optim.b1", 0.9, f"{BRPO}: AdamW"),
        ("optim.b2", 0.95, f"{BRPO}: AdamW"),
        ("optim.eps", 1e-8, f"{BRPO}: AdamW"),
        ("optim.warmup_ratio", 0.01, f"{BRPO}: warm-up ratio"),
        ("brpo.beta", 0.1, f"{BRPO}: beta"),
        ("brpo.kl", "k3", "section BRPO, objective: pi_ref/pi - log(pi_ref/pi) - 1"),
        ("brpo.scale", "group", "section BRPO, objective: A = (r - mean) / std of the group"),
        ("brpo.group_size", 8, f"{BRPO}: G"),
        ("brpo.temperature", 1.0, f"{BRPO}: temperature"),
        ("data.batch_size", 16, f"{BRPO}: batch 16"),
        ("optim.accumulation", 2, f"{BRPO}: gradient accumulation 2"),
        ("data.max_response_tokens", 1024, f"{BRPO}: max completion"),
        ("data.max_pixels", 640 * 480, f"{BRPO}: images at most 640x480"),
        ("rewards.target_length", 100.0, "section BRPO, rewards: lambda"),
        ("rewards.format", 1.0, "section BRPO, rewards: their sum"),
        ("rewards.accuracy", 1.0, "section BRPO, rewards: their sum"),
        ("rewards.balance", 1.0, "section BRPO, rewards: their sum"),
        ("rewards.balance_floor", None, "section BRPO, rewards: no floor is given"),
        ("rewards.balance_only_if_correct", False, "section BRPO, rewards: a plain sum"),
        ("reattention.mode", "none", "section BRPO: text-only reflections"),
    ],
    "sft_copy": [("reattention.mode", "copy", "section Visual re-attention: all L_c visual tokens")],
    "sft_route": [
        ("reattention.mode", "route", "section Visual re-attention: the top m%"),
        ("reattention.keep_ratio", 0.5, "section Visual re-attention: m = 50 by default"),
    ],
    # The paper gives no settings for the cold start; those of its other supervised stage stand in for them.
    "cold_start": [("reattention.mode", "none", "pipeline, stage 1: reflections in text")],
    "distill": [
        ("data.size", 40_000, "pipeline, stage 3: Qwen-Zero-40k"),
        ("judges.reject_votes", 2, "pipeline, stage 3: 2 or more of the judges say incorrect"),
    ],
}
_SHARED = [
    ("stage", "sft", SFT),
    ("dtype", "bfloat16", SFT),
    ("optim.learning_rate", 1e-5, f"{SFT}: lr 1e-5"),
    ("optim.b1", 0.9, f"{SFT}: AdamW"),
    ("optim.b2", 0.999, f"{SFT}: AdamW"),
    ("optim.eps", 1e-8, f"{SFT}: AdamW"),
    ("optim.warmup_ratio", 0.01, f"{SFT}: warm-up ratio"),
    ("data.batch_size", 1 * 8 * 8, f"{SFT}: batch 1 a GPU, 8 GPUs, accumulation 8"),
    ("optim.accumulation", 8, f"{SFT}: accumulation"),
    ("data.max_pixels", 262_144, f"{SFT}: pixels an image"),
]
_FROZEN = (("visual/.*", "freeze"), (r"decoder/(embed/embedding|lm_head/kernel)", "tags"), (".*", "train"))
ROWS = [
    (file, *row)
    for file, rows in PAPER.items()
    for row in (
        *rows,
        *(_SHARED if file in ("sft_copy", "sft_route", "cold_start") else ()),
        *([("optim.trainable", _FROZEN, f"{SFT}: tower and projector frozen")] if file.startswith("sft_") else ()),
    )
]


def get_config(name, preset):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


def value_of(config, key):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_the_papers(preset):
    configs = {name: get_config(name, preset) for name in PAPER}
    wrong = [
        f"{file}:{preset} {key} is {value_of(configs[file], key)!r}, the paper's {want!r} ({place})"
        for file, key, want, place in ROWS
        if value_of(configs[file], key) != want
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_follows_from_several_numbers(preset):
    brpo = get_config("brpo", preset)
    assert brpo.data.max_prompt_tokens + brpo.data.max_response_tokens == 8192  # section BRPO: max length 8192
    assert brpo.steps * brpo.data.batch_size == 10_000  # pipeline, stage 2: 10k questions; one epoch is our choice
    for name in ("sft_copy", "sft_route"):
        stage_4 = get_config(name, preset)
        assert stage_4.steps * stage_4.data.batch_size == 13 * 40_000  # SFT settings: 13 epochs of Qwen-Zero-40k
    cold = get_config("cold_start", preset)
    assert 3 * 2_000 <= cold.steps * cold.data.batch_size < 3 * 2_000 + 64  # pipeline, stage 1: 2k; 3 epochs is ours
    # One invalid record in a hundred of what the paper trains on does not end a run of days; more does.
    assert brpo.data.max_invalid == 100 and cold.data.max_invalid == 20
    assert get_config("distill", preset).data.max_invalid == get_config("sft_copy", preset).data.max_invalid == 400
