"""What a run would be, beside transformers' own count of parameters."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from qwenla_jax.config.run_options import OptimOptions, RunOptions
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.tools.dry_run import describe_run, parameter_counts
from qwenla_jax.weights.hub import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
TAGS_RULES = (("visual/.*", "freeze"), (r"decoder/(embed/embedding|lm_head/kernel)", "tags"), (".*", "train"))


@pytest.mark.parametrize("size", ["3b", "7b", "72b"])
def test_parameters_are_those_of_transformers(size, shared_data, tmp_path):
    (tmp_path / "config.json").write_text((shared_data / "configs" / f"qwen2_5_vl_{size}.json").read_text())
    config = ModelConfig.from_hf(tmp_path)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
    named = dict(model.named_parameters())
    whole = parameter_counts(RunOptions(), config)
    assert whole == {"train": sum(p.numel() for p in named.values()), "freeze": 0, "tags": 0}
    part = parameter_counts(replace(RunOptions(), optim=OptimOptions(trainable=TAGS_RULES)), config)
    by_token = [p for name, p in named.items() if "embed_tokens" in name or "lm_head" in name]
    visual = sum(p.numel() for name, p in named.items() if ".visual." in name)
    assert part["tags"] == sum(10 * p.shape[1] for p in by_token)
    assert part["train"] == whole["train"] - visual - sum(p.numel() for p in by_token)
    assert sum(part.values()) == whole["train"]


def test_the_embedded_default():
    message = "\n".join(describe_run(RunOptions()))
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(EMBEDDED)
    assert f"parameters: {model.num_parameters():,}, of them trained {model.num_parameters():,}" in message
    assert "400 steps of 8 are 3,200" in message and "at most 1,024 of prompts, 4,096 sampled" in message


def test_the_command(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [{"id": str(i), "image": "a.png", "question": "what?", "answer": "1"} for i in range(50)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [sys.executable, "launch/train.py", "--config=configs/brpo.py:7b", "--dry_run"]
    asked = [f"--config.init_from={EMBEDDED}", f"--config.data.source={tmp_path}/data.jsonl"]
    done = subprocess.run([*line, *asked], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "625 steps of 16 are 10,000" in done.stdout
    assert "at most 114,688 of prompts, 131,072 sampled" in done.stdout
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and "config.init_from" in done.stderr
