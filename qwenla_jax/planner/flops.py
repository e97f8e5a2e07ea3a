"""What a BRPO step costs at least: its matrix products, counted from the model's configuration.

A product of [m, k] with [k, n] is 2 m k n operations; nothing else is counted. Counted is what the algorithm needs: a
prompt once for its G responses, real tokens and patches only (no padding), a query's visible keys only, no product
twice (no remat). The backward pass is two products for each of the forward's. So the time of these operations at the
machine's matrix peak is a floor, and a rather low one.

Bytes are rough: every product reads its operands and writes its result once, as if nothing stayed in a cache and
nothing between two products were stored; attention reads queries, keys and values and writes its output.

Paper silent: the paper gives no such numbers.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Work) -> Work:
        """This without the other."""
        return Work(self.flops - other.flops, self.bytes - other.bytes)

    def __mul__(self, times: float) -> Work:
        """The same so many times."""
        return Work(self.flops * times, self.bytes * times)


def product(rows: float, inner: float, cols: float, value_bytes: int = 4) -> Work:
    """[rows, inner] times [inner, cols]; here and below, `value_bytes` is the bytes of a number."""
    return Work(2 * rows * inner * cols, value_bytes * (rows * inner + inner * cols + rows * cols))


def attention(
    pairs: float, queries: float, keys: float, heads: int, kv_heads: int, head_dim: int, value_bytes: int = 4
) -> Work:
    """Scores and weighted values over `pairs` (query, visible key), the same in every head."""
    moved = 2 * queries * heads * head_dim + 2 * keys * kv_heads * head_dim
    return Work(4 * pairs * heads * head_dim, value_bytes * moved)


def patch_embed(config: VisionConfig, patches: float, value_bytes: int = 4) -> Work:
    """The tower's first product."""
    return product(patches, config.patch_values, config.hidden_size, value_bytes)


def vision_forward(config: VisionConfig, patches_IxW: np.ndarray, value_bytes: int = 4) -> Work:
    """The tower with its merger, and those of DeepStack.

    Args:
      config: the tower.
      patches_IxW: patches in each window of each frame; their sum is a multiple of the patches of a visual token.
    """
    D, F = config.hidden_size, config.intermediate_size
    patches_IxW = np.asarray(patches_IxW, np.float64)
    n = float(patches_IxW.sum())
    inner = 2 if config.hidden_act == "silu" else 1  # gate and up
    dense = product(n, D, D, value_bytes) * 4 + product(n, D, F, value_bytes) * inner + product(n, F, D, value_bytes)
    full, depth = len(config.full_attention_layers), config.depth
    pairs = full * (patches_IxW.sum(1) ** 2).sum() + (depth - full) * (patches_IxW**2).sum()
    heads = config.num_heads, config.num_heads, config.head_dim
    attend = attention(float(pairs), n * depth, n * depth, *heads, value_bytes)
    wide = D * config.merge_patches
    tokens = n / config.merge_patches
    merge = product(tokens, wide, wide, value_bytes) + product(tokens, wide, config.out_hidden_size, value_bytes)
    merge = merge * (1 + len(config.deepstack_layers))
    return patch_embed(config, n, value_bytes) + dense * depth + attend + merge


def decoder_forward(config: TextConfig, tokens: float, pairs: float, keys: float, value_bytes: int = 4) -> Work:
    """All layers, without embedding and head.

    Args:
      config: the decoder.
      tokens: new tokens, over all rows.
      pairs: (new token, token that it sees, itself included), over all rows.
      keys: tokens whose keys and values are read; a shared prompt counts once.
    """
    D, F, n = config.hidden_size, config.intermediate_size, tokens
    queries, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = (
        product(n, D, queries, value_bytes)
        + product(n, D, shared, value_bytes) * 2
        + product(n, queries, D, value_bytes)
        + product(n, D, F, value_bytes) * 2
        + product(n, F, D, value_bytes)
        + attention(pairs, n, keys, config.num_heads, config.num_kv_heads, config.head_dim, value_bytes)
    )
    return layer * config.num_layers


def head(config: TextConfig, tokens: float, value_bytes: int = 4) -> Work:
    """Logits of so many tokens."""
    return product(tokens, config.hidden_size, config.vocab_size, value_bytes)


def decode(config: TextConfig, prompt_B: np.ndarray, response_B: np.ndarray, group: int, value_bytes: int = 4) -> Work:
    """Token by token from the prompts' ends: the layers of all response tokens but the last, which feeds no other.

    Args:
      config: the decoder.
      prompt_B, response_B: tokens of each row's prompt and response; `group` consecutive rows share a prompt.
      group: G.
    """
    total = Work()
    for done in range(1, int(response_B.max(initial=1))):
        live_B = response_B > done
        sees = float((prompt_B[live_B] + done).sum())
        shared = live_B.reshape(-1, group).any(1)
        keys = float(prompt_B[::group][shared].sum() + done * live_B.sum())
        total = total + decoder_forward(config, float(live_B.sum()), sees, keys, value_bytes)
    return total


def brpo_step_work(
    config: ModelConfig,
    patches_IxW: np.ndarray,
    prompt_Q: np.ndarray,
    response_B: np.ndarray,
    num_params: int,
    reference: bool = True,
    value_bytes: int = 4,
) -> dict[str, dict[str, Work]]:
    """The work of one BRPO step with one update, by phase and part.

    Args:
      config: the model.
      patches_IxW: see `vision_forward`; every image of the step once.
      prompt_Q: tokens of each prompt, visual tokens included.
      response_B: tokens of each response, stop token included; B is a multiple of Q.
      num_params: trained numbers, for AdamW's traffic (parameter, gradient and two moments read, three written).
      reference: whether there is a KL term.

    Returns:
      {"rollout": {part: Work}, "update": {part: Work}}.

    Raises:
      ValueError: B is no multiple of Q, or a length is below 1.
    """
    prompt_Q, response_B = np.asarray(prompt_Q, np.int64), np.asarray(response_B, np.int64)
    if len(response_B) % len(prompt_Q):
        raise ValueError(f"{len(response_B)} responses are no multiple of {len(prompt_Q)} prompts")
    if min(prompt_Q.min(), response_B.min()) < 1:
        raise ValueError("every prompt and response needs at least one token")
    text, group = config.text, len(response_B) // len(prompt_Q)
    prompt_B = np.repeat(prompt_Q, group)
    prompts, sampled = float(prompt_Q.sum()), float(response_B.sum())
    see = vision_forward(config.vision, patches_IxW, value_bytes)
    prefill = decoder_forward(text, prompts, float((prompt_Q * (prompt_Q + 1) // 2).sum()), prompts, value_bytes)
    inner_B = response_B - 1
    pairs = float((inner_B * prompt_B + inner_B * (inner_B + 1) // 2).sum())
    respond = decoder_forward(text, float(inner_B.sum()), pairs, prompts + float(inner_B.sum()), value_bytes)
    forward = see + prefill + respond + head(text, sampled, value_bytes)
    # Of the first product's two gradients only the weights' is needed: nothing trains the pixels.
    pixels = patch_embed(config.vision, float(np.sum(patches_IxW)), value_bytes)
    steps = int(response_B.max())
    # A head's product a token: its weights are read anew every time. The first is the prompts', before they part.
    heads = [head(text, float((response_B > done).sum()), value_bytes) for done in range(1, steps)]
    update = {"reference forward": forward} if reference else {}
    return {
        "rollout": {
            "vision tower": see,
            "prompt prefill": prefill,
            "decoding, layers": decode(text, prompt_B, response_B, group, value_bytes),
            "decoding, head": sum(heads, head(text, float(len(prompt_Q)), value_bytes)),
        },
        "update": update
        | {
            "policy forward": forward,
            "policy backward": forward * 2 - pixels,
            "AdamW": Work(0.0, 7.0 * num_params * value_bytes),
        },
    }
