"""Loads the model that the settings name: a checkpoint folder, the embedded one, or a random model of a given shape."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts
from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig
from qwenla_jax.model.qwen_vl import Params, QwenVL, init_params
from qwenla_jax.parallel.sharding import param_shardings
from qwenla_jax.text.tokenizer import Tokenizer, train_tiny_tokenizer
from qwenla_jax.weights.hf import load
from qwenla_jax.weights.hub import local_folder


@dataclasses.dataclass(frozen=True)
class Start:
    """Model, parameters (placed by the run's shardings), tokenizer with the ten tags, and image processor.

    `shardings` are those of all of `params`.
    """

    model: QwenVL
    params: Params
    tokenizer: Tokenizer
    processor: ProcessorSettings
    shardings: Any


def tiny_config(tokenizer: Tokenizer, vocab_size: int = 512) -> ModelConfig:
    """The embedded default's architecture: Qwen2.5-VL with about a million parameters.

    paper silent: the paper's model is the 7B; this one is for machines without an accelerator.
    """
    ids = tokenizer.ids
    vision = VisionConfig(
        depth=3,
        hidden_size=64,
        intermediate_size=160,
        num_heads=4,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        full_attention_layers=(2,),
        out_hidden_size=128,
        tokens_per_second=2,
    )
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(4, 6, 6),
        tie_word_embeddings=True,
    )
    # 0.06 and not the released 0.02: at this width the smaller scale learns far more slowly.
    return ModelConfig(
        vision,
        text,
        image_token_id=ids.image_pad,
        video_token_id=ids.video_pad,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        initializer_range=0.06,
    )


def tiny_processor() -> ProcessorSettings:
    """The embedded default's image processor: images at 112 x 112 pixels unless the settings say otherwise.

    The mean is a scene's ground, not the released model's, so that an empty patch is a vector of about zeros and the
    ground does not drown the shapes.
    """
    return ProcessorSettings(
        min_pixels=112 * 112,
        max_pixels=112 * 112,
        image_mean=(0.85, 0.85, 0.85),
        image_std=(0.25, 0.25, 0.25),
    )


def compute_settings(config: InferenceConfig) -> dict[str, Any]:
    """The fields of `ModelConfig` that settings decide, not the checkpoint."""
    return {name: getattr(config, name) for name in ("dtype", "param_dtype", "remat", "attention")}


def start(config: InferenceConfig, mesh: Mesh) -> Start:
    """Builds or loads what `config.init_from` names, placed on the mesh.

    Raises:
      FileNotFoundError, ValueError: the checkpoint is missing, corrupt, or lacks what training needs; the message names
        the file and the key.
    """
    name = config.init_from or ""
    changes = compute_settings(config)
    if name == "random:tiny":
        tokenizer = train_tiny_tokenizer(tokenizer_texts())
        sizes = dataclasses.replace(tiny_config(tokenizer), **changes)
        return _placed(sizes, _random(sizes, config.seed, mesh), tokenizer, tiny_processor(), mesh)
    folder = checkpoint_folder(name, weights=not name.startswith("random:"))
    sizes = dataclasses.replace(ModelConfig.from_hf(folder), **changes)
    if name.startswith("random:"):
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder / 'tokenizer.json'}: no such file; a random model needs a tokenizer too")
        tokenizer = Tokenizer.from_folder(folder)
        processor = ProcessorSettings.from_json(folder / "preprocessor_config.json")
        tokenizer = tokenizer.with_tags()
        _check_vocabulary(folder, sizes, tokenizer)
        return _placed(sizes, _random(sizes, config.seed, mesh), tokenizer, processor, mesh)
    loaded = load(folder, shardings=param_shardings(sizes, mesh), **changes)
    for part, file in ((loaded.tokenizer, "tokenizer.json"), (loaded.processor, "preprocessor_config.json")):
        if part is None:
            raise FileNotFoundError(f"{folder / file}: no such file; training needs it")
    assert loaded.tokenizer is not None and loaded.processor is not None
    tokenizer = loaded.tokenizer.with_tags()
    _check_vocabulary(folder, sizes, tokenizer)
    return _placed(sizes, loaded.params, tokenizer, loaded.processor, mesh)


def _placed(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, processor: ProcessorSettings, mesh: Mesh
) -> Start:
    return Start(QwenVL(config), params, tokenizer, processor, param_shardings(config, mesh))


def _check_vocabulary(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer with the ten tags has {tokenizer.vocab_size} tokens, "
            f"but the embedding has only {config.text.vocab_size} rows"
        )
    if config.image_token_id != tokenizer.ids.image_pad:
        raise ValueError(
            f"{folder}: image_token_id is {config.image_token_id} in config.json, "
            f"but {tokenizer.ids.image_pad} in tokenizer.json"
        )


def _random(config: ModelConfig, seed: int, mesh: Mesh) -> Params:
    make = jax.jit(lambda key: init_params(config, key), out_shardings=param_shardings(config, mesh))
    return make(jax.random.key(seed))


def model_config(config: InferenceConfig) -> ModelConfig:
    """The sizes of the model that the settings name."""
    name = config.init_from or ""
    if name == "random:tiny":
        return tiny_config(train_tiny_tokenizer(tokenizer_texts()))
    return ModelConfig.from_hf(checkpoint_folder(name))


def checkpoint_folder(init_from: str, weights: bool = False) -> Path:
    """The folder of the files that settings name, `random:` or not; for `weights` and errors see `hub.local_folder`."""
    name = init_from.removeprefix("random:")
    return Path(name).parent if os.path.isfile(name) else local_folder(name, weights)
