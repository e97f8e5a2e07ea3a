"""Checkpoints as releases of transformers saved them, with that release's own logits; and our exports read by one.

The folders under `releases/` were saved by the release that they are named after; `releases/make.py` made them, and has
every release read our exports.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwenla_jax
from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.images.preprocess import frame_index
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.types import VisionBatch
from qwenla_jax.weights import convert

HERE = Path(__file__).parent / "releases"
FOLDERS = sorted(path.parent for path in HERE.glob("*/*/config.json"))
OLD = "4.49.0"  # the release that the suite installs: the first with Qwen2.5-VL


def _script():
    spec = importlib.util.spec_from_file_location("releases_make", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _script()


def logits(checkpoint, given):
    """Of the one question, [T, V]; patches come token by token, as transformers' processor has them."""
    config = checkpoint.config
    rows, cols = (side // 2 for side in make.GRID)
    _, _, hw_Sx2, valid_S, gather_M = frame_index(rows, cols, layout_of(config))
    slots = (gather_M[:, None] * 4 + np.arange(4)).reshape(-1)
    patches_SxC = np.zeros((len(valid_S), given["patches"].shape[1]), np.float32)
    patches_SxC[slots] = given["patches"]
    vision = VisionBatch(patches_SxC[None], hw_Sx2[None], valid_S[None], gather_M[None])
    ids = given["ids"].astype(np.int32)
    pos, _ = visual_positions(ids[0].tolist(), int(given["image"]), -1, [(rows, cols)], 1)
    visual = np.full(ids.shape, -1, np.int32)
    visual[ids == given["image"]] = np.arange(rows * cols)

    @jax.jit
    def run(params):
        hidden = checkpoint.model.apply({"params": params}, vision, ids, np.asarray(pos, np.int32)[None], visual)
        return logits_of(params, hidden)

    return np.asarray(run(checkpoint.params))[0]


def same_logits(result, wanted):
    np.testing.assert_allclose(result, wanted, atol=1e-4, rtol=0)


def test_all_are_here():
    assert [f"{path.parent.name}/{path.name}" for path in FOLDERS] == [
        f"{version}/{case}" for version in make.RELEASES for case in make.CASES
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_each_release_saved(folder, tmp_path):
    loaded = qwenla_jax.load(folder, dtype="float32")
    assert loaded.config.text.tie_word_embeddings == (folder.name == "tied")
    same_logits(logits(loaded, make.question()), np.load(folder / "logits.npy"))
    # Our own export, and the same through Orbax and back.
    qwenla_jax.save(tmp_path / "ours", loaded.model, loaded.params)
    assert ModelConfig.from_hf(tmp_path / "ours") == loaded.config
    convert.from_hf(convert.plan_from_hf(folder), tmp_path / "orbax")
    again = qwenla_jax.load(tmp_path / "orbax", dtype="float32")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_tie_inside_and_none_outside(tmp_path):
    """With a head of its own in the weights it is untied, as transformers computes it; without one it is tied."""
    for case in make.CASES:
        folder = tmp_path / case
        shutil.copytree(HERE / "4.57.6" / case, folder)
        content = json.loads((folder / "config.json").read_text())
        content["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
        same_logits(logits(qwenla_jax.load(folder, dtype="float32"), make.question()), np.load(folder / "logits.npy"))
        convert.from_hf(convert.plan_from_hf(folder), tmp_path / f"{case}-orbax")
        for each in (folder, tmp_path / f"{case}-orbax"):
            assert ModelConfig.from_hf(each).text.tie_word_embeddings == (case == "tied")
    tensors = load_file(folder / "model-00001-of-00003.safetensors")  # in one file too
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    assert not ModelConfig.from_hf(folder).text.tie_word_embeddings
    same_logits(logits(qwenla_jax.load(folder, dtype="float32"), make.question()), np.load(folder / "logits.npy"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied_sharded"])
def test_an_old_release_reads_our_export(tied, tmp_path):
    """Installed beside the environment; the newest, which is in it, reads the same: `releases/make.py` has them all."""
    given = make.export(tmp_path / "export", tied)
    result = make.read_by(OLD, tmp_path / "export", given)
    loaded = qwenla_jax.load(tmp_path / "export")
    same_logits(logits(loaded, given), result["logits"])
    assert result["ids"].tolist() == loaded.tokenizer.encode(str(result["rendered"]))
    assert "<SUMMARY>two</SUMMARY>" in str(result["text"]) and "<|" not in str(result["text"])
    assert "transformers" not in sys.modules or sys.modules["transformers"].__version__ != OLD
