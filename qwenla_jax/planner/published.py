"""The architectures of the released models, so that a run of their size can be planned without one."""

from __future__ import annotations

from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.families import QWEN2_5_VL, QWEN3_VL, Family
from qwenla_jax.model.halves import TextConfig, VisionConfig

# From the config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct on the Hugging Face hub:
# width, feed-forward width, layers, heads, heads for keys and values, vocabulary, tied embedding; the tower's
# feed-forward width.
_QWEN2_5 = {
    "3b": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7b": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32b": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72b": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}
# Of Qwen/Qwen3-VL-{2B,4B,8B,32B}-Instruct: the same, and behind it the tower's depth and width.
_QWEN3 = {
    "qwen3vl-2b": (2048, 6144, 28, 16, 8, 151_936, True, 4096, 24, 1024),
    "qwen3vl-4b": (2560, 9728, 36, 32, 8, 151_936, True, 4096, 24, 1024),
    "qwen3vl-8b": (4096, 12288, 36, 32, 8, 151_936, False, 4304, 27, 1152),
    "qwen3vl-32b": (5120, 25600, 64, 64, 8, 151_936, False, 4304, 27, 1152),
}


def published_sizes() -> tuple[str, ...]:
    """Names of the released sizes, which are those of the presets."""
    return *_QWEN2_5, *_QWEN3


def published_config(name: str) -> ModelConfig:
    """The configuration of a released model. Raises ValueError where there is none of that name."""
    if name not in published_sizes():
        raise ValueError(f"there is no released size {name!r}; valid: {', '.join(published_sizes())}")
    family = QWEN2_5_VL if name in _QWEN2_5 else QWEN3_VL
    width, ff, layers, heads, kv_heads, vocab, tied, vision_ff, *tower = {**_QWEN2_5, **_QWEN3}[name]
    depth, vision_width = tower or (32, 1280)
    vision = VisionConfig(
        depth=depth,
        hidden_size=vision_width,
        intermediate_size=vision_ff,
        num_heads=16,
        in_channels=3,
        patch_size=14 if family.windows else 16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112 if family.windows else 32,
        full_attention_layers=(7, 15, 23, 31) if family.windows else tuple(range(depth)),
        out_hidden_size=width,
        tokens_per_second=2 if family.videos else 0,
        hidden_act=family.vision_act,
        num_position_embeddings=0 if family.windows else 48 * 48,
        deepstack_layers=() if family.windows else (5, 11, 17) if depth == 24 else (8, 16, 24),
    )
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ff,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=5e6 if family is QWEN3_VL else 1e6,
        mrope_section=(24, 20, 20) if family is QWEN3_VL else (16, 24, 24),
        tie_word_embeddings=tied,
    )
    return ModelConfig(vision, text, 151_655, 151_656, 151_652, 151_653, model_type=family.model_type)


def published_processor(family: Family = QWEN2_5_VL) -> ProcessorSettings:
    """The image processor of a family's released models, the same for all sizes."""
    if family is QWEN3_VL:
        half = (0.5, 0.5, 0.5)
        return ProcessorSettings(256 * 256, 4096 * 4096, half, half, patch_size=16)
    return ProcessorSettings(
        min_pixels=3136,
        max_pixels=12_845_056,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    )
