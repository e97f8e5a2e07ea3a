"""The model's configuration: frozen dataclasses, read from and written to Hugging Face's config.json.

A key that the file lacks has the default of transformers' class: some releases write only what differs (4.49). The
defaults are copied here, and tests compare them with transformers' own, because importing
`transformers.Qwen2_5_VLConfig` imports torch where that is installed: seconds of every start, and torch's CUDA
libraries beside those of JAX.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from qwenla_jax.utils.json_files import read_object
from qwenla_jax.utils.json_section import Section

_DTYPES = ("float32", "bfloat16", "float16")
_REMAT = ("none", "full", "dots")
_ATTENTION = ("auto", "xla", "splash", "cudnn")
_MODEL_TYPE = "qwen2_5_vl"
_VISION_ROPE = {"rope_type": "axial", "rope_theta": 10000.0}  # transformers' default
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
# transformers' class defaults.
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "tokens_per_second": 4,
    "hidden_act": "silu",
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "rope_theta": 1e6,
    "mrope_section": [16, 24, 24],
}
_ID_DEFAULTS: dict[str, Any] = dict(zip(_ID_KEYS, (151655, 151656, 151652, 151653), strict=True))
# Far above any model: a file that asks for more is refused before anything is made for each layer or row.
_MOST_LAYERS, _MOST = 1024, 2**24
_MAX_BYTES = 10 << 20


def _in_bounds(owner: str, config: Any, *others: str) -> None:
    """Rejects a value of 0 or less, or one that no model has, in any field but `others`."""
    for name in (field.name for field in dataclasses.fields(config) if field.name not in others):
        value, most = getattr(config, name), _MOST_LAYERS if name in ("depth", "num_layers") else _MOST
        if not value > 0:
            raise ValueError(f"{owner}.{name} is {value}; it must be above 0")
        if isinstance(value, int) and value > most:
            raise ValueError(f"{owner}.{name} is {value}; it must be at most {most:,}")


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
        _in_bounds("vision", self, "full_attention_layers", "hidden_act")
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
        if wrong := [i for i in self.full_attention_layers if not 0 <= i < self.depth]:
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
        _in_bounds("text", self, "mrope_section", "tie_word_embeddings")
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
      image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids of image tokens.
      dtype: dtype of activations and matrix products: "float32", "bfloat16" or "float16". Norms, softmax and rope
        are always computed in float32.
      param_dtype: dtype that the parameters are stored in.
      remat: what the backward pass recomputes: "none" nothing, "full" every layer, "dots" all but the results of
        matrix products.
      initializer_range: standard deviation of randomly initialised matrices.
      attention: what computes attention: "auto" is the backend's kernel where it applies, "xla" none, "splash" (TPU)
        or "cudnn" (GPU) that kernel wherever it takes the call; see `model.kernels`. All compute the same.

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

    @property
    def types(self) -> tuple[str, str]:
        """Types that are computed in, and that parameters are kept in."""
        return self.dtype, self.param_dtype

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> ModelConfig:
        """Reads Hugging Face's config.json, flat as in the released files or with a nested text_config.

        Args:
          source: a folder with config.json, the file itself, or its parsed content.

        Returns:
          The config; dtype and param_dtype are what the file declares, float32 where it declares nothing.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: not JSON, not a Qwen2.5-VL, a value out of range, or a setting that this model does not compute;
            the message names the file and the key.
        """
        if isinstance(source, Mapping):
            return _read(Section(source, "config"))
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds a config.json")
        return _read(Section(read_object(path, _MAX_BYTES), str(path)), path.parent)

    def to_hf(
        self,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> dict[str, Any]:
        """The content of a config.json in the form of the released files, which every release of transformers reads.

        Args:
          eos_token_id, bos_token_id, pad_token_id: ids that the tokenizer knows and the model does not.

        Returns:
          A JSON-serialisable dict; `from_hf(to_hf())` gives an equal config (remat, attention and a dtype that differs
          from param_dtype are not the checkpoint's and are lost).
        """
        v, t = self.vision, self.text
        ids = {
            "bos_token_id": bos_token_id,
            "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
            "pad_token_id": pad_token_id,
        }
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": _MODEL_TYPE,
            **{name: value for name, value in ids.items() if value is not None},
            **{name: getattr(self, name) for name in _ID_KEYS},
            **{key: getattr(t, name) for name, key in _TEXT_KEYS.items()},
            "hidden_act": "silu",
            "rms_norm_eps": t.rms_norm_eps,
            "rope_theta": t.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
            "tie_word_embeddings": t.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "max_position_embeddings": 128000,  # the released files' number; no position is computed from it
            "torch_dtype": self.param_dtype,
            "vision_config": {
                **{key: getattr(v, name) for name, key in _VISION_KEYS.items()},
                "in_chans": v.in_channels,
                "fullatt_block_indexes": list(v.full_attention_layers),
                "hidden_act": v.hidden_act,
            },
        }


def _read(top: Section, folder: Path | None = None) -> ModelConfig:
    """The config of a parsed file; where the file contradicts itself, the folder's weights decide."""
    if top.get("model_type") != _MODEL_TYPE:
        raise top.wrong("model_type", top.get("model_type"), f"{_MODEL_TYPE!r}; no other model is supported")
    if top.get("quantization_config"):
        raise top.fail("quantization_config", "is set; quantised checkpoints are not supported")
    if top.get("text_config") is not None:
        text = top.section("text_config", _TEXT_DEFAULTS)
    else:
        text = Section(top.content, top.where, "", _TEXT_DEFAULTS)
    declared = (part.get(key) for part in (top, text) for key in ("dtype", "torch_dtype"))
    dtype = next((each for each in declared if each is not None), "float32")
    ids = Section(top.content, top.where, "", _ID_DEFAULTS)
    # Before version 5, transformers wrote the tie into text_config; either place counts.
    tie = top.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")
    if tie and top.get("tie_word_embeddings") is False and folder is not None:
        tie = not _stores_head(folder)
    try:
        return ModelConfig(
            vision=_vision(top.section("vision_config", _VISION_DEFAULTS)),
            text=_text(text, tie),
            dtype=dtype,
            param_dtype=dtype,
            initializer_range=text.number("initializer_range"),
            **cast(dict[str, Any], {name: ids.whole(name) for name in _ID_KEYS}),
        )
    except ValueError as error:
        raise error if str(error).startswith(top.where) else ValueError(f"{top.where}: {error}") from error


def _vision(c: Section) -> VisionConfig:
    rope = c.section("rope_parameters")
    if any(rope.content.get(key, value) != value for key, value in _VISION_ROPE.items()):
        raise c.wrong("rope_parameters", dict(rope.content), f"{_VISION_ROPE}, which is what the tower computes")
    if "in_channels" not in c.content and "in_chans" in c.content:  # the released files' name for it
        c = Section({**c.content, "in_channels": c.content["in_chans"]}, c.where, c.prefix, c.defaults)
    full, depth = c.wholes("fullatt_block_indexes"), c.whole("depth")
    if list(full) == _VISION_DEFAULTS["fullatt_block_indexes"]:  # the default, also written for towers of other depths
        full = tuple(index for index in full if index < depth)
    return VisionConfig(
        full_attention_layers=full,
        hidden_act=str(c.get("hidden_act")),
        **{name: c.whole(key) for name, key in _VISION_KEYS.items()},
    )


def _text(c: Section, tie: bool) -> TextConfig:
    if c.get("use_sliding_window"):
        raise c.fail("use_sliding_window", "is true; sliding-window attention is not supported")
    kinds = c.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise c.wrong("layer_types", kinds, "a list of 'full_attention'; no other kind is supported")
    if c.get("hidden_act") != "silu":
        raise c.wrong("hidden_act", c.get("hidden_act"), "'silu', as Qwen2.5-VL's is")
    if c.get("attention_dropout"):
        raise c.wrong("attention_dropout", c.get("attention_dropout"), "0")
    key = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    rope = c.section(key)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("mrope", "default"):
        raise c.wrong(key, dict(rope.content), "of type 'mrope' (or 'default'); no other is supported")
    # The base is inside the section or beside it.
    rope.defaults = {"mrope_section": c.get("mrope_section"), "rope_theta": c.get("rope_theta")}
    if c.get("num_key_value_heads") is None:  # null means as many as query heads
        c = Section({**c.content, "num_key_value_heads": c.get("num_attention_heads")}, c.where, c.prefix, c.defaults)
    sizes = {name: c.whole(key) for name, key in _TEXT_KEYS.items()}
    has_head_dim = c.get("head_dim") is not None
    return TextConfig(
        head_dim=c.whole("head_dim") if has_head_dim else sizes["hidden_size"] // max(sizes["num_heads"], 1),
        rms_norm_eps=c.number("rms_norm_eps"),
        rope_theta=rope.number("rope_theta"),
        mrope_section=cast(tuple[int, int, int], rope.wholes("mrope_section")),  # `TextConfig` counts them
        tie_word_embeddings=tie,
        **sizes,
    )


def _stores_head(folder: Path) -> bool:
    """Whether a checkpoint's weights have an output head of their own. What cannot be read is reported with them."""
    from safetensors import SafetensorError, safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return "lm_head.weight" in read_object(index)["weight_map"]
        if single.is_file():
            with safe_open(single, framework="numpy") as tensors:
                return "lm_head.weight" in tensors.keys()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return (folder / "params" / "decoder.lm_head.kernel").is_dir()
