"""The released architectures. Oracle: the published config files."""

import dataclasses

import pytest

from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.planner.published import published_config, published_processor, published_sizes


# Of Qwen3-VL see `model/qwen3_vl_config_test.py`.
@pytest.mark.parametrize("name", [name for name in published_sizes() if not name.startswith("qwen3vl")])
def test_a_size_is_what_its_file_says(shared_data, name):
    want = ModelConfig.from_hf(shared_data / "configs" / f"qwen2_5_vl_{name}.json")
    result = published_config(name)
    assert dataclasses.replace(result, dtype=want.dtype, param_dtype=want.param_dtype) == want


def test_the_processor_is_what_its_file_says(shared_data):
    assert published_processor() == ProcessorSettings.from_json(shared_data / "configs" / "preprocessor_config.json")


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="'8b'.*3b, 7b, 32b, 72b"):
        published_config("8b")
