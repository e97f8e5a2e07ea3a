"""A checkpoint that reflects whenever it would conclude: the embedded one with another output matrix."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qwenla_jax
from qwenla_jax.data.scenes import make_scene

TINY = Path(qwenla_jax.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="session")
def reflecting(tmp_path_factory):
    """Its folder; transformers loads it too."""
    loaded = qwenla_jax.load(TINY, dtype="float32")
    head = np.array(loaded.params["decoder"]["embed"]["embedding"]).T
    tags = loaded.tokenizer.ids.tags
    head[:, tags["<REFLECTION>"]] = 1.1 * head[:, tags["<CONCLUSION>"]]
    config = dataclasses.replace(loaded.config, text=dataclasses.replace(loaded.config.text, tie_word_embeddings=False))
    params = loaded.params | {"decoder": loaded.params["decoder"] | {"lm_head": {"kernel": head}}}
    folder = tmp_path_factory.mktemp("reflecting") / "hf"
    return qwenla_jax.save(folder, config, params, tokenizer=loaded.tokenizer, processor=loaded.processor)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A square scene, and a strip of one and a half: 4 x 4 and 3 x 4 visual tokens or so. Files, then pictures."""
    square = make_scene(7, 5, 0).image
    strip = Image.new("RGB", (168, 112), (217, 217, 217))
    strip.paste(make_scene(7, 5, 1).image, (50, 0))
    folder = tmp_path_factory.mktemp("pictures")
    square.save(folder / "square.png")
    strip.save(folder / "strip.png")
    return folder / "square.png", folder / "strip.png"
