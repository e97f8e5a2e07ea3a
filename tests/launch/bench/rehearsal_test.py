"""The released layout at tiny width: the released tokenizer, 151,936 rows, names and shards that transformers wrote.

Oracle: transformers, which saves the checkpoint and loads the export.
"""

import json
from pathlib import Path

import huggingface_hub
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_load_step_export_and_transformers(shared_data, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT))
    from launch.bench.rehearsal import rehearse, write_released

    config = json.loads((shared_data / "configs" / "qwen2_5_vl_3b.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config["vision_config"] |= {"out_hidden_size": 64, "fullatt_block_indexes": [1]}
    processor = shared_data / "configs" / "preprocessor_config.json"
    write_released(tmp_path / "hf", config, processor, shared_data / "tokenizer", "10MB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.split(".")[0] for name in index} == {"model", "visual"} and len(set(index.values())) > 1
    assert {"model.layers.1.mlp.down_proj.weight", "visual.blocks.1.attn.qkv.weight"} <= index.keys()
    result = rehearse(tmp_path / "hf", tmp_path / "run", rank=2)
    assert (result["tokens"], result["rows"]) == (151_665, 151_936)
    assert result["changed"] == 2 * 7
    card = huggingface_hub.ModelCard.load(tmp_path / "run" / "hf" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"
