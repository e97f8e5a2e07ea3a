"""A tiny random model and random questions, for tests that need any model at all."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.batching.reinsertion import reinserted_images
from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig
from qwenla_jax.model.qwen_vl import Params, QwenVL, init_params
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.slots import SlotPrograms
from qwenla_jax.types import PromptBatch, ReinsertedImages, VisionBatch
from qwenla_jax.utils.compiler_options import accepted

IMAGE, VIDEO, START, END, STOP = 90, 91, 92, 93, 94
VOCAB = 96
# Two ordinary tokens stand for <REFLECTION> and </REFLECTION>.
OPEN, CLOSE = 88, 89
GRIDS = ((2, 2), (1, 3), (3, 1), (1, 4), (2, 1))


# `QWENLA_FAMILY=qwen3_vl` runs the tests of the small model with the other family.
FAMILY = os.environ.get("QWENLA_FAMILY", "qwen2_5_vl")


def small_config(family: str = FAMILY, **changes) -> ModelConfig:
    """Two layers of width 32 in float32; weights large enough that what a row sees matters."""
    vision = VisionConfig(2, 16, 24, 2, 3, 4, 2, 2, 16, (1,), 32, 2)
    text = TextConfig(VOCAB, 32, 48, 2, 4, 2, 8, 1e-6, 1e4, (2, 1, 1), tie_word_embeddings=False)
    config = ModelConfig(vision, text, IMAGE, VIDEO, START, END, initializer_range=0.3)
    if family == "qwen3_vl":  # without windows; features of the first layer of the tower; heads wider than the model
        tower = {"window_size": 8, "full_attention_layers": (0, 1), "tokens_per_second": 0}
        tower |= {"hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 25, "deepstack_layers": (0,)}
        vision = dataclasses.replace(vision, **tower)
        text = dataclasses.replace(text, head_dim=12, mrope_section=(2, 2, 2))
        config = dataclasses.replace(config, vision=vision, text=text, model_type=family)
    return dataclasses.replace(config, **changes)


def small_model(**changes) -> tuple[QwenVL, Params]:
    """A model of `small_config(**changes)`, and random parameters, the caller's own to change or donate."""
    config = small_config(**changes)
    return QwenVL(config), jax.tree.map(jnp.copy, _parameters(config))


@functools.cache
def _parameters(config: ModelConfig) -> Params:
    # One program: initialization runs the whole model, which takes some 190 programs where each operation is its own.
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(7))


def questions(rows: int, seed: int = 0, prompt: int = 16, tokens: int = 4) -> tuple[VisionBatch, PromptBatch]:
    """`rows` prompts of different lengths, each with one image of one window of 16 patch slots (2 x 2 tokens)."""
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


def looking_questions(
    rows: int, seed: int = 0, prompt: int = 24, images: int = 2, block: ReattentionOptions | None = None
) -> tuple[VisionBatch, PromptBatch, list[list[tuple[int, int]]]]:
    """Prompts with their `block`, in the layout of real ones, and the grids of each prompt's images.

    Rows have 1 to `images` images in turn, of odd shapes, between delimiters; the fourth row has none. The vision
    batch has `rows * images` frames, of which some belong to nobody.
    """
    block = block or ReattentionOptions()
    rng = np.random.default_rng([71, seed])
    frames, tokens = rows * images, 4
    vision = VisionBatch(
        patches_IxSxC=rng.normal(size=(frames, 16, 96)).astype(np.float32),
        hw_IxSx2=rng.integers(0, 4, (frames, 16, 2)).astype(np.int32),
        valid_IxS=np.ones((frames, 16), bool),
        gather_IxM=np.tile(np.arange(tokens, dtype=np.int32), (frames, 1)),
    )
    ids = rng.integers(0, OPEN, (rows, prompt)).astype(np.int32)
    visual = np.full((rows, prompt), -1, np.int32)
    pos = np.zeros((rows, prompt, 3), np.int32)
    length, next_pos = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    X = block.slots(images, tokens)
    shown = ReinsertedImages(
        np.full((rows, X), -1, np.int32),
        np.zeros((rows, X, 3), np.int32),
        np.zeros((rows, X), np.int32),
        np.zeros(rows, np.int32),
        np.zeros(rows, np.int32),
        np.zeros((rows, images), np.int32),
    )
    grids = []
    for q in range(rows):
        own = [GRIDS[i] for i in rng.integers(0, len(GRIDS), 0 if q == 3 else 1 + q % images)]
        at = int(rng.integers(0, 3))
        for number, (r, c) in enumerate(own):
            ids[q, at], ids[q, at + 1 : at + 1 + r * c], ids[q, at + 1 + r * c] = START, IMAGE, END
            visual[q, at + 1 : at + 1 + r * c] = (q * images + number) * tokens + np.arange(r * c)
            at += r * c + 2 + int(rng.integers(0, 2))
        n = length[q] = int(rng.integers(at + 1, prompt + 1))
        pos[q, :n], next_pos[q] = visual_positions(ids[q, :n], IMAGE, -1, own, 1)
        source, own_pos, moves, shown.span_Q[q] = reinserted_images(visual[q, :n], pos[q, :n], own, block)
        x = shown.length_Q[q] = len(source)
        shown.source_QxX[q, :x], shown.pos_QxXx3[q, :x], shown.moves_QxX[q, :x] = source, own_pos, moves
        shown.tokens_QxN[q, : len(own)] = [r * c for r, c in own]
        grids.append(own)
    return vision, PromptBatch(ids, pos, visual, length, next_pos, shown), grids


# How XLA compiles by itself, where the tests' faster way (conftest.py) is another: programs for other numbers of rows
# then round alike, within 1e-6. Releases without the option have no other way.
ROUND_ALIKE = {"xla_cpu_use_fusion_emitters": True, "xla_backend_optimization_level": 3}


@functools.cache
def round_alike(programs: SlotPrograms) -> SlotPrograms:
    """The same programs, compiled so."""
    options = accepted(ROUND_ALIKE)
    return SlotPrograms(*(jax.jit(program.__wrapped__, compiler_options=options) for program in programs))


def sampler_of(model: QwenVL, options: SampleOptions, rounds_alike: bool = False):
    """A function (params, vision, prompts, bias, seed, step, sample numbers) -> the batch's `Rollout`, by an engine.

    Its buckets are the batch's own sizes.
    """

    def run(params, vision, prompts, bias_V, seed, step, sample_B):
        (Q, P), block = prompts.ids_QxP.shape, prompts.block
        (I, S, C), M = vision.patches_IxSxC.shape, vision.gather_IxM.shape[1]
        images = 1 if block is None else block.tokens_QxN.shape[1]
        buckets = Buckets((I,), (S,), (M,), (P,), (2 * P,), images, C)
        engine = Engine(model, params, options, buckets, Q, np.asarray(bias_V), questions=Q)
        if rounds_alike:
            engine._programs = round_alike(engine._programs)
        request = Request(
            vision, prompts, np.asarray(sample_B), None, int(seed), int(step), options.temperature, options.top_p
        )
        parts = {question: rollout for _, question, rollout in engine.run([request])}
        whole = jax.tree.map(lambda *x: np.concatenate(x), *(parts[q] for q in range(Q)))
        slots = block.source_QxX.shape[1] if options.reattention.inserts else 0
        return whole.replace(selected_BxExX=whole.selected_BxExX[:, :, :slots])

    return run
