"""The architectures of the four released Qwen2.5-VL models, so that a run of their size can be planned without one."""

from __future__ import annotations

from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig

# From the config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct on the Hugging Face hub:
# width, feed-forward width, layers, heads, heads for keys and values, vocabulary, tied embedding; the tower's
# feed-forward width.
_SIZES = {
    "3b": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7b": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32b": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72b": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}


def published_sizes() -> tuple[str, ...]:
    """Names of the released sizes, which are those of the presets."""
    return tuple(_SIZES)


def published_config(name: str) -> ModelConfig:
    """The configuration of a released model. Raises ValueError where there is none of that name."""
    if name not in _SIZES:
        raise ValueError(f"there is no released size {name!r}; valid: {', '.join(_SIZES)}")
    width, ff, layers, heads, kv_heads, vocab, tied, vision_ff = _SIZES[name]
    vision = VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=vision_ff,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        full_attention_layers=(7, 15, 23, 31),
        out_hidden_size=width,
        tokens_per_second=2,
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
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        tie_word_embeddings=tied,
    )
    return ModelConfig(vision, text, 151_655, 151_656, 151_652, 151_653, initializer_range=0.02)


def published_processor() -> ProcessorSettings:
    """The released models' image processor, the same for all sizes."""
    return ProcessorSettings(
        min_pixels=3136,
        max_pixels=12_845_056,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    )
