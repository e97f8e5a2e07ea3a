"""Which kernel computes an attention: plain XLA, splash attention on TPU, or cuDNN's on GPU; equal results.

The kernels are JAX's own: `jax.experimental.pallas.ops.tpu.splash_attention`, and `jax.nn.dot_product_attention` with
cuDNN. Both keep the scores on the chip, so that memory grows with T and not with T^2, and skip what lies above the
diagonal. They take the calls for which `refusal` returns None; plain XLA computes all others. Among
those are single queries (decoding reads keys and values once either way; the scores of one query are 1 / (2 H K / N) of
those bytes, some 5% for the released sizes), passes that return attention (kernels return no probabilities; such
passes are rare and not differentiated), and queries that see different keys otherwise than by order.

paper silent: nothing of this changes what is computed.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from qwenla_jax.model.attention import Segment, segment_attention
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.layers import ATTENTION_OUTPUT, MASK_VALUE

# A TPU's vector registers have so many lanes: head sizes, and runs of queries and keys, are padded to multiples.
LANES = 128
# Queries or keys of one tile of splash attention, the largest first.
TILES = (512, 384, 256, 128)
# "auto" leaves calls with fewer queries, or smaller heads, to XLA: a kernel would compute mostly padding, and the
# scores are small.
FEWEST_QUERIES = 128
SMALLEST_HEAD = 64


def kernel_for(choice: str, backend: str, capability: str = "") -> str:
    """The kernel that calls on a backend are offered to: "xla", "splash" or "cudnn".

    Args:
      choice: `ModelConfig.attention`.
      backend: "cpu", "gpu" or "tpu", as `jax.default_backend()` returns it.
      capability: a GPU's `compute_capability`; "auto" needs 8.0 (Ampere) for cuDNN.
    """
    if choice != "auto":
        return choice
    if backend == "gpu":
        major = capability.partition(".")[0]
        return "cudnn" if major.isdecimal() and int(major) >= 8 else "xla"
    return "splash" if backend == "tpu" else "xla"


_planned_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned_backend", default=None)


@contextlib.contextmanager
def planned_for(backend: str) -> Iterator[None]:
    """What is traced within takes the kernels of this backend: for programs compiled where it is not."""
    token = _planned_backend.set(backend)
    try:
        yield
    finally:
        _planned_backend.reset(token)


def backend_here() -> str:
    """The backend of `planned_for`, else this process's default one: "cpu", "gpu" or "tpu"."""
    return _planned_backend.get() or jax.default_backend()


def kernel_here(choice: str) -> str:
    """`kernel_for` the backend of `backend_here`."""
    planned = _planned_backend.get() is not None
    capability = "" if planned else str(getattr(jax.devices()[0], "compute_capability", ""))
    return kernel_for(choice, backend_here(), capability)


def check_backend(choice: str, backend: str) -> None:
    """Rejects a kernel that was requested by name and that the backend lacks.

    Raises:
      ValueError: naming the setting.
    """
    wanted = {"splash": "tpu", "cudnn": "gpu"}.get(choice, backend)
    if backend != wanted:
        raise ValueError(f"config.attention: {choice} needs a {wanted}, and the backend here is {backend}; use auto")


def refusal(kernel: str, q_BxTxNxH: jax.Array, segments: Sequence[Segment]) -> str | None:
    """Why a kernel does not take a call, or None where it does; by shapes and types alone.

    Both need keys that all of a row's queries see alike, except that the last segment may be the queries' own tokens,
    masked causally. cuDNN gets no dense masks, only lengths: it takes one segment, or a segment with a length and then
    the queries' own tokens, causal.
    """
    _, T, _, H = q_BxTxNxH.shape
    if T == 1:
        return "one query"
    if any(s.causal for s in segments[:-1]):
        return "keys in order before other keys"
    if any(s.visible is not None and s.visible.shape[:3] != (len(s.k), 1, 1) for s in segments):
        return "queries that see different keys"
    if kernel == "splash":
        return None
    if q_BxTxNxH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"type {q_BxTxNxH.dtype}"
    if H % 8 or H > 128:
        return f"head size {H}"
    if any(s.bias is not None for s in segments):
        return "keys hidden by a bias"
    masked = [s.visible is not None or s.length_Q is not None for s in segments]
    if len(segments) == 1:
        return "masked keys in order" if segments[0].causal and masked[0] else None
    first, last = segments[0], segments[-1]
    if len(segments) > 2 or first.visible is not None or first.length_Q is None or masked[-1] or not last.causal:
        return "several runs of keys"
    return None


def attend(choice: str, q_BxTxNxH: jax.Array, segments: tuple[Segment, ...], rows: str = "batch") -> jax.Array:
    """`segment_attention` by the best kernel that takes the call; with a gradient.

    Under a mesh the kernel runs on each device's own rows and heads, by the logical axes.

    Args:
      choice: "auto": the backend's kernel where it takes the call and the call is large enough; "xla": never;
        "splash", "cudnn": that one wherever it takes the call.
      q_BxTxNxH, segments: as there.
      rows: logical name of the rows' axis.

    Returns:
      [B, T, N, H]. Queries that see nothing get finite numbers, not always the same as XLA's.
    """
    kernel = kernel_here(choice)
    _, T, _, H = q_BxTxNxH.shape
    small = choice == "auto" and (T < FEWEST_QUERIES or H < SMALLEST_HEAD)
    if kernel == "xla" or small or refusal(kernel, q_BxTxNxH, segments) is not None:
        return segment_attention(q_BxTxNxH, segments)
    return _on_mesh(splash_attention if kernel == "splash" else cudnn_attention, q_BxTxNxH, segments, rows)


def describe(choice: str, kernel: str, config: ModelConfig) -> str:
    """One line for the log: which kernel (`kernel_here(choice)`) computes a model's attention."""
    parts = []
    for name, head in (("decoder", config.text.head_dim), ("vision tower", config.vision.head_dim)):
        large = choice != "auto" or head >= SMALLEST_HEAD
        taken = kernel == "splash" or (config.dtype != "float32" and head % 8 == 0 and head <= 128)
        parts += [name] if kernel != "xla" and large and taken else []
    if not parts:
        return "attention in plain XLA"
    least = FEWEST_QUERIES if choice == "auto" else 2
    return f"attention by {kernel} in the {' and '.join(parts)} from {least} queries on"


def splash_attention(q_BxTxNxH: jax.Array, segments: tuple[Segment, ...], interpret: bool = False) -> jax.Array:
    """Splash attention over all segments' keys, concatenated; masked keys have another segment id.

    A bias must be 0 or `layers.MASK_VALUE`; with any other value the result is nan, never another softmax.

    Args:
      q_BxTxNxH, segments: a call for which `refusal("splash", ...)` is None.
      interpret: run the kernel's code by JAX's interpreter, on any backend.
    """
    # Imported where it is used, since it is experimental.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, N, H = q_BxTxNxH.shape
    short = T <= LANES // 2 and len(segments) == 1 and not segments[0].causal and segments[0].k.shape[:2] == (B, T)
    masked = any(s.visible is not None or s.length_Q is not None or s.bias is not None for s in segments)
    if short:
        q, k, v, ids = _many_rows_in_one(q_BxTxNxH, segments[0])
    else:
        q = q_BxTxNxH
        k = jnp.concatenate([_per_row(s.k, B) for s in segments], axis=1)
        v = jnp.concatenate([_per_row(s.v, B) for s in segments], axis=1)
        shown = jnp.concatenate([_per_row(_shown(s), B) for s in segments], axis=1)
        ids = jnp.zeros((B, T), jnp.int32), jnp.where(shown, 0, -1)
    if biases := [s.bias for s in segments if s.bias is not None]:
        known = jnp.stack([jnp.all((bias == 0) | (bias == MASK_VALUE)) for bias in biases]).all()
        q = q + jnp.where(known, 0.0, jnp.nan).astype(q.dtype)
    tokens, keys = q.shape[1], k.shape[1]
    tile_q, tile_kv = _tile(tokens), _tile(keys)
    shape = (-(-tokens // tile_q) * tile_q, -(-keys // tile_kv) * tile_kv)
    mask = splash.CausalMask(shape, offset=keys - tokens) if segments[-1].causal else splash.FullMask(shape)
    sizes = splash.BlockSizes(
        block_q=tile_q, block_kv=tile_kv, block_q_dkv=tile_q, block_kv_dkv=tile_kv, block_q_dq=tile_q,
        block_kv_dq=tile_kv,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )
    # A causal mask excludes the padded keys, which come after every query; without one a segment id does.
    if short or masked or (shape[1] != keys and not segments[-1].causal):
        ids = splash.SegmentIds(_padded(ids[0], 1, shape[0]), _padded(ids[1], 1, shape[1], -1))
    else:
        ids = None
    scaled = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    lanes = -(-H // LANES) * LANES
    heads_first = lambda x, size: _padded(_padded(jnp.swapaxes(x, 1, 2), 3, lanes), 2, size)  # noqa: E731
    out = jax.vmap(kernel)(heads_first(scaled, shape[0]), heads_first(k, shape[1]), heads_first(v, shape[1]), ids)
    out = cast(jax.Array, out)  # alone, for no residuals are asked for
    return jnp.swapaxes(out[:, :, :tokens, :H], 1, 2).reshape(-1, T, N, H)[:B]


def cudnn_attention(
    q_BxTxNxH: jax.Array, segments: tuple[Segment, ...], implementation: Literal["xla", "cudnn"] = "cudnn"
) -> jax.Array:
    """cuDNN's flash attention through `jax.nn.dot_product_attention`, masked by order and lengths alone.

    One segment of keys that all queries see alike: the masked ones are moved to the end, and a length excludes them. A
    segment with a length and then the queries' own: these are placed right after the first segment's last key, and the
    queries at the same slots (the slots before are unused), so that the causal mask alone is enough.

    Args:
      q_BxTxNxH, segments: a call for which `refusal("cudnn", ...)` is None.
      implementation: "cudnn", or "xla": the same call without the kernel.
    """
    B, T, _, _ = q_BxTxNxH.shape
    k, v = (_per_row(x, B) for x in (segments[0].k, segments[0].v))
    lengths = None
    even = lambda size: size + size % 2  # noqa: E731  # cuDNN has no gradient for odd lengths
    if len(segments) == 2:
        assert segments[0].length_Q is not None  # else `refusal` names it
        start_B = _per_row(segments[0].length_Q, B)
        slots = even(k.shape[1] + T)
        put = jax.vmap(lambda whole, part, at: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0))
        q = put(jnp.zeros((B, slots, *q_BxTxNxH.shape[2:]), q_BxTxNxH.dtype), q_BxTxNxH, start_B)
        put_own = lambda x, own: put(_padded(x, 1, slots), _per_row(own, B), start_B)  # noqa: E731
        k, v = put_own(k, segments[1].k), put_own(v, segments[1].v)
    else:
        q = q_BxTxNxH
        if segments[0].visible is not None or segments[0].length_Q is not None:
            shown = _per_row(_shown(segments[0]), B)
            order = jnp.argsort(~shown, axis=1, stable=True)[:, :, None, None]
            k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
            # A padding row sees nothing. It gets one key, since a softmax over no keys is undefined.
            lengths = jnp.maximum(shown.sum(1, dtype=jnp.int32), 1)
        elif k.shape[1] % 2 and not segments[0].causal:
            lengths = jnp.full((B,), k.shape[1], jnp.int32)
        q, k, v = (_padded(x, 1, even(x.shape[1])) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=segments[-1].causal, key_value_seq_lengths=lengths, implementation=implementation
    )
    if len(segments) == 2:
        out = jax.vmap(lambda whole, at: jax.lax.dynamic_slice_in_dim(whole, at, T, 0))(out, start_B)
    return checkpoint_name(out[:, :T], ATTENTION_OUTPUT)


def _shown(segment: Segment) -> jax.Array:
    """bool [Q, S]: the keys that any query sees, order apart."""
    Q, S = segment.k.shape[:2]
    shown = jnp.ones((Q, S), bool)
    if segment.visible is not None:
        shown = shown & segment.visible[:, 0, 0]
    if segment.length_Q is not None:
        shown = shown & (jnp.arange(S) < segment.length_Q[:, None])
    return shown if segment.bias is None else shown & (segment.bias > MASK_VALUE / 2)


def _per_row(x: jax.Array, rows: int) -> jax.Array:
    """Repeats what groups of rows share to one a row."""
    return x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0)


def _padded(x: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad, constant_values=fill)


def _tile(length: int) -> int:
    """Size of a tile: the largest that pads little more than the smallest would."""
    least = -(-length // LANES) * LANES
    return next(size for size in TILES if -(-length // size) * size <= least * 9 // 8)


def _many_rows_in_one(q: jax.Array, segment: Segment) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Short rows (windows of images) packed into sequences of `LANES`, separated by segment ids."""
    B, T = q.shape[:2]
    each = LANES // T
    count = -(-B // each)
    q, k, v = (_padded(x, 0, count * each).reshape(count, each * T, *x.shape[2:]) for x in (q, segment.k, segment.v))
    number = jnp.tile(jnp.repeat(jnp.arange(each, dtype=jnp.int32), T), (count, 1))
    shown = _padded(_shown(segment), 0, count * each).reshape(count, each * T)
    return q, k, v, (number, jnp.where(shown, number, -1))


def _on_mesh(kernel: Any, q: jax.Array, segments: tuple[Segment, ...], rows: str) -> jax.Array:
    """A kernel on each device's rows and heads. What does not divide over the devices is computed by all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return kernel(q, segments)
    B, _, N, _ = q.shape
    (by_row, shards), (by_head, parts) = mesh_axes(rows, "act_heads")
    if B % shards:
        by_row, shards = None, 1
    K = segments[0].k.shape[2]
    # Key heads that do not divide over the devices are repeated until they do: each device has its queries' keys.
    times = next((n for n in range(1, N // K + 1) if K * n % parts == 0 and N // K % n == 0), None)
    if times is None:
        by_head, times = None, 1
    heads = lambda x: x if times == 1 else jnp.repeat(x, times, axis=2)  # noqa: E731
    own = lambda x: x if len(x) % shards == 0 else _per_row(x, B)  # noqa: E731
    split = tuple(jax.tree.map(own, dataclasses.replace(s, k=heads(s.k), v=heads(s.v))) for s in segments)
    wide = PartitionSpec(by_row, None, by_head, None)
    specs = tuple(jax.tree.map(lambda x: wide if x.ndim == 4 else PartitionSpec(by_row), _flat(s)) for s in split)
    call = jax.shard_map(
        lambda q, flat: kernel(q, tuple(_whole(s) for s in flat)),
        in_specs=(wide, specs),
        out_specs=wide,
        check_vma=False,  # the kernels' results do not say over which axes they vary
    )
    return call(q, tuple(_flat(s) for s in split))


def mesh_axes(*names: str) -> list[tuple[Any, int]]:
    """Of logical axes what a `PartitionSpec` says of each, and the devices of the present mesh it is split over."""
    axes, shape = logical_to_mesh_axes(names), jax.sharding.get_abstract_mesh().shape
    assert axes is not None  # names were given
    parts = [() if by is None else (by,) if isinstance(by, str) else tuple(by) for by in axes]
    return [(by, math.prod(shape[name] for name in part)) for by, part in zip(axes, parts, strict=True)]


def _flat(segment: Segment) -> Segment:
    """With `visible` as [Q, S], so that only keys and values have four axes."""
    return segment if segment.visible is None else dataclasses.replace(segment, visible=segment.visible[:, 0, 0])


def _whole(segment: Segment) -> Segment:
    return segment if segment.visible is None else dataclasses.replace(segment, visible=segment.visible[:, None, None])
