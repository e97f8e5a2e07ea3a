"""A tiny random model and random questions, for tests that need any model at all."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from qwenla_jax.config import ModelConfig, TextConfig, VisionConfig
from qwenla_jax.model.qwen_vl import Params, QwenVL, init_params
from qwenla_jax.types import PromptBatch, VisionBatch

IMAGE, VIDEO, START, END, STOP = 90, 91, 92, 93, 94
VOCAB = 96


def small_model(**changes) -> tuple[QwenVL, Params]:
    """Two layers of width 32 in float32; weights large enough that what a row sees matters."""
    vision = VisionConfig(2, 16, 24, 2, 3, 4, 2, 2, 16, (1,), 32, 2)
    text = TextConfig(VOCAB, 32, 48, 2, 4, 2, 8, 1e-6, 1e4, (2, 1, 1), tie_word_embeddings=False)
    config = ModelConfig(vision, text, IMAGE, VIDEO, START, END, initializer_range=0.3)
    config = dataclasses.replace(config, **changes)
    return QwenVL(config), init_params(config, jax.random.key(7))


def questions(rows: int, seed: int = 0, prompt: int = 16, tokens: int = 4) -> tuple[VisionBatch, PromptBatch]:
    """`rows` prompts of different lengths, each with one picture of one window of 16 patch slots (2 x 2 tokens)."""
    rng = np.random.default_rng(seed)
    vision = VisionBatch(
        patches_IxSxC=rng.normal(size=(rows, 16, 96)).astype(np.float32),
        hw_IxSx2=rng.integers(0, 4, (rows, 16, 2)).astype(np.int32),
        valid_IxS=np.ones((rows, 16), bool),
        gather_IxM=np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
    )
    length = rng.integers(tokens + 3, prompt + 1, rows).astype(np.int32)
    ids = rng.integers(0, IMAGE, (rows, prompt)).astype(np.int32)
    ids[:, 1 : 1 + tokens] = IMAGE
    visual = np.full((rows, prompt), -1, np.int32)
    visual[:, 1 : 1 + tokens] = np.arange(rows)[:, None] * tokens + np.arange(tokens)
    pos = np.tile(np.arange(prompt, dtype=np.int32)[None, :, None], (rows, 1, 3))
    return vision, PromptBatch(ids, pos, visual, length, length.copy())
