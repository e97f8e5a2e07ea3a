"""Qwen3-VL's files: transformers' own, byte for byte there and back, and ours read by transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import qwenla_jax
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.families import FAMILIES
from qwenla_jax.model.qwen_vl import init_params
from qwenla_jax.planner.published import published_processor
from qwenla_jax.weights import convert, hf

TEXT = {"vocab_size": 100, "hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 12}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": {"mrope_section": [2, 2, 2]}}
VISION = {"depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
VISION |= {"out_hidden_size": 20, "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]}
IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
CONTENT = {"model_type": "qwen3_vl", **IDS, "text_config": TEXT, "vision_config": VISION}


def official(folder, tied, dtype):
    """A random model, saved by transformers."""
    config = transformers.Qwen3VLConfig.from_dict(json.loads(json.dumps(CONTENT | {"tie_word_embeddings": tied})))
    model = transformers.Qwen3VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_there_and_back_is_the_same_to_the_byte(tmp_path, tied, dtype):
    official(tmp_path / "hf", tied, dtype)
    original = (tmp_path / "hf" / "model.safetensors").read_bytes()
    model, params = qwenla_jax.load(tmp_path / "hf")
    abstract = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    qwenla_jax.save(tmp_path / "ours", model, params)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == original
    assert ModelConfig.from_hf(tmp_path / "ours") == ModelConfig.from_hf(tmp_path / "hf")
    convert.from_hf(convert.plan_from_hf(tmp_path / "hf"), tmp_path / "orbax")
    again = hf.load_params(tmp_path / "orbax")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == original


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_we_write(tmp_path, max_shard_bytes):
    config = ModelConfig.from_hf(CONTENT)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])
    processor = published_processor(FAMILIES["qwen3_vl"])
    folder = qwenla_jax.save(tmp_path / "a", config, params, max_shard_bytes=max_shard_bytes, processor=processor)
    kind = transformers.Qwen3VLForConditionalGeneration
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    position = params["visual"]["pos_embed"]["embedding"]
    np.testing.assert_array_equal(model.model.visual.pos_embed.weight.detach().numpy(), position)
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(folder)[1], params)
    shards = sorted(folder.glob("*.safetensors"))
    names = {name for shard in shards for name in load_file(shard)}
    assert names == {name for name, _ in model.named_parameters()} and (len(shards) > 3) == (max_shard_bytes == 20_000)
    assert ProcessorSettings.from_json(folder / "preprocessor_config.json") == processor
    assert json.loads((folder / "preprocessor_config.json").read_text())["processor_class"] == "Qwen3VLProcessor"
