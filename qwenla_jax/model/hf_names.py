"""The one table that relates our parameters to the tensors of a Hugging Face checkpoint, read both ways.

Canonical tensor names are those of Qwen2.5-VL's released files, which transformers also writes. Other files' and newer
in-memory names (`model.visual.`, `model.language_model.`) are renamed on reading, and on writing (`stored_name`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from qwenla_jax.model.config import ModelConfig

Kind = Literal["same", "linear", "patches"]
Shape = tuple[int, ...]

_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
# Buffers that some versions stored; both are computed from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor name of the checkpoint (or one for every layer) and the parameters that it holds.

    Attributes:
      name: the tensor's name; `{}` is the layer's number.
      paths: parameters whose rows the tensor holds in this order (three for the fused query-key-value, else one),
        each a path of keys joined by `/`.
      kind: "same" as it is, "linear" [out, in] turned to [in, out], "patches" the convolution over a patch,
        [D, C, Tp, P, P], turned to [C * Tp * P * P, D].
      shape: the tensor's shape in the checkpoint.
      layers: number of layers stacked on the leading axis of the parameter; None for a parameter that is no layer's.
    """

    name: str
    paths: tuple[str, ...]
    kind: Kind
    shape: Shape
    layers: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of all layers in order, or the one tensor."""
        return (self.name,) if self.layers is None else tuple(self.name.format(i) for i in range(self.layers))

    @property
    def param_shape(self) -> Shape:
        """Shape of each of our parameters in `paths`, the layer axis included."""
        rows = self.shape[0] // len(self.paths)
        if self.kind == "same":
            shape: Shape = (rows, *self.shape[1:])
        else:
            shape = (int(np.prod(self.shape[1:])), rows)
        return shape if self.layers is None else (self.layers, *shape)

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """One checkpoint tensor -> our parameters in the order of `paths`, without the layer axis (views)."""
        parts = np.split(tensor, len(self.paths))
        return [part if self.kind == "same" else part.reshape(part.shape[0], -1).T for part in parts]

    def join(self, params: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`; the result is contiguous."""
        parts = [param if self.kind == "same" else param.T for param in params]
        return np.ascontiguousarray(np.concatenate(parts)).reshape(self.shape)


def table(config: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of the checkpoint of this model."""
    v, t, family = config.vision, config.text, config.family
    entries: list[Entry] = []

    def add(name: str, paths: str, kind: Kind, shape: Shape, layers: int | None = None) -> None:
        entries.append(Entry(name, tuple(paths.split()), kind, shape, layers))

    def linear(name: str, path: str, out: int, into: int, bias: bool, layers: int | None = None) -> None:
        add(f"{name}.weight", " ".join(f"{p}/kernel" for p in path.split()), "linear", (out, into), layers)
        if bias:
            add(f"{name}.bias", " ".join(f"{p}/bias" for p in path.split()), "same", (out,), layers)

    def norm(name: str, path: str, size: int, layers: int | None = None) -> None:
        add(f"{name}.weight", f"{path}/scale", "same", (size,), layers)
        if family.layer_norm:  # the decoder's norms do not come here
            add(f"{name}.bias", f"{path}/bias", "same", (size,), layers)

    dv, fv, merged = v.hidden_size, v.intermediate_size, v.hidden_size * v.spatial_merge_size**2
    conv = (dv, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    add("visual.patch_embed.proj.weight", "visual/patch_embed/kernel", "patches", conv)
    if family.patch_bias:
        add("visual.patch_embed.proj.bias", "visual/patch_embed/bias", "same", (dv,))
    if v.num_position_embeddings:
        positions = (v.num_position_embeddings, dv)
        add("visual.pos_embed.weight", "visual/pos_embed/embedding", "same", positions)
    block, ours = "visual.blocks.{}.", "visual/blocks/"
    for part in ("norm1", "norm2"):
        norm(f"{block}{part}", f"{ours}{part}", dv, v.depth)
    linear(f"{block}attn.qkv", " ".join(f"{ours}attn/{part}" for part in "qkv"), 3 * dv, dv, True, v.depth)
    linear(f"{block}attn.proj", f"{ours}attn/proj", dv, dv, True, v.depth)
    gated = (("gate_proj", "gate", fv, dv), ("up_proj", "up", fv, dv), ("down_proj", "down", dv, fv))
    plain = (("linear_fc1", "up", fv, dv), ("linear_fc2", "down", dv, fv))
    for theirs, part, out, into in gated if family.vision_act == "silu" else plain:
        linear(f"{block}mlp.{theirs}", f"{ours}mlp/{part}", out, into, True, v.depth)
    mergers = [("merger", "merger", dv)]
    mergers += [(f"deepstack_merger_list.{i}", f"deepstack_{i}", merged) for i in range(len(v.deepstack_layers))]
    first, fc1, fc2 = ("norm", "linear_fc1", "linear_fc2") if family.layer_norm else ("ln_q", "mlp.0", "mlp.2")
    for theirs, part, width in mergers:
        norm(f"visual.{theirs}.{first}", f"visual/{part}/norm", width)
        linear(f"visual.{theirs}.{fc1}", f"visual/{part}/fc1", merged, merged, True)
        linear(f"visual.{theirs}.{fc2}", f"visual/{part}/fc2", v.out_hidden_size, merged, True)

    d, f = t.hidden_size, t.intermediate_size
    q_out, kv_out = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    add("model.embed_tokens.weight", "decoder/embed/embedding", "same", (t.vocab_size, d))
    layer, ours = "model.layers.{}.", "decoder/layers/"
    for theirs, part in (("input_layernorm", "input_norm"), ("post_attention_layernorm", "post_norm")):
        add(f"{layer}{theirs}.weight", f"{ours}{part}/scale", "same", (d,), t.num_layers)
    for part, out in (("q", q_out), ("k", kv_out), ("v", kv_out)):
        linear(f"{layer}self_attn.{part}_proj", f"{ours}attn/{part}", out, d, family.qkv_bias, t.num_layers)
    for part in ("q_norm", "k_norm") if family.qk_norm else ():
        add(f"{layer}self_attn.{part}.weight", f"{ours}attn/{part}/scale", "same", (t.head_dim,), t.num_layers)
    linear(f"{layer}self_attn.o_proj", f"{ours}attn/o", d, q_out, False, t.num_layers)
    for part, out, into in (("gate", f, d), ("up", f, d), ("down", d, f)):
        linear(f"{layer}mlp.{part}_proj", f"{ours}mlp/{part}", out, into, False, t.num_layers)
    add("model.norm.weight", "decoder/norm/scale", "same", (d,))
    if not t.tie_word_embeddings:
        linear("lm_head", "decoder/lm_head", t.vocab_size, d, False)
    return tuple(entries)


def canonical(name: str) -> str:
    """The released files' name of a tensor, from any name that transformers has given it."""
    for newer, released in _PREFIXES:
        if name.startswith(newer):
            return released + name[len(newer) :]
    return name


def module_name(name: str) -> str:
    """transformers' present in-memory name of a tensor, from its canonical name."""
    for newer, released in _PREFIXES:
        if name.startswith(released):
            return newer + name[len(released) :]
    return name


def stored_name(config: ModelConfig, name: str) -> str:
    """The name of a tensor in a file of this model, from its canonical name."""
    return module_name(name) if config.family.nested else name


def is_ignored(name: str) -> bool:
    """Whether a tensor is a buffer that the config determines."""
    return name.endswith(_IGNORED_SUFFIXES)


def compare(expected: Iterable[tuple[str, Shape]], actual: Iterable[tuple[str, Shape]]) -> list[str]:
    """What is missing, unexpected or misshapen of (name, shape) pairs, one line each; empty where the two agree."""
    want, have = dict(expected), dict(actual)
    lines = [f"missing: {name} {list(want[name])}" for name in want if name not in have]
    lines += [f"unexpected: {name} {list(have[name])}" for name in have if name not in want]
    differ = [name for name in want if name in have and tuple(want[name]) != tuple(have[name])]
    return lines + [f"misshapen: {name} is {list(have[name])}, should be {list(want[name])}" for name in differ]
