"""Checkpoints of other releases of transformers, and this package's exports read by them.

    python tests/model/releases/make.py            # every release reads our exports: logits, text, chat template
    python tests/model/releases/make.py --write    # the folders beside this file, which releases_test.py reads

A release is installed beside the environment, which lends it torch and numpy. It runs this file in a process of its
own: `save FOLDER` or `read FOLDER GIVEN FOUND`.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# Releases and what they need that the environment has in another version; the last is the environment's own.
_HUB = ("huggingface-hub==0.36.0", "requests", "urllib3", "charset-normalizer", "idna", "certifi")
RELEASES = {
    "4.49.0": ("tokenizers==0.21.4", *_HUB),
    "4.53.3": ("tokenizers==0.21.4", *_HUB),
    "4.57.6": ("tokenizers==0.22.2", *_HUB),
    "5.23.0": (),
}
IMAGE, VIDEO, START, END = 60, 61, 62, 63
# Only what differs from the classes' defaults, so that a release which writes no more writes little: 4.49 leaves out
# activation, channels, frames, merging, and window and full attention where the case does not set them.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
VISION = {"depth": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 2, "out_hidden_size": 16}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tied": ({"tie_word_embeddings": True, "rms_norm_eps": 1e-6}, {"tokens_per_second": 2}, "1GB"),
    "untied_sharded": ({"rope_theta": 1e4}, {"window_size": 8, "fullatt_block_indexes": [1]}, "8KB"),
}
GRID = (4, 6)  # patches of the one image; windows of 2 x 2 tokens where they are small


def question(image: int = IMAGE, start: int = START, end: int = END) -> dict[str, np.ndarray]:
    """One question: an image of 4 x 6 patches of 2 x 2 pixels, 6 visual tokens, between words."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 60, 11)
    return {
        "ids": np.array([[*words[:2], start, *[image] * 6, end, *words[2:]]], np.int64),
        "patches": rng.standard_normal((24, 3 * 2 * 2 * 2)).astype(np.float32),
        "grid": np.array([[1, *GRID]], np.int64),
        "image": np.array(image),
    }


def conversation() -> list[dict[str, Any]]:
    """What one may give to a chat template."""
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]},
        {"role": "assistant", "content": "<SUMMARY>two</SUMMARY>"},
        {"role": "user", "content": "and now?"},
    ]


def install(version: str) -> dict[str, str]:
    """Installs a release beside the environment (or in QWENLA_RELEASES), once; returns the environment that runs it."""
    if not RELEASES[version]:
        return dict(os.environ)
    target = Path(os.environ.get("QWENLA_RELEASES", Path(sys.prefix) / "other_releases")) / version
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as fresh:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{fresh}/it"]
            subprocess.run([*pip, f"transformers=={version}", *RELEASES[version]], check=True)
            os.rename(f"{fresh}/it", target)
    return os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}


def child(version: str, *args: object) -> None:
    """Runs this file in a process in which transformers is that release."""
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, args)]
    subprocess.run(command, env=install(version), check=True)


def read_by(version: str, folder: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a release makes of a folder: "logits" [T, V], and of its tokenizer "ids", "text" and "rendered"."""
    with tempfile.TemporaryDirectory() as place:
        np.savez(f"{place}/given.npz", **given)
        child(version, "read", folder, f"{place}/given.npz", f"{place}/found.npz")
        return dict(np.load(f"{place}/found.npz"))


def export(folder: Path, tied: bool) -> dict[str, np.ndarray]:
    """An export of ours of a random model with its tokenizer, in shards where it is not tied; the question for it."""
    import jax

    import qwenla_jax
    from qwenla_jax.model.config import ModelConfig
    from qwenla_jax.model.qwen_vl import init_params
    from qwenla_jax.text.tokenizer import train_tiny_tokenizer

    tokenizer = train_tiny_tokenizer(["how many red circles are there"], 300)
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    ids = {key: tokenizer.token_to_id(f"<|{name}|>") for key, name in names.items()}
    text, vision, _ = copy.deepcopy(CASES["tied" if tied else "untied_sharded"])
    content = TEXT | text | {"vocab_size": 320} | ids | {"vision_config": VISION | vision, "model_type": "qwen2_5_vl"}
    config = ModelConfig.from_hf(content)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [rng.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in leaves])
    size = 10**9 if tied else 20_000
    qwenla_jax.save(folder, config, params, tokenizer=tokenizer, max_shard_bytes=size)
    return question(*(ids[key] for key in ("image_token_id", "vision_start_token_id", "vision_end_token_id")))


def _logits(model: Any, given: Any) -> np.ndarray:
    import torch
    import transformers

    ids = torch.from_numpy(given["ids"])
    kinds = {"mm_token_type_ids": (ids == int(given["image"])).int()}
    with torch.no_grad():
        out = model.eval()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(given["patches"]),
            image_grid_thw=torch.from_numpy(given["grid"]),
            **(kinds if transformers.__version__.startswith("5") else {}),
        )
    return out.logits[0].numpy()


def _save(folder: Path) -> None:
    """In a child: the cases as this release saves them, with its own logits."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    for name, (text, vision, shard) in CASES.items():
        # Some releases change the dicts that they are given.
        config = Qwen2_5_VLConfig(**copy.deepcopy(TEXT | text | IDS), vision_config=copy.deepcopy(VISION | vision))
        model = Qwen2_5_VLForConditionalGeneration(config).float()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for _, param in sorted(model.named_parameters()):
                param.copy_((torch.randn(param.shape, generator=generator) * 0.5).bfloat16())
        logits = _logits(model, question())  # before the type, which changes the angles too
        model.bfloat16().save_pretrained(folder / name, max_shard_size=shard)
        (folder / name / "generation_config.json").unlink()
        np.save(folder / name / "logits.npy", logits)


def _read(folder: Path, given: Any, target: Path) -> None:
    """In a child: see `read_by`."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, torch_dtype="float32"
    )
    if any(info.values()):
        raise SystemExit(f"{folder}: not all was loaded: {info}")
    result = {"logits": _logits(model, given)}
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rendered = tokenizer.apply_chat_template(conversation(), tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(rendered, add_special_tokens=False)
        result |= {"rendered": rendered, "ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)}
    np.savez(target, **result)


def main() -> None:
    """Reads our exports with every release; with --write, saves the releases' own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="save the folders anew")
    options = parser.parse_args()
    for version in RELEASES:
        if options.write:
            child(version, "save", HERE / version)
    if options.write:
        return
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        for tied in (True, False):
            folder = Path(place) / ("tied" if tied else "untied")
            given = export(folder, tied)
            result = {version: read_by(version, folder, given) for version in RELEASES}
            last = result[next(reversed(RELEASES))]
            for version, each in result.items():
                gap = float(np.abs(each["logits"] - last["logits"]).max())
                same = all(np.array_equal(each[key], last[key]) for key in ("ids", "text", "rendered"))
                print(f"{version}: {'tied' if tied else 'untied, sharded'}: logits within {gap:.2g}, same text: {same}")
                worst = max(worst, gap if same else np.inf)
    sys.exit(0 if worst < 1e-4 else "the releases differ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:
        _save(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["read"]:
        _read(Path(sys.argv[2]), np.load(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
