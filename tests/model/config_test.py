"""The configuration against the released files and transformers' own reading and writing of them."""

import dataclasses
import json

import numpy as np
import pytest

from qwenla_jax.model.config import ModelConfig

RELEASED = ("3b", "7b", "32b", "72b")

FLAT = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "tie_word_embeddings": True,
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "vision_config": {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 2],
        "out_hidden_size": 24,
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
}


def _changed(**changes):
    """FLAT with changes; `vision__x` goes into vision_config, None removes the key."""
    content = json.loads(json.dumps(FLAT))
    for key, value in changes.items():
        section = content["vision_config"] if key.startswith("vision__") else content
        key = key.removeprefix("vision__")
        section[key] = value
        if value is None:
            del section[key]
    return content


# Width, layers, query heads, KV heads, feed-forward, vocabulary, vision feed-forward: from the models' cards.
CARDS = {
    "3b": (2048, 36, 16, 2, 11008, 151936, 3420),
    "7b": (3584, 28, 28, 4, 18944, 152064, 3420),
    "32b": (5120, 64, 40, 8, 27648, 152064, 3456),
    "72b": (8192, 80, 64, 8, 29568, 152064, 3456),
}


@pytest.mark.parametrize("size", RELEASED)
def test_released_files(shared_data, size):
    config = ModelConfig.from_hf(shared_data / "configs" / f"qwen2_5_vl_{size}.json")
    t, v = config.text, config.vision
    result = (t.hidden_size, t.num_layers, t.num_heads, t.num_kv_heads, t.intermediate_size, t.vocab_size)
    assert (*result, v.intermediate_size) == CARDS[size]
    assert t.head_dim == 128 and t.mrope_section == (16, 24, 24) and t.rope_theta == 1e6 and t.rms_norm_eps == 1e-6
    assert t.tie_word_embeddings == (size == "3b")
    assert (v.depth, v.head_dim, v.full_attention_layers, v.tokens_per_second) == (32, 80, (7, 15, 23, 31), 2)
    assert (v.window_tokens, v.merge_patches, v.window_slots, v.patch_values) == (4, 4, 64, 1176)
    assert config.image_token_id == 151655 and config.dtype == config.param_dtype == "bfloat16"
    assert ModelConfig.from_hf(config.to_hf()) == config and hash(config) == hash(ModelConfig.from_hf(config.to_hf()))


@pytest.mark.parametrize("size", RELEASED)
def test_transformers_reads_what_we_write(shared_data, tmp_path, size):
    """transformers makes the same of our file as of the released one, but for what no computation reads."""
    transformers = pytest.importorskip("transformers")
    file = shared_data / "configs" / f"qwen2_5_vl_{size}.json"
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.from_hf(file).to_hf(eos_token_id=[7, 8])))
    ours = transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path).to_dict()
    theirs = transformers.Qwen2_5_VLConfig.from_dict(json.loads(file.read_text())).to_dict()
    assert ours["text_config"]["eos_token_id"] == [7, 8]
    unread = {"max_window_layers", "bos_token_id", "eos_token_id", "spatial_patch_size", "vision_token_id"}
    for section in ("text_config", "vision_config"):
        a, b = ours.pop(section), theirs.pop(section)
        assert {k: a.get(k) for k in a if k not in unread} == {k: b.get(k) for k in a if k not in unread}
    shared = set(ours) & set(theirs) - {"_name_or_path", "transformers_version"}
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    assert set(theirs) - set(ours) <= unread


def test_layout_that_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Qwen2_5_VLConfig.from_dict(_changed()).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(FLAT)


# Values of keys that a file may leave out; text's hidden_size and the like move together.
VISION_CHANGES = {
    "depth": 40,
    "hidden_size": 1280,
    "intermediate_size": 99,
    "num_heads": 8,
    "patch_size": 7,
    "temporal_patch_size": 1,
    "spatial_merge_size": 4,
    "window_size": 224,
    "tokens_per_second": 2,
    "fullatt_block_indexes": [1, 2],
    "hidden_act": "silu",
    "in_channels": 4,
}
TEXT_CHANGES = {
    "vocab_size": 160_000,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_absent_keys_are_transformers_defaults(layout):
    """Any part of the keys: the same numbers as transformers reads, from its class where the file has none."""
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(3)

    def part(values):
        return {key: value for key, value in values.items() if rng.random() < 0.5}

    for _ in range(100):
        vision = part(VISION_CHANGES) | {"out_hidden_size": 8192}
        if vision.get("patch_size") == 7 and vision.get("spatial_merge_size") == 4:
            vision["window_size"] = 112
        text, ids = part(TEXT_CHANGES), part(dict.fromkeys(["image_token_id"], 5) | {"vision_end_token_id": 6})
        if rng.random() < 0.5:
            text["rope_scaling"] = {"type": "mrope", "mrope_section": [32, 16, 16]}
        if rng.random() < 0.2:
            text["num_key_value_heads"] = None
        outer = {"tie_word_embeddings": False} if rng.random() < 0.5 and layout == "nested" else {}
        content = {"model_type": "qwen2_5_vl", "vision_config": vision, **ids, **outer}
        content |= text if layout == "flat" else {"text_config": text}
        ours = ModelConfig.from_hf(json.loads(json.dumps(content)))
        theirs = transformers.Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(content)))
        t, v, rope = theirs.text_config, theirs.vision_config, theirs.text_config.rope_parameters
        assert dataclasses.astuple(ours.text) == (
            *(t.vocab_size, t.hidden_size, t.intermediate_size, t.num_hidden_layers, t.num_attention_heads),
            *(t.num_key_value_heads, t.hidden_size // t.num_attention_heads, t.rms_norm_eps, rope["rope_theta"]),
            *(tuple(rope.get("mrope_section", (16, 24, 24))), theirs.tie_word_embeddings),
        ), content
        for name in VISION_CHANGES.keys() - {"fullatt_block_indexes"}:
            assert getattr(ours.vision, name) == getattr(v, name), (name, content)
        assert ours.vision.full_attention_layers == tuple(v.fullatt_block_indexes)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.initializer_range == t.initializer_range


def test_layout_of_version_four():
    """Nested, with rope_scaling and the tie inside text_config."""
    top = {k: FLAT[k] for k in FLAT if k.endswith("_token_id") or k in ("model_type", "vision_config")}
    text = {k: v for k, v in FLAT.items() if k not in top}
    assert ModelConfig.from_hf({**top, "tie_word_embeddings": False, "text_config": text}) == ModelConfig.from_hf(FLAT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 2]}}, "sums to 5; it must sum to head_dim / 2 = 4"),
        (
            {"rope_scaling": {"type": "yarn", "mrope_section": [2, 1, 1]}},
            "rope_scaling is {.*; it must be of type 'mrope'",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "sums to 64; it must sum to head_dim / 2 = 4"),  # 16, 24, 24 by default
        ({"num_key_value_heads": 2}, "num_heads 3 is not divisible by num_kv_heads 2"),
        ({"hidden_size": 25}, "hidden_size 25 is not num_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"vision__hidden_act": "quick_gelu"}, "vision.hidden_act 'quick_gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; it must be 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'; it must be 'qwen2_5_vl'"),
        ({"vision__hidden_size": 12}, "vision head size is 6"),
        ({"vision__fullatt_block_indexes": [1, 3]}, r"has \[3\]; with depth 3 the indexes are 0 to 2"),
        ({"vision__fullatt_block_indexes": [2, 0]}, "must ascend"),
        ({"vision__out_hidden_size": 32}, "out_hidden_size 32 is not text.hidden_size 24"),
        ({"vision__window_size": 100}, "window_size 100 is not a multiple of patch_size"),
        ({"vision__patch_size": "14"}, "vision_config.patch_size is '14'; it must be a whole number"),
        ({"vision__rope_parameters": {"rope_theta": 5e3}}, "vision_config.rope_parameters"),
        ({"rope_theta": "large"}, "rope_theta is 'large'; it must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"head_dim": "a"}, "head_dim is 'a'; it must be a whole number"),
        ({"layer_types": 5}, "layer_types is 5; it must be a list of 'full_attention'"),
        ({"layer_types": [["full_attention"]]}, "layer_types is"),
        ({"vision__patch_size": [[14], [14]]}, r"patch_size is \[\[14\], \[14\]\]; it must be a whole number"),
        ({"vision__rope_parameters": 5}, "vision_config.rope_parameters is 5; it must be an object"),
        ({"rope_scaling": "mrope"}, "rope_scaling is 'mrope'; it must be an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 1000.*\.\.\.; it must be a number"),
        ({"initializer_range": "a"}, "initializer_range is 'a'; it must be a number"),
        ({"num_hidden_layers": 10**7}, "text.num_layers is 10000000; it must be at most 1,024"),
        ({"vision__depth": 2**20}, "vision.depth is 1048576; it must be at most 1,024"),
        ({"vocab_size": 10**12}, "text.vocab_size is 1000000000000; it must be at most 16,777,216"),
        ({"vision_config": 5}, "vision_config is 5; it must be an object"),
        ({"num_hidden_layers": 0}, "text.num_layers is 0; it must be above 0"),
        ({"image_token_id": 100}, "image_token_id 100 is outside the vocabulary, 0 to 99"),
        ({"image_token_id": 91}, "must differ"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not one of float32"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(_changed(**changes)))
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf(tmp_path)
    assert str(caught.value).startswith(str(file))


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{'model_type'")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: holds a list"):
        ModelConfig.from_hf(tmp_path)


def test_settings_of_ours():
    config = ModelConfig.from_hf(FLAT)
    assert (config.dtype, config.param_dtype, config.remat) == ("float32", "float32", "none")
    with pytest.raises(ValueError, match="remat 'some' is not one of none, full, dots"):
        dataclasses.replace(config, remat="some")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.remat = "full"
