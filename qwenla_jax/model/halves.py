"""The two halves of the model's configuration, checked; `model.config` reads, writes and joins them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

# Far above any model: a file that asks for more is refused before anything is made for each layer or row.
MOST_LAYERS, _MOST = 1024, 2**24


def _in_bounds(owner: str, config: Any, *others: str) -> None:
    """Rejects a value of 0 or less, or one that no model has, in any field but `others`."""
    for name in (field.name for field in dataclasses.fields(config) if field.name not in others):
        value, most = getattr(config, name), MOST_LAYERS if name in ("depth", "num_layers") else _MOST
        if not value > 0:
            raise ValueError(f"{owner}.{name} is {value}; it must be above 0")
        if isinstance(value, int) and value > most:
            raise ValueError(f"{owner}.{name} is {value}; it must be at most {most:,}")


def _absent(config: Any, *names: str) -> tuple[str, ...]:
    """Those of the fields that are 0, which says that the model has no such thing."""
    return tuple(name for name in names if getattr(config, name) == 0)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its merger.

    Attributes:
      depth: number of blocks.
      hidden_size, intermediate_size, num_heads: width, feed-forward width and attention heads of a block.
      in_channels, patch_size, temporal_patch_size: one patch holds in_channels * temporal_patch_size * patch_size^2
        values; patch_size in pixels, temporal_patch_size in frames.
      spatial_merge_size: spatial_merge_size^2 neighbouring patches become one visual token.
      window_size: side of an attention window, in pixels; one visual token where the family has no windows, so that a
        frame needs no padding.
      full_attention_layers: indexes of the blocks that attend within the whole frame, ascending.
      out_hidden_size: width of a visual token, the text model's width.
      tokens_per_second: steps of the temporal M-RoPE position in a second of video; 0: videos are not supported.
      rms_norm_eps: epsilon of all norms of the tower.
      hidden_act: activation of the feed-forward, the family's `vision_act`.
      num_position_embeddings: learned positions, of a square grid that is stretched over the frame; 0: none.
      deepstack_layers: indexes of the blocks after which features are taken, ascending: those of the first are added to
        the decoder's hidden states after its first layer, and so on (DeepStack). Empty: none.

    Raises:
      ValueError: a value out of range; the message names the field.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    full_attention_layers: tuple[int, ...]
    out_hidden_size: int
    tokens_per_second: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    num_position_embeddings: int = 0
    deepstack_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values against each other."""
        lists = {
            "full_attention_layers (fullatt_block_indexes)": self.full_attention_layers,
            "deepstack_layers (deepstack_visual_indexes)": self.deepstack_layers,
        }
        others = ("hidden_act", *(name.split()[0] for name in lists))
        _in_bounds("vision", self, *others, *_absent(self, "tokens_per_second", "num_position_embeddings"))
        if self.hidden_size % self.num_heads:
            message = f"vision.hidden_size {self.hidden_size} is not divisible by vision.num_heads {self.num_heads}"
            raise ValueError(message)
        if self.head_dim % 4:
            raise ValueError(
                f"vision head size is {self.head_dim} (hidden_size {self.hidden_size} / num_heads {self.num_heads}); "
                "the two-axis rope needs a multiple of 4"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(
                f"vision.window_size {self.window_size} is not a multiple of patch_size * spatial_merge_size "
                f"= {self.patch_size * self.spatial_merge_size}"
            )
        for name, layers in lists.items():
            if wrong := [i for i in layers if not 0 <= i < self.depth]:
                raise ValueError(
                    f"vision.{name} has {wrong}; with depth {self.depth} the indexes are 0 to {self.depth - 1}"
                )
            if list(layers) != sorted(set(layers)):
                raise ValueError(f"vision.{name} {layers} must ascend without repetition")
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(
                f"vision.num_position_embeddings {self.num_position_embeddings} is no square; the grid has equal sides"
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, C * Tp * P * P."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def token_values(self) -> int:
        """Width of a visual token with its DeepStack features behind it."""
        return self.out_hidden_size * (1 + len(self.deepstack_layers))

    @property
    def merge_patches(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window, in merged tokens."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)

    @property
    def window_slots(self) -> int:
        """Patch slots of one full window (64 in the released models)."""
        return self.window_tokens**2 * self.merge_patches


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
      vocab_size: rows of the embedding, which may be more than the tokenizer has ids.
      hidden_size, intermediate_size, num_layers: width, feed-forward width, number of layers.
      num_heads, num_kv_heads, head_dim: query heads, key/value heads, size of a head.
      rms_norm_eps: epsilon of all norms.
      rope_theta: base of the rotary frequencies.
      mrope_section: frequencies of the time, row and column axis; they sum to head_dim / 2.
      tie_word_embeddings: the embedding is the output head too.

    Raises:
      ValueError: a value out of range; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        """Checks the values against each other."""
        _in_bounds("text", self, "mrope_section", "tie_word_embeddings")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"text.num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"text.head_dim {self.head_dim} is odd; rope rotates pairs")
        if len(self.mrope_section) != 3 or min(self.mrope_section) < 0:
            raise ValueError(
                f"text.mrope_section {self.mrope_section} must be three numbers of 0 or more (time, row, column)"
            )
        if sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"text.mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}; "
                f"it must sum to head_dim / 2 = {self.head_dim // 2}"
            )
