"""Qwen3-VL's configuration: released files, transformers' own reading of what is written, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.data.images.video import video_to_patches
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.families import FAMILIES
from qwenla_jax.model.hf_names import module_name, table
from qwenla_jax.planner.published import published_config, published_processor

SIZES = ("qwen3vl-2b", "qwen3vl-4b", "qwen3vl-8b", "qwen3vl-32b")
# Billions of parameters, from the models' cards.
CARDS = {"qwen3vl-2b": 2.13, "qwen3vl-4b": 4.44, "qwen3vl-8b": 8.77, "qwen3vl-32b": 33.4}
# In the form of the released files.
CONTENT = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 20,
        "initializer_range": 0.03,
        "intermediate_size": 40,
        "max_position_embeddings": 262144,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 100,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": [0, 2],
        "depth": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "num_heads": 2,
        "num_position_embeddings": 49,
        "out_hidden_size": 20,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def changed(**changes):
    """CONTENT with changes: `text__x`, `vision__x` in its part, others at the top."""
    content = json.loads(json.dumps(CONTENT))
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (content[f"{part}_config"] if part else content)[name] = value
    return content


def test_a_file_as_the_released_ones():
    config = ModelConfig.from_hf(CONTENT)
    t, v = config.text, config.vision
    assert (t.hidden_size, t.head_dim, t.num_heads, t.num_kv_heads, t.mrope_section) == (20, 12, 4, 2, (2, 2, 2))
    assert t.rope_theta == 5e6 and t.tie_word_embeddings and config.dtype == "bfloat16"
    assert (v.num_position_embeddings, v.deepstack_layers, v.token_values, v.rms_norm_eps) == (49, (0, 2), 60, 1e-6)
    assert config.family.name == "Qwen3-VL" and config.initializer_range == 0.03
    assert ModelConfig.from_hf(config.to_hf()) == config
    layout = layout_of(config)
    assert layout.frame_slots(5, 7) == 5 * 7 * 4  # without windows no frame is padded
    with pytest.raises(ValueError, match="videos are not supported for this model"):
        video_to_patches(np.zeros((2, 64, 64, 3), np.uint8), 1.0, published_processor(config.family), layout)


def test_transformers_reads_what_we_write(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.from_hf(CONTENT).to_hf(eos_token_id=[7, 8])))
    ours = transformers.Qwen3VLConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.Qwen3VLConfig.from_dict(changed()).to_dict()
    for part in ("text_config", "vision_config"):
        a, b = ours.pop(part), theirs.pop(part)
        unread = {"eos_token_id", "initializer_range"}
        assert {k: a[k] for k in a if k not in unread} == {k: b.get(k) for k in a if k not in unread}
        assert part != "text_config" or (a["eos_token_id"], a["initializer_range"]) == ([7, 8], 0.03)
    for key in ("tie_word_embeddings", "image_token_id", "vision_end_token_id", "model_type", "architectures"):
        assert ours[key] == theirs[key]


def test_absent_keys_are_transformers_defaults():
    # The class's own width of a visual token is not that of its decoder.
    ours = ModelConfig.from_hf({"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}})
    theirs = transformers.Qwen3VLConfig(vision_config={"out_hidden_size": 4096})
    t, v = theirs.text_config, theirs.vision_config
    assert dataclasses.astuple(ours.text)[:8] == (
        *(t.vocab_size, t.hidden_size, t.intermediate_size, t.num_hidden_layers, t.num_attention_heads),
        *(t.num_key_value_heads, t.head_dim, t.rms_norm_eps),
    )
    assert ours.text.rope_theta == t.rope_parameters["rope_theta"] and ours.text.mrope_section == (24, 20, 20)
    for name in FAMILIES["qwen3_vl"].vision_keys:
        assert getattr(ours.vision, name) == getattr(v, name), name
    assert ours.vision.deepstack_layers == tuple(v.deepstack_visual_indexes)
    assert (ours.vision.hidden_act, ours.initializer_range) == (v.hidden_act, t.initializer_range)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe'; it must be 'qwen2_5_vl' or 'qwen3_vl'.*no MoE"),
        ({"text__attention_bias": True}, "text_config.attention_bias is True; it must be false, as Qwen3-VL's"),
        ({"text__head_dim": 7}, "head_dim 7 is odd"),
        ({"text__hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu', as Qwen3-VL's"),
        (
            {"text__rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": False}},
            "text_config.rope_scaling.mrope_interleaved is False; it must be true",
        ),
        ({"text__rope_scaling": {"mrope_section": [0, 3, 3]}}, "mrope_section .* can have a third of head_dim / 2 = 6"),
        (
            {"vision__hidden_act": "silu"},
            "vision.hidden_act 'silu' is not supported; Qwen3-VL uses 'gelu_pytorch_tanh'",
        ),
        ({"vision__num_position_embeddings": 50}, "num_position_embeddings 50 is no square"),
        ({"vision__num_position_embeddings": 0}, "num_position_embeddings 0; of Qwen3-VL"),
        ({"vision__deepstack_visual_indexes": [0, 4]}, r"deepstack_visual_indexes\) has \[4\]; with depth 4"),
        ({"vision__deepstack_visual_indexes": [2, 0]}, "must ascend"),
        ({"vision__out_hidden_size": 32}, "out_hidden_size 32 is not text.hidden_size 20"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(changed(**changes)))
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf(tmp_path)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_of_the_published_sizes(size):
    """transformers makes a model of the same names and shapes out of our config.json, without its numbers."""
    torch = pytest.importorskip("torch")
    config = published_config(size)
    with torch.device("meta"):
        official = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig.from_dict(config.to_hf()))
    theirs = {name: tuple(x.shape) for name, x in official.named_parameters()}
    ours = {module_name(name): entry.shape for entry in table(config) for name in entry.names}
    assert ours == theirs
    assert abs(sum(np.prod(shape) for shape in ours.values()) / 1e9 - CARDS[size]) < 0.006 * CARDS[size]
    assert config.text.tie_word_embeddings == (size in SIZES[:2])


def test_the_processor():
    processor = published_processor(FAMILIES["qwen3_vl"])
    assert processor == ProcessorSettings(65536, 16777216, (0.5,) * 3, (0.5,) * 3, patch_size=16)
