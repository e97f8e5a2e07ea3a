"""The model families, and everything in which they differ: the one list of them.

One decoder and one tower serve all families. What a released file gives as a number is a field of `model.config`; what
is the same in all models of a family is here. Adding a family begins with an entry below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Field of `VisionConfig` -> key of config.json, for everything that is a plain whole number there.
_TOWER = "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size"


@dataclasses.dataclass(frozen=True)
class Family:
    """What all models of a family have in common.

    Attributes:
      model_type: in config.json.
      name: in messages.
      architecture, processor: transformers' classes of model and processor.
      nested: config.json has the decoder's keys in a text_config, and tensors are stored as `model.visual.` and
        `model.language_model.`; else the keys are flat, and tensors are `visual.` and `model.`.
      windows: most layers of the tower attend within windows; else every layer within the whole frame.
      layer_norm: the tower has layer norms with biases; else RMS norms.
      patch_bias: the tower's first product has a bias.
      vision_act: activation of the tower's feed-forward: "silu" is gated, "gelu_pytorch_tanh" is not.
      videos: whether videos are supported.
      qkv_bias: queries, keys and values of the decoder have biases.
      qk_norm: an RMS norm of every head's query and key, before they are rotated.
      free_head_dim: the head size is a number of its own; else hidden_size / num_heads.
      mrope_interleaved: the frequencies' axes take turns (time, row, column, time, ...); else they are chunks.
      vision_keys: names of `VisionConfig`'s fields that are whole numbers in config.json.
      vision_defaults, text_defaults: what transformers' classes have where a file has no such key.
      max_positions: `max_position_embeddings` of the released files; no position is computed from it.
    """

    model_type: str
    name: str
    architecture: str
    processor: str
    nested: bool
    windows: bool
    layer_norm: bool
    patch_bias: bool
    vision_act: str
    videos: bool
    qkv_bias: bool
    qk_norm: bool
    free_head_dim: bool
    mrope_interleaved: bool
    vision_keys: tuple[str, ...]
    vision_defaults: Mapping[str, Any]
    text_defaults: Mapping[str, Any]
    max_positions: int


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    processor="Qwen2_5_VLProcessor",
    nested=False,
    windows=True,
    layer_norm=False,
    patch_bias=False,
    vision_act="silu",
    videos=True,
    qkv_bias=True,
    qk_norm=False,
    free_head_dim=False,
    mrope_interleaved=False,
    vision_keys=(*_TOWER.split(), "window_size", "out_hidden_size", "tokens_per_second"),
    vision_defaults={
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "tokens_per_second": 4,
        "hidden_act": "silu",
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    text_defaults={
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    max_positions=128000,
)

# Dense; the mixture of experts is another model_type, and its videos have time stamps in the text.
QWEN3_VL = Family(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    architecture="Qwen3VLForConditionalGeneration",
    processor="Qwen3VLProcessor",
    nested=True,
    windows=False,
    layer_norm=True,
    patch_bias=True,
    vision_act="gelu_pytorch_tanh",
    videos=False,
    qkv_bias=False,
    qk_norm=True,
    free_head_dim=True,
    mrope_interleaved=True,
    vision_keys=(*_TOWER.split(), "out_hidden_size", "num_position_embeddings"),
    vision_defaults={
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [8, 16, 24],
    },
    text_defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 5e5,
        "mrope_section": [24, 20, 20],
    },
    max_positions=262144,
)

FAMILIES = {family.model_type: family for family in (QWEN2_5_VL, QWEN3_VL)}
