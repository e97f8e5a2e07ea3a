"""The oracle of the parity tests: small random models of transformers, and inputs for both sides.

Every weight is random, norms and biases too, and drawn at a scale at which attention is far from uniform: with a fresh
model's weights most mistakes would not be seen.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings, image_to_patches
from qwenla_jax.types import PromptBatch, VisionBatch

CONTINUATION = 64
# Rows of (rows, columns) grids of visual tokens; one inner list a prompt.
CASES = {
    "odd grid": [[(3, 5)]],
    "single token": [[(1, 1)]],
    "partial windows": [[(5, 6)]],
    "whole windows": [[(4, 8)]],
    "two images": [[(3, 2), (2, 5)]],
    "padded batch": [[(2, 3)], [(5, 1), (2, 2)], [(3, 4)]],
    "wide": [[(1, 9)]],
    "one without an image": [[(4, 3)], []],
}


# Seeds whose heads, patches and windows are those of the released models: one untied, one tied.
RELEASED = (5, 12)
AS_RELEASED = {
    "head_dim": 128,
    "mrope": (16, 24, 24),
    "theta": 1e6,
    "eps": 1e-6,
    "vision_head_dim": 80,
    "patch": 14,
    "temporal": 2,
    "window": 4,
}


# Seeds from here on are Qwen3-VL's; the first has heads and patches of the released models.
QWEN3 = 100
AS_RELEASED_3 = {
    "head_dim": 128,
    "mrope": (24, 20, 20),
    "theta": 5e6,
    "eps": 1e-6,
    "vision_head_dim": 64,
    "patch": 16,
    "temporal": 2,
    "side": 48,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes of one random model. Of Qwen2.5-VL, H of the text is hidden_size / num_heads."""

    seed: int
    case: str
    tied: bool
    kv_heads: int
    group: int
    head_dim: int
    mrope: tuple[int, int, int]
    text_layers: int
    text_ff: int
    vocab: int
    theta: float
    eps: float
    vision_depth: int
    vision_heads: int
    vision_head_dim: int
    vision_ff: int
    patch: int
    temporal: int
    window: int  # in visual tokens
    full: tuple[int, ...]
    # Qwen3-VL alone; its window is one visual token.
    width: int = 0
    side: int = 0  # of the grid of learned positions
    deepstack: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.seed}-{self.case.replace(' ', '_')}-kv{self.kv_heads}-{'tied' if self.tied else 'untied'}"


def architecture(seed: int) -> Architecture:
    """A random architecture; KV heads, tying and the kind of input take turns so that all are covered."""
    rng = np.random.default_rng([2305, seed])
    kv = seed % 4 + 1
    head_dim = int(rng.choice([4, 8, 16] if kv < 4 else [4, 8]))
    cut = sorted(rng.integers(0, head_dim // 2 + 1, 2).tolist())
    depth = int(rng.integers(2, 4))
    arch = Architecture(
        seed=seed,
        case=list(CASES)[(seed + seed // 8) % len(CASES)],
        tied=bool((seed // 4 + seed) % 2),
        kv_heads=kv,
        group=int(rng.integers(1, 4 if kv < 3 else 3)),
        head_dim=head_dim,
        mrope=(cut[0], cut[1] - cut[0], head_dim // 2 - cut[1]),
        text_layers=int(rng.integers(2, 4)),
        text_ff=int(rng.integers(20, 70)),
        vocab=int(rng.integers(150, 260)),
        theta=float(rng.choice([1e3, 1e4, 1e6])),
        eps=float(rng.choice([1e-6, 1e-5])),
        vision_depth=depth,
        vision_heads=int(rng.integers(1, 5)),
        vision_head_dim=int(rng.choice([4, 8, 12])),
        vision_ff=int(rng.integers(20, 60)),
        patch=int(rng.choice([2, 4, 14])),
        temporal=int(rng.choice([1, 2])),
        window=int(rng.choice([2, 3, 4])),
        full=tuple(sorted(rng.choice(depth, int(rng.integers(0, depth + 1)), replace=False).tolist())),
    )
    if seed >= QWEN3:
        return _qwen3(arch, rng)
    return dataclasses.replace(arch, **AS_RELEASED) if seed in RELEASED else arch


def _qwen3(arch: Architecture, rng: np.random.Generator) -> Architecture:
    """The same with what Qwen3-VL has; features of one to three layers of the tower, fewer than the decoder's layers:
    what is added after the last one reaches no text."""
    head_dim, depth = int(rng.choice([8, 12, 16])), int(rng.integers(3, 5))
    rows, cols = rng.integers(1, head_dim // 6 + 1, 2).tolist()
    features = int(rng.integers(1, min(depth, arch.text_layers) + 1))
    changes = {
        "head_dim": head_dim,
        "mrope": (head_dim // 2 - rows - cols, rows, cols),
        "vision_depth": depth,
        "text_layers": arch.text_layers + 1,
        "window": 1,
        "full": (),
        "width": int(rng.integers(2, 9)) * 4,
        "side": int(rng.integers(2, 9)),
        "deepstack": tuple(sorted(rng.choice(depth, features, replace=False).tolist())),
    }
    return dataclasses.replace(arch, **(changes | (AS_RELEASED_3 if arch.seed == QWEN3 else {})))


def build(arch: Architecture) -> Any:
    """The transformers model, float32, in evaluation mode."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    width = arch.width or arch.kv_heads * arch.group * arch.head_dim
    config = (transformers.Qwen3VLConfig if arch.width else transformers.Qwen2_5_VLConfig)(
        text_config={
            "vocab_size": arch.vocab,
            "hidden_size": width,
            **({"head_dim": arch.head_dim} if arch.width else {}),
            "intermediate_size": arch.text_ff,
            "num_hidden_layers": arch.text_layers,
            "num_attention_heads": arch.kv_heads * arch.group,
            "num_key_value_heads": arch.kv_heads,
            "rms_norm_eps": arch.eps,
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                "mrope_section": list(arch.mrope),
                "rope_theta": arch.theta,
            },
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": arch.vision_depth,
            "hidden_size": arch.vision_heads * arch.vision_head_dim,
            "intermediate_size": arch.vision_ff,
            "num_heads": arch.vision_heads,
            "patch_size": arch.patch,
            "temporal_patch_size": arch.temporal,
            "out_hidden_size": width,
            **(
                {"num_position_embeddings": arch.side**2, "deepstack_visual_indexes": list(arch.deepstack)}
                if arch.width
                else {
                    "window_size": arch.window * arch.patch * 2,
                    "fullatt_block_indexes": list(arch.full),
                    "tokens_per_second": 2,
                }
            ),
        },
        image_token_id=arch.vocab - 1,
        video_token_id=arch.vocab - 2,
        vision_start_token_id=arch.vocab - 3,
        vision_end_token_id=arch.vocab - 4,
        tie_word_embeddings=arch.tied,
    )
    family = transformers.Qwen3VLForConditionalGeneration if arch.width else None
    model = (family or transformers.Qwen2_5_VLForConditionalGeneration)(config).float().eval()
    rng = np.random.default_rng([2306, arch.seed])
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            param.copy_(torch.from_numpy(_sample_groups(rng, name, tuple(param.shape), arch.tied)))
    return model


def _sample_groups(rng: np.random.Generator, name: str, shape: tuple[int, ...], tied: bool) -> np.ndarray:
    normal = rng.standard_normal(shape)
    if name.endswith(
        ("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight", "ln_q.weight", "_norm.weight")
    ):
        value = 1 + 0.3 * normal
    elif name.endswith("bias"):
        value = 0.4 * normal
    elif "embed_tokens" in name:
        value = normal * (shape[1] ** -0.5 if tied else 1.0)  # a tied embedding is the head too
    else:
        gain = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
        value = gain * normal * np.prod(shape[1:]) ** -0.5
    return value.astype(np.float32)


def settings(arch: Architecture) -> ProcessorSettings:
    """Image processor settings under which an image keeps its size."""
    return ProcessorSettings(
        min_pixels=1,
        max_pixels=10**7,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        patch_size=arch.patch,
        temporal_patch_size=arch.temporal,
    )


def random_images(arch: Architecture, grids: list[tuple[int, int]], rng: np.random.Generator) -> list[Image.Image]:
    """Coarse random images, one a grid: neighbouring pixels are alike, as in photographs."""
    side, out = arch.patch * 2, []
    for rows, cols in grids:
        coarse = rng.integers(0, 256, (rows * 3, cols * 3, 3), dtype=np.uint8)
        out.append(Image.fromarray(coarse).resize((cols * side, rows * side), Image.Resampling.BICUBIC))
    return out


def inputs(arch: Architecture, extra_slots: int = 1) -> SimpleNamespace:
    """One batch for both sides.

    Args:
      arch: the model.
      extra_slots: empty windows and frames added to our vision batch, as a bucket would add them.

    Returns:
      `hf`: what transformers' model takes (rows padded on the left); `vision` and `prompts`: ours (padded on the
      right); `length_Q`; `grids`: (rows, cols) of all images in order.
    """
    torch = pytest.importorskip("torch")
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng([2307, arch.seed])
    image, start, end = arch.vocab - 1, arch.vocab - 3, arch.vocab - 4
    config = settings(arch)
    layout = ImageLayout(arch.patch, 2, arch.temporal, arch.window * arch.patch * 2)
    rows_ids, rows_grids, images = [], [], []
    for grids in CASES[arch.case]:
        ids = rng.integers(0, arch.vocab - 4, int(rng.integers(2, 6))).tolist()
        for r, c in grids:
            ids += [start, *[image] * (r * c), end, *rng.integers(0, arch.vocab - 4, int(rng.integers(1, 5))).tolist()]
        rows_ids.append(ids + rng.integers(0, arch.vocab - 4, 3).tolist())
        rows_grids.append(grids)
        images += random_images(arch, grids, rng)
    frames = [image_to_patches(img, config, layout) for img in images]
    S = max(len(f.valid_S) for f in frames) + extra_slots * layout.window_slots
    M = max(f.num_visual_tokens for f in frames) + extra_slots
    count, values = len(frames) + extra_slots, frames[0].patches_SxC.shape[1]
    vision = VisionBatch(
        np.zeros((count, S, values), np.float32),
        np.zeros((count, S, 2), np.int32),
        np.zeros((count, S), bool),
        np.zeros((count, M), np.int32),
    )
    for i, frame in enumerate(frames):
        n = len(frame.valid_S)
        vision.patches_IxSxC[i, :n] = frame.patches_SxC
        vision.hw_IxSx2[i, :n] = frame.hw_Sx2
        vision.valid_IxS[i, :n] = frame.valid_S
        vision.gather_IxM[i, : frame.num_visual_tokens] = frame.gather_M
    Q, P = len(rows_ids), max(map(len, rows_ids))
    prompts = PromptBatch(
        np.zeros((Q, P), np.int32),
        np.zeros((Q, P, 3), np.int32),
        np.full((Q, P), -1, np.int32),
        np.array([len(ids) for ids in rows_ids], np.int32),
        np.zeros(Q, np.int32),
    )
    hf_ids, hf_mask = np.zeros((Q, P), np.int64), np.zeros((Q, P), np.int64)
    first = 0
    for q, (ids, grids) in enumerate(zip(rows_ids, rows_grids, strict=True)):
        n = len(ids)
        prompts.ids_QxP[q, :n] = ids
        prompts.pos_QxPx3[q, :n], prompts.next_pos_Q[q] = visual_positions(ids, image, -1, grids, 1)
        at = np.flatnonzero(np.array(ids) == image)
        index = [(first + i) * M + m for i, (r, c) in enumerate(grids) for m in range(r * c)]
        prompts.visual_QxP[q, at] = index
        first += len(grids)
        hf_ids[q, P - n :], hf_mask[q, P - n :] = ids, 1
    official = pil.Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
    )(images=images, return_tensors="pt")
    hf = {
        "input_ids": torch.from_numpy(hf_ids),
        "attention_mask": torch.from_numpy(hf_mask),
        "mm_token_type_ids": torch.from_numpy((hf_ids == image).astype(np.int32) * hf_mask.astype(np.int32)),
        "pixel_values": official["pixel_values"],
        "image_grid_thw": official["image_grid_thw"],
    }
    flat = [grid for grids in rows_grids for grid in grids]
    return SimpleNamespace(hf=hf, vision=vision, prompts=prompts, length_Q=prompts.length_Q, grids=flat)


def continue_greedily(model: Any, arch: Architecture, hf: dict[str, Any], tokens: int = CONTINUATION) -> Any:
    """transformers' greedy continuation, int64 [Q, tokens]; the vision tokens never come."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        out = model.generate(
            **hf,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=list(range(arch.vocab - 4, arch.vocab)),
            pad_token_id=0,
        )
    return out[:, hf["input_ids"].shape[1] :]


def logits(model: Any, hf: dict[str, Any], continuation: Any) -> np.ndarray:
    """transformers' logits of the whole left-padded rows with a continuation, float32 [Q, P + R, V]."""
    torch = pytest.importorskip("torch")
    ones, zeros = torch.ones_like(continuation), torch.zeros_like(continuation)
    with torch.no_grad():
        out = model(
            input_ids=torch.cat([hf["input_ids"], continuation], dim=1),
            attention_mask=torch.cat([hf["attention_mask"], ones], dim=1),
            mm_token_type_ids=torch.cat([hf["mm_token_type_ids"], zeros.to(torch.int32)], dim=1),
            pixel_values=hf["pixel_values"].to(model.dtype),
            image_grid_thw=hf["image_grid_thw"],
        )
    return out.logits.float().numpy()


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """The functions above, for tests."""
    return SimpleNamespace(
        architecture=architecture,
        qwen3=QWEN3,
        build=build,
        inputs=inputs,
        continue_greedily=continue_greedily,
        logits=logits,
        settings=settings,
        cases=CASES,
        tokens=CONTINUATION,
    )


@pytest.fixture
def saved(tmp_path: Path):
    """A function: architecture -> (transformers model, folder it was saved to)."""

    def make(arch: Architecture) -> tuple[Any, Path]:
        model = build(arch)
        model.save_pretrained(tmp_path / "hf")
        return model, tmp_path / "hf"

    return make
