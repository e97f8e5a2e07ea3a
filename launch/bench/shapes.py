"""Shapes of `launch/bench/model.py`: the models, their inputs, and the least work that each row of its table takes.

Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.data.batching.example import ImageLayout
from qwenla_jax.data.images.preprocess import frame_index
from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig
from qwenla_jax.model.qwen_vl import init_params
from qwenla_jax.planner.flops import Work, decode, decoder_forward, head, patch_embed, product, vision_forward
from qwenla_jax.planner.published import published_config
from qwenla_jax.types import VisionBatch

STOP = 0  # no prompt holds it, and it is never sampled
RANK = 16  # of the adapters


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is measured: the model, an image of rows x cols visual tokens, and lengths in tokens."""

    config: ModelConfig
    grid: tuple[int, int]
    prompt: int
    response: int
    train_rows: int
    decode_rows: tuple[int, ...]
    new_tokens: int


def shape_of(suite: str, small: bool, dtype: str) -> Shape:
    """The shapes of a suite; `dtype` is computed in and kept."""
    ids = (1, 2, 3, 4)
    if small:
        vision = VisionConfig(2, 32, 64, 2, 3, 14, 2, 2, 112, (1,), 64, 2)
        text = TextConfig(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e6, (2, 3, 3), tie_word_embeddings=False)
        shape = Shape(ModelConfig(vision, text, *ids), (3, 5), 24, 8, 2, (2,), 8)
    elif suite == "gpu":
        shape = Shape(published_config("7b"), (16, 20), 512, 512, 1, (1, 8, 32, 64), 256)
    else:
        vision = VisionConfig(8, 384, 1024, 6, 3, 14, 2, 2, 112, (3, 7), 768, 2)
        text = TextConfig(8192, 768, 2560, 12, 12, 4, 64, 1e-6, 1e6, (8, 12, 12), tie_word_embeddings=False)
        shape = Shape(ModelConfig(vision, text, *ids), (12, 16), 256, 256, 2, (1, 8), 64)
    return dataclasses.replace(
        shape, config=dataclasses.replace(shape.config, dtype=dtype, param_dtype=dtype, remat="dots")
    )


def make_image(shape: Shape) -> tuple[VisionBatch, np.ndarray]:
    """One random image: ours, and its patches in transformers' order (by visual token, then within it)."""
    v, (rows, cols) = shape.config.vision, shape.grid
    layout = ImageLayout(v.patch_size, v.spatial_merge_size, v.temporal_patch_size, v.window_size)
    _, slot_N, hw_Sx2, valid_S, gather_M = frame_index(rows, cols, layout)
    patches = np.random.default_rng(0).normal(size=(len(slot_N), v.patch_values)).astype(np.float32)
    m = v.spatial_merge_size
    h_N, w_N = hw_Sx2[slot_N].T
    ours = np.zeros((len(valid_S), v.patch_values), np.float32)
    ours[slot_N] = patches[(h_N // m * cols + w_N // m) * m * m + h_N % m * m + w_N % m]
    return VisionBatch(ours[None], hw_Sx2[None], valid_S[None], gather_M[None]), patches


def tokens_of(shape: Shape) -> np.ndarray:
    """int32 [prompt + response]: start, the image, end, and random text; no stop token."""
    c, (rows, cols) = shape.config, shape.grid
    special = (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id, STOP)
    free = np.setdiff1d(np.arange(c.text.vocab_size), special)
    ids = np.random.default_rng(1).choice(free, shape.prompt + shape.response).astype(np.int32)
    image = [c.vision_start_token_id, *[c.image_token_id] * (rows * cols), c.vision_end_token_id]
    ids[2 : 2 + len(image)] = image
    return ids


def floors(shape: Shape) -> dict[str, tuple[float, float]]:
    """Operations, and bytes that cannot be avoided, of each row of the table.

    Bytes: the weights that the work uses once a pass (twice and the gradients' writing once in training, where they
    have any), and in decoding, at each token, the layers' and the head's weights and the keys and values seen.
    """
    c, t = shape.config, shape.config.text
    size = jnp.dtype(c.dtype).itemsize
    _, slot_N, _, valid_S, _ = frame_index(*shape.grid, ImageLayout(window_size=c.vision.window_size))
    patches_IxW = valid_S.reshape(1, -1, c.vision.window_slots).sum(-1)
    tower = vision_forward(c.vision, patches_IxW)
    P, T = shape.prompt, shape.prompt + shape.response
    layers = lambda n: decoder_forward(t, n, n * (n + 1) / 2, n)  # noqa: E731
    params = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    weights, vision = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, params["visual"]))
    embedding = t.vocab_size * t.hidden_size
    read = (weights - embedding) * size
    B = shape.train_rows
    forward = (tower + layers(T) + head(t, shape.response)).flops * B
    pixels = patch_embed(c.vision, len(slot_N)).flops * B
    frozen = (layers(T) + head(t, shape.response)).flops * B
    D, F, N, K = t.hidden_size, t.intermediate_size, t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    sides = [(D, N), (D, K), (D, K), (N, D), (D, F), (D, F), (F, D)]
    low = sum((product(T, i, RANK) + product(T, RANK, o) for i, o in sides), Work()).flops * B * t.num_layers
    first = (product(T, D, N + 2 * K) + product(T, D, RANK) * 3).flops * B
    result = {
        "train": (3 * forward - pixels, 3.0 * read),
        # The base gets no gradient: one product backward, of the tower none, and of the first layer none that leads to
        # its own input alone. The attention's backward stays whole.
        "train, LoRA": (forward + frozen + 4.0 * B * T * (T + 1) / 2 * N * t.num_layers + 3 * low - first, 2.0 * read),
    }
    cache = 2.0 * K * t.num_layers * size
    for B in shape.decode_rows:
        lengths = np.full(B, shape.prompt), np.full(B, shape.new_tokens)
        prefill = ((tower + layers(P) + head(t, 1)).flops * B, read + cache * P * B)
        steps = shape.new_tokens - 1
        flops = decode(t, *lengths, 1).flops + head(t, B * steps).flops
        seen = cache * B * (P * steps + steps * (steps + 1) / 2)
        moved = steps * (read - vision * size) + seen
        result |= {f"prefill, batch {B}": prefill, f"decode, batch {B}": (flops, moved)}
    return result
