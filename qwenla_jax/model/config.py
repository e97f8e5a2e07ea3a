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

from qwenla_jax.model.families import FAMILIES, QWEN2_5_VL, Family
from qwenla_jax.model.halves import MOST_LAYERS, TextConfig, VisionConfig
from qwenla_jax.utils.json_files import read_object
from qwenla_jax.utils.json_section import Section

_DTYPES = ("float32", "bfloat16", "float16")
_REMAT = ("none", "full", "dots")
_ATTENTION = ("auto", "xla", "splash", "cudnn")
_VISION_ROPE = {"rope_type": "axial", "rope_theta": 10000.0}  # transformers' default
# Field of ours -> key of config.json, for everything that is a plain whole number there; the tower's are its own names.
_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_ID_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# transformers' class defaults; those of the halves are the family's.
_ID_DEFAULTS: dict[str, Any] = dict(zip(_ID_KEYS, (151655, 151656, 151652, 151653), strict=True))
_MAX_BYTES = 10 << 20


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model.

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
      model_type: of the family, one of `families.FAMILIES`.

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
    model_type: str = QWEN2_5_VL.model_type

    def __post_init__(self) -> None:
        """Checks the halves against each other and the family."""
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not one of {', '.join(FAMILIES)}")
        _check_family(self.family, self.vision, self.text)
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
    def family(self) -> Family:
        """What the model has in common with all of its family."""
        return FAMILIES[self.model_type]

    @property
    def types(self) -> tuple[str, str]:
        """Types that are computed in, and that parameters are kept in."""
        return self.dtype, self.param_dtype

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> ModelConfig:
        """Reads Hugging Face's config.json, flat or with a nested text_config.

        Args:
          source: a folder with config.json, the file itself, or its parsed content.

        Returns:
          The config; dtype and param_dtype are what the file declares, float32 where it declares nothing.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: not JSON, no model of a known family, a value out of range, or a setting that this model does not
            compute; the message names the file and the key.
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
        v, t, family = self.vision, self.text, self.family
        tokens = {
            "bos_token_id": bos_token_id,
            "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
            "pad_token_id": pad_token_id,
        }
        tokens = {name: value for name, value in tokens.items() if value is not None}
        text: dict[str, Any] = {
            **{key: getattr(t, name) for name, key in _TEXT_KEYS.items()},
            "hidden_act": "silu",
            "rms_norm_eps": t.rms_norm_eps,
            "rope_theta": t.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
            "tie_word_embeddings": t.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "max_position_embeddings": family.max_positions,
        }
        vision: dict[str, Any] = {key: getattr(v, key) for key in family.vision_keys}
        if family.windows:
            vision |= {"in_chans": v.in_channels, "fullatt_block_indexes": list(v.full_attention_layers)}
        else:
            vision["deepstack_visual_indexes"] = list(v.deepstack_layers)
        top: dict[str, Any] = {"tie_word_embeddings": t.tie_word_embeddings}
        if family.nested:
            rope = {"rope_type": "default", "mrope_section": list(t.mrope_section), "mrope_interleaved": True}
            text |= {"model_type": f"{self.model_type}_text", "head_dim": t.head_dim, "attention_bias": False}
            text |= {"rope_scaling": rope, "torch_dtype": self.param_dtype, **tokens}
            vision["model_type"] = f"{self.model_type}_vision"
            top["text_config"] = text
        else:
            top |= text | {"use_sliding_window": False}
        return {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            **tokens,
            **{name: getattr(self, name) for name in _ID_KEYS},
            **top,
            "torch_dtype": self.param_dtype,
            "vision_config": {**vision, "hidden_act": v.hidden_act},
        }


def _check_family(family: Family, vision: VisionConfig, text: TextConfig) -> None:
    """Raises ValueError where the halves are not what the family computes."""
    if not family.free_head_dim and text.head_dim * text.num_heads != text.hidden_size:
        raise ValueError(
            f"text.hidden_size {text.hidden_size} is not num_heads {text.num_heads} * head_dim {text.head_dim}; "
            f"{family.name} has no other head size"
        )
    if vision.hidden_act != family.vision_act:
        raise ValueError(
            f"vision.hidden_act {vision.hidden_act!r} is not supported; {family.name} uses {family.vision_act!r}"
        )
    if family.videos != (vision.tokens_per_second > 0) or family.windows != (vision.num_position_embeddings == 0):
        raise ValueError(
            f"vision.tokens_per_second is {vision.tokens_per_second} and vision.num_position_embeddings "
            f"{vision.num_position_embeddings}; of {family.name} one must be above 0, the "
            f"{'first' if family.videos else 'second'}, and the other 0"
        )
    if family.mrope_interleaved and 3 * max(text.mrope_section[1:]) > text.head_dim // 2:
        raise ValueError(
            f"text.mrope_section {text.mrope_section}: rows and columns take turns with time, so each can have a third "
            f"of head_dim / 2 = {text.head_dim // 2} at most"
        )


def _read(top: Section, folder: Path | None = None) -> ModelConfig:
    """The config of a parsed file; where the file contradicts itself, the folder's weights decide."""
    if top.get("model_type") not in tuple(FAMILIES):
        known = " or ".join(map(repr, FAMILIES))
        raise top.wrong("model_type", top.get("model_type"), f"{known}; no other model is supported, no MoE either")
    family = FAMILIES[top.get("model_type")]
    if top.get("quantization_config"):
        raise top.fail("quantization_config", "is set; quantised checkpoints are not supported")
    if top.get("text_config") is not None:
        text = top.section("text_config", family.text_defaults)
    else:
        text = Section(top.content, top.where, "", family.text_defaults)
    declared = (part.get(key) for part in (top, text) for key in ("dtype", "torch_dtype"))
    dtype = next((each for each in declared if each is not None), "float32")
    ids = Section(top.content, top.where, "", _ID_DEFAULTS)
    # Before version 5, transformers wrote the tie into text_config; either place counts.
    tie = top.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")
    if tie and top.get("tie_word_embeddings") is False and folder is not None:
        tie = not _stores_head(folder)
    try:
        return ModelConfig(
            vision=_vision(top.section("vision_config", family.vision_defaults), family),
            text=_text(text, tie, family),
            dtype=dtype,
            param_dtype=dtype,
            initializer_range=text.number("initializer_range"),
            model_type=family.model_type,
            **cast(dict[str, Any], {name: ids.whole(name) for name in _ID_KEYS}),
        )
    except ValueError as error:
        raise error if str(error).startswith(top.where) else ValueError(f"{top.where}: {error}") from error


def _vision(c: Section, family: Family) -> VisionConfig:
    rope = c.section("rope_parameters")
    if any(rope.content.get(key, value) != value for key, value in _VISION_ROPE.items()):
        raise c.wrong("rope_parameters", dict(rope.content), f"{_VISION_ROPE}, which is what the tower computes")
    if "in_channels" not in c.content and "in_chans" in c.content:  # the released files' name for it
        c = Section({**c.content, "in_channels": c.content["in_chans"]}, c.where, c.prefix, c.defaults)
    sizes: dict[str, Any] = {name: c.whole(name) for name in family.vision_keys}
    depth, full = sizes["depth"], ()
    if family.windows:
        full = c.wholes("fullatt_block_indexes")
        if list(full) == family.vision_defaults["fullatt_block_indexes"]:  # also written for towers of other depths
            full = tuple(index for index in full if index < depth)
    else:
        sizes |= {"window_size": sizes["patch_size"] * sizes["spatial_merge_size"], "tokens_per_second": 0}
        sizes["deepstack_layers"] = c.wholes("deepstack_visual_indexes")
        full = tuple(range(min(depth, MOST_LAYERS)))
    return VisionConfig(full_attention_layers=full, hidden_act=str(c.get("hidden_act")), **sizes)


def _text(c: Section, tie: bool, family: Family) -> TextConfig:
    if c.get("use_sliding_window"):
        raise c.fail("use_sliding_window", "is true; sliding-window attention is not supported")
    kinds = c.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise c.wrong("layer_types", kinds, "a list of 'full_attention'; no other kind is supported")
    if c.get("hidden_act") != "silu":
        raise c.wrong("hidden_act", c.get("hidden_act"), f"'silu', as {family.name}'s is")
    if c.get("attention_dropout"):
        raise c.wrong("attention_dropout", c.get("attention_dropout"), "0")
    if family.nested and c.flag("attention_bias"):
        raise c.wrong("attention_bias", True, f"false, as {family.name}'s is")
    key = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    rope = c.section(key)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("mrope", "default"):
        raise c.wrong(key, dict(rope.content), "of type 'mrope' (or 'default'); no other is supported")
    if rope.get("mrope_interleaved") not in (None, family.mrope_interleaved):
        wanted = f"{str(family.mrope_interleaved).lower()}, as {family.name}'s is"
        raise rope.wrong("mrope_interleaved", rope.get("mrope_interleaved"), wanted)
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
