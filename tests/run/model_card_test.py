"""The model card of an export, read back by huggingface_hub, by YAML's own parser and by the command that it names."""

import json
import re
import shlex
from dataclasses import replace

import huggingface_hub
import pytest
import yaml

from qwenla_jax.cli.generate import make_parser
from qwenla_jax.config.run_options import DataOptions, OptimOptions, RunOptions
from qwenla_jax.run.model_card import model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPTIONS = RunOptions(
    init_from=f"Qwen/Qwen2.5-VL-3B-Instruct@{COMMIT}",
    steps=30,
    data=DataOptions(source="we_math:/home/someone/data", system='Say "yes": # {{ no }}'),
    optim=OptimOptions(trainable=(("visual/(a|b).*", "freeze"), (".*", "train"))),
)


@pytest.fixture
def workdir(tmp_path):
    rows = [{"step": 0, "eval/accuracy": 0.25}, {"step": 10, "train/reward": 1.5, "train/timing_s/step": 3.0}]
    rows += [{"step": 20, "train/reward": 2.0}, {"step": 20, "eval/accuracy": 0.5}, {"step": 30, "train/reward": 9.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_hub_reads_its_metadata(workdir):
    text = model_card(OPTIONS, workdir, 20)
    (workdir / "README.md").write_text(text)
    data = huggingface_hub.ModelCard.load(workdir / "README.md").data.to_dict()
    assert data == yaml.safe_load(text.split("---\n")[1]) == huggingface_hub.metadata_load(workdir / "README.md")
    tags = data.pop("tags")
    assert data == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
    }
    assert "brpo" in tags and "qwenla_jax" in tags
    adapter = huggingface_hub.ModelCard(model_card(OPTIONS, workdir, 20, adapter=True)).data
    assert (adapter.library_name, adapter.to_dict()["base_model_relation"]) == ("peft", "adapter")
    # The Hub refuses a base model that is no name of one.
    local = huggingface_hub.ModelCard(model_card(replace(OPTIONS, init_from=str(workdir)), workdir, 20)).data
    assert local.base_model is None and local.pipeline_tag == "image-text-to-text"


def test_a_person_reads_the_run(workdir):
    text = model_card(OPTIONS, workdir, 20)
    assert f"Qwen2.5-VL-3B-Instruct), revision `{COMMIT}`" in text and "20 of 30 steps" in text
    assert "| eval/accuracy | 0.25 | 0.5 |\n| train/reward |  | 2 |\n" in text and "timing" not in text
    assert '- `optim.trainable`: `[["visual/(a|b).*", "freeze"], [".*", "train"]]`\n' in text
    assert "Data: we_math (data)" in text and "someone" not in text
    assert "learning_rate" not in text and "\n\n\n" not in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("qwenla generate ")]
    given = [make_parser().parse_args(words[2:]) for words in commands]
    assert [args.reattention for args in given] == ["copy", "route"]
    assert all(args.system == OPTIONS.data.system for args in given)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code and "custom_generate" in code[1] and compile(code[1], "README.md", "exec")
    assert "custom_generate" in huggingface_hub.ModelCard(text).data.tags


def test_without_metrics_there_is_a_card(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("no JSON\nat all\n")
    for workdir in (tmp_path, tmp_path / "none"):
        assert "None could be read" in model_card(RunOptions(), workdir, 1)
