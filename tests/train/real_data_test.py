"""BRPO from end to end on published questions with the released tokenizer; only the model is small and random."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_faults import open_dataset

from qwenla_jax.data.sources.factory import make_source

ROOT = Path(__file__).resolve().parents[2]
DATASETS = {"we_math": 2, "mathvision": 2, "scemqa": 1}


@pytest.fixture(scope="module")
def checkpoint(shared_data, tmp_path_factory):
    """The 3B's config.json with few and narrow layers, its whole vocabulary, and the released small files."""
    folder = tmp_path_factory.mktemp("small")
    config = json.loads((shared_data / "configs" / "qwen2_5_vl_3b.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config["vision_config"] |= {"out_hidden_size": 64, "fullatt_block_indexes": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(shared_data / "configs" / "preprocessor_config.json", folder)
    for file in (shared_data / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def line(checkpoint, shared_data):
    source = ",".join(f"{name}:{shared_data / name}*{weight}" for name, weight in DATASETS.items())
    settings = {
        "init_from": f"random:{checkpoint}",
        "data.source": source,
        "dtype": "float32",
        "steps": 2,
        "data.batch_size": 5,
        "optim.accumulation": 1,
        "brpo.group_size": 2,
        "data.min_pixels": 112 * 112,
        "data.max_pixels": 112 * 112,
        "data.max_prompt_tokens": 384,
        "data.max_response_tokens": 16,
        "data.threads": 1,
        "eval.final_size": 4,
        "eval.batch_size": 4,
        "eval.attention": False,
        "checkpoint.every": 0,
        "log.completions_every": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "launch/train.py", "--config=configs/brpo.py:3b", *flags]


def launch(line, *args):
    return subprocess.run([*line, *args], capture_output=True, text=True, cwd=ROOT, timeout=600)


@pytest.mark.slow
def test_a_run_on_real_questions(line, shared_data, tmp_path):
    done = launch(line, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert "warning: 1 images of 42 of scemqa are in scemqa: Biology/4" in done.stdout
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "train/reward" in row]
    assert [row["step"] for row in train] == [1, 2]
    for row in train:
        # A random model does not keep the format; what it earns is what the rules give to that.
        assert row["train/reward"] == pytest.approx(
            sum(row[f"train/rewards/{name}/mean"] for name in ("format", "accuracy", "balance"))
        )
        assert row["train/rewards/format/mean"] == 0 and 0 < row["train/completions/mean_length"] <= 16
        assert abs(row["train/ratio_mean"] - 1) < 1e-4 and row["train/data/invalid"] >= 0
    questions = {}
    for name in DATASETS:
        dataset = open_dataset(f"{name}:{shared_data / name}")
        questions |= {f"{name}/{dataset.raw_record(i).id}": dataset.raw_record(i) for i in range(len(dataset))}
    asked = json.loads((tmp_path / "evaluations" / "step_000002.json").read_text())["ids"]
    assert len(set(asked)) == 4 and set(asked) <= set(questions)
    page = (tmp_path / "completions" / "step_000001.html").read_text()
    shown = [entry for entry in questions.values() if entry.question[:30] in page]
    assert shown and any(entry.answer in page for entry in shown)


@pytest.mark.slow
def test_the_check_of_its_data(line, shared_data, tmp_path):
    result = launch(line, f"--workdir={tmp_path}", "--check_data")
    lines = result.stdout.splitlines()
    # Samples of 50, 160 and 48 questions, all readable; none is too long for this run.
    for size, text in zip((50, 160, 48), [row for row in lines if row.startswith("training") and "records, of" in row],
                          strict=True):  # fmt: skip
        assert f": {size} records, of them" in text
    # Two of SceMQA's questions have one image, and a hash of their ids puts them on different sides.
    assert twins(shared_data) == [("Biology/4", "Biology/3")]
    assert "by file, 1 pairs: Biology/4 = Biology/3" in result.stdout
    assert lines[-1] == "0 invalid records, 1 leaked images"
    assert result.returncode == 1, result.stderr


def twins(shared_data):
    """Pairs of (trained, held out) questions of SceMQA with files of the same bytes, found with plain hashes."""
    sides = []
    for split in ("train", "held_out"):
        source = make_source(f"scemqa:{shared_data / 'scemqa'}", split, seed=0)
        entries = [source.raw_record(i) for i in range(len(source))]
        sides.append([(e.id, hashlib.sha256(e.images[0].path.read_bytes()).hexdigest()) for e in entries])
    return [(a, b) for a, one in sides[0] for b, other in sides[1] if one == other]
