"""The model's configuration: frozen dataclasses, read from and written to Hugging Face's config.json.

Nothing is defaulted that changes a number of the model: a key that the file lacks is an error, because the defaults of
transformers differ from the released checkpoints (rms_norm_eps, tokens_per_second).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_DTYPES = ("float32", "bfloat16", "float16")
_REMAT = ("none", "full", "dots")
_ATTENTION = ("auto", "xla", "splash", "cudnn")
_MODEL_TYPE = "qwen2_5_vl"
_VISION_ROPE = {"rope_type": "axial", "rope_theta": 10000.0}  # what transformers computes when the file says nothing
# Field of ours -> key of config.json, for everything that is a plain whole number there.
_VISION_KEYS = {
    name: name
    for name in (
        "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size "
        "window_size out_hidden_size tokens_per_second"
    ).split()
}
_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_ID_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _positive(owner: str, config: Any, *others: str) -> None:
    """Refuses a value of 0 or less in any field but `others`."""
    for name in (field.name for field in dataclasses.fields(config)):
        if name not in others and not getattr(config, name) > 0:
            raise ValueError(f"{owner}.{name} is {getattr(config, name)}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its merger.

    Attributes:
      depth: number of blocks.
      hidden_size, intermediate_size, num_heads: width, feed-forward width and attention heads of a block.
      in_channels, patch_size, temporal_patch_size: one patch holds in_channels * temporal_patch_size * patch_size^2
        values; patch_size in pixels, temporal_patch_size in frames.
      spatial_merge_size: spatial_merge_size^2 neighbouring patches become one visual token.
      window_size: side of an attention window, in pixels.
      full_attention_layers: indexes of the blocks that attend within the whole frame, ascending.
      out_hidden_size: width of a visual token, the text model's width.
      tokens_per_second: steps of the temporal M-RoPE position in a second of video.
      rms_norm_eps: epsilon of all norms of the tower.
      hidden_act: activation of the gated feed-forward; only "silu".

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

    def __post_init__(self) -> None:
        """Checks the values against each other."""
        _positive("vision", self, "full_attention_layers", "hidden_act")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"vision.hidden_size {self.hidden_size} is not divisible by vision.num_heads {self.num_heads}"
            )
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
        wrong = [i for i in self.full_attention_layers if not 0 <= i < self.depth]
        if wrong:
            raise ValueError(
                f"vision.full_attention_layers (fullatt_block_indexes) has {wrong}; "
                f"with depth {self.depth} the indexes are 0 to {self.depth - 1}"
            )
        if list(self.full_attention_layers) != sorted(set(self.full_attention_layers)):
            raise ValueError(
                f"vision.full_attention_layers {self.full_attention_layers} must ascend without repetition"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"vision.hidden_act {self.hidden_act!r} is not supported; Qwen2.5-VL uses 'silu'")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, C * Tp * P * P."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

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
        _positive("text", self, "mrope_section", "tie_word_embeddings")
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(
                f"text.hidden_size {self.hidden_size} is not num_heads {self.num_heads} * head_dim {self.head_dim}; "
                "Qwen2.5-VL has no other head size"
            )
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen2.5-VL.

    Attributes:
      vision, text: the two halves.
      image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids that the prompt's layout uses.
      dtype: dtype of activations and matrix products: "float32", "bfloat16" or "float16". Norms, softmax and rope
        are float32 inside whatever it says.
      param_dtype: dtype that the parameters are kept in.
      remat: what the backward pass recomputes: "none" keeps everything, "full" recomputes every layer, "dots" keeps
        the results of matrix products.
      initializer_range: standard deviation of randomly initialised matrices.
      attention: what computes attention: "auto" takes the backend's kernel where it serves, "xla" none, "splash" (TPU)
        or "cudnn" (GPU) that one wherever it takes the call; see `model.kernels`. All compute the same.

    Raises:
      ValueError: a value out of range; the message names the field.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    initializer_range: float = 0.02
    attention: str = "auto"

    def __post_init__(self) -> None:
        """Checks the halves against each other."""
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision.out_hidden_size {self.vision.out_hidden_size} is not text.hidden_size {self.text.hidden_size}"
            )
        ids = {name: getattr(self, name) for name in _ID_KEYS}
        for name, value in ids.items():
            if not 0 <= value < self.text.vocab_size:
                raise ValueError(f"{name} {value} is outside the vocabulary, 0 to {self.text.vocab_size - 1}")
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"the vision token ids must differ from each other: {ids}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(_DTYPES)}")
        if self.remat not in _REMAT:
            raise ValueError(f"remat {self.remat!r} is not one of {', '.join(_REMAT)}")
        if self.attention not in _ATTENTION:
            raise ValueError(f"attention {self.attention!r} is not one of {', '.join(_ATTENTION)}")

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> ModelConfig:
        """Reads Hugging Face's config.json, flat as in the released files or with a nested text_config.

        Args:
          source: a folder with config.json, the file itself, or its parsed content.

        Returns:
          The config; dtype and param_dtype are what the file declares, float32 where it declares nothing.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: not JSON, not a Qwen2.5-VL, a missing key, or a setting that this model does not compute; the
            message names the file and the key.
        """
        if isinstance(source, Mapping):
            return _Reader(source, "config").model()
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds a config.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON and UTF-8 errors are both ValueErrors
            raise ValueError(f"{path}: not a JSON file: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds a {type(content).__name__}, not a JSON object")
        return _Reader(content, str(path)).model()

    def to_hf(
        self,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> dict[str, Any]:
        """The content of a config.json that transformers reads, in the layout that transformers 5 writes.

        Args:
          eos_token_id, bos_token_id, pad_token_id: ids that the tokenizer knows and the model does not.

        Returns:
          A JSON-serialisable dict; `from_hf(to_hf())` gives an equal config (remat, attention and a dtype that differs
          from param_dtype are not the checkpoint's and are lost).
        """
        v, t = self.vision, self.text
        eos = list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": _MODEL_TYPE,
            "dtype": self.param_dtype,
            **{name: getattr(self, name) for name in _ID_KEYS},
            "tie_word_embeddings": t.tie_word_embeddings,
            "text_config": {
                "model_type": _MODEL_TYPE + "_text",
                "dtype": self.param_dtype,
                **{key: getattr(t, name) for name, key in _TEXT_KEYS.items()},
                "hidden_act": "silu",
                "rms_norm_eps": t.rms_norm_eps,
                "rope_parameters": {
                    "mrope_section": list(t.mrope_section),
                    "rope_theta": t.rope_theta,
                    "rope_type": "default",
                    "type": "mrope",
                },
                "initializer_range": self.initializer_range,
                "attention_dropout": 0.0,
                "use_sliding_window": False,
                "max_position_embeddings": 128000,  # the released files' number; no position is computed from it
                "bos_token_id": bos_token_id,
                "eos_token_id": eos,
                "pad_token_id": pad_token_id,
            },
            "vision_config": {
                "model_type": _MODEL_TYPE + "_vision",
                **{key: getattr(v, name) for name, key in _VISION_KEYS.items()},
                "in_chans": v.in_channels,
                "fullatt_block_indexes": list(v.full_attention_layers),
                "hidden_act": v.hidden_act,
            },
        }


class _Reader:
    """Reads one parsed config.json; every error names the file and the key."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.top = content
        self.where = where

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}")

    def get(self, section: Mapping[str, Any], prefix: str, name: str) -> Any:
        if section.get(name) is None:
            raise self.fail(f"{prefix}{name} is missing")
        return section[name]

    def whole(self, section: Mapping[str, Any], prefix: str, name: str) -> int:
        value = self.get(section, prefix, name)
        if isinstance(value, list | tuple) and value and len(set(value)) == 1:
            value = value[0]  # transformers also writes patch_size as [14, 14]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(f"{prefix}{name} is {value!r}; it must be a whole number")
        return value

    def number(self, section: Mapping[str, Any], prefix: str, name: str) -> float:
        value = self.get(section, prefix, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(f"{prefix}{name} is {value!r}; it must be a number")
        return float(value)

    def wholes(self, section: Mapping[str, Any], prefix: str, name: str) -> tuple[int, ...]:
        value = self.get(section, prefix, name)
        if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
            raise self.fail(f"{prefix}{name} is {value!r}; it must be a list of whole numbers")
        return tuple(value)

    def section(self, name: str) -> Mapping[str, Any]:
        value = self.get(self.top, "", name)
        if not isinstance(value, Mapping):
            raise self.fail(f"{name} is {value!r}; it must be an object")
        return value

    def model(self) -> ModelConfig:
        if self.top.get("model_type") != _MODEL_TYPE:
            raise self.fail(f"model_type is {self.top.get('model_type')!r}; only {_MODEL_TYPE!r} is supported")
        if self.top.get("quantization_config"):
            raise self.fail("quantization_config: quantised checkpoints are not supported")
        nested = self.top.get("text_config") is not None
        text = self.section("text_config") if nested else self.top
        dtype = self.top.get("dtype") or self.top.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
        vision, prefix = self.vision(), "text_config." if nested else ""
        decoder = self.text(text, prefix)
        ids = {name: self.whole(self.top, "", name) for name in _ID_KEYS}
        dtype = "float32" if dtype is None else str(dtype)
        init = float(text.get("initializer_range") or self.top.get("initializer_range") or 0.02)
        try:
            return ModelConfig(
                vision=vision, text=decoder, dtype=dtype, param_dtype=dtype, initializer_range=init, **ids
            )
        except ValueError as error:
            raise self.fail(str(error)) from error

    def vision(self) -> VisionConfig:
        c, p = self.section("vision_config"), "vision_config."
        rope = c.get("rope_parameters") or {}
        if any(rope.get(key, value) != value for key, value in _VISION_ROPE.items()):
            raise self.fail(f"{p}rope_parameters {dict(rope)} is not supported; the tower's rope is {_VISION_ROPE}")
        if c.get("in_channels") is None and c.get("in_chans") is not None:  # the released files' name for it
            c = {**c, "in_channels": c["in_chans"]}
        try:
            return VisionConfig(
                full_attention_layers=self.wholes(c, p, "fullatt_block_indexes"),
                hidden_act=str(self.get(c, p, "hidden_act")),
                **{name: self.whole(c, p, key) for name, key in _VISION_KEYS.items()},
            )
        except ValueError as error:
            raise error if str(error).startswith(self.where) else self.fail(str(error)) from error

    def text(self, c: Mapping[str, Any], p: str) -> TextConfig:
        if c.get("use_sliding_window"):
            raise self.fail(f"{p}use_sliding_window is true; sliding-window attention is not supported")
        if set(c.get("layer_types") or ()) - {"full_attention"}:
            raise self.fail(f"{p}layer_types has other entries than 'full_attention', which are not supported")
        if self.get(c, p, "hidden_act") != "silu":
            raise self.fail(f"{p}hidden_act {c['hidden_act']!r} is not supported; Qwen2.5-VL uses 'silu'")
        if c.get("attention_dropout"):
            raise self.fail(f"{p}attention_dropout {c['attention_dropout']} is not supported; it must be 0")
        key = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
        rope = self.get(c, p, key)
        if not isinstance(rope, Mapping):
            raise self.fail(f"{p}{key} is {rope!r}; it must be an object")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in ("mrope", "default"):
            raise self.fail(f"{p}{key}: rope type {kind!r} is not supported; only 'mrope' (or 'default') is")
        owner, where = (rope, f"{p}{key}.") if rope.get("rope_theta") is not None else (c, p)
        sizes = {name: self.whole(c, p, key) for name, key in _TEXT_KEYS.items()}
        # Before version 5, transformers wrote the tie into text_config; either place counts.
        tie = bool(self.top.get("tie_word_embeddings")) or bool(c.get("tie_word_embeddings"))
        if "tie_word_embeddings" not in self.top and "tie_word_embeddings" not in c:
            raise self.fail(f"{p}tie_word_embeddings is missing")
        try:
            return TextConfig(
                head_dim=c.get("head_dim") or sizes["hidden_size"] // max(sizes["num_heads"], 1),
                rms_norm_eps=self.number(c, p, "rms_norm_eps"),
                rope_theta=self.number(owner, where, "rope_theta"),
                mrope_section=self.wholes(rope, f"{p}{key}.", "mrope_section"),
                tie_word_embeddings=tie,
                **sizes,
            )
        except ValueError as error:
            raise error if str(error).startswith(self.where) else self.fail(str(error)) from error
