"""Every way to compute attention against `jax.nn.dot_product_attention` with a dense mask, and that one's gradient.

The TPU's kernel runs by JAX's interpreter; cuDNN's call runs with the same arguments in `implementation="xla"`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CLOSE, OPEN, VOCAB, looking_questions, small_model

from qwenla_jax.model import attention, kernels
from qwenla_jax.model.attention import Segment, attention_with_weights, segment_attention
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.kernels import (
    attend,
    check_backend,
    cudnn_attention,
    describe,
    kernel_for,
    refusal,
    splash_attention,
)
from qwenla_jax.model.layers import MASK_VALUE
from qwenla_jax.model.qwen_vl import QwenVL
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.train.logprobs import response_logprobs, response_selection

INTERPRETED = functools.partial(splash_attention, interpret=True)
CUDNN = functools.partial(cudnn_attention, implementation="xla")


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def call(name, dtype=jnp.float32):
    """(queries, segments) of one of the package's calls, ragged, and which queries see anything: bool [B, T]."""
    rng = np.random.default_rng(len(name))
    make = functools.partial(normal, rng, dtype=dtype)
    Q, G, N, K, H = 2, 2, 4, 2, 16
    B = Q * G
    if name in ("windows", "frames", "whole"):
        # Five windows of 16 patch slots, or two frames of 141; slots that hold no patch, and rows that hold none.
        rows, S = (5, 16) if name == "windows" else (2, 141)
        seen = rng.random((rows, S)) < 0.7
        seen[-1] = False
        k, v = make(rows, S, N, H), make(rows, S, N, H)
        if name == "whole":
            return make(rows, S, N, H), (Segment(k, v),), np.ones((rows, S), bool)
        alive = np.broadcast_to(seen.any(1)[:, None], (rows, S))
        return make(rows, S, N, H), (Segment(k, v, jnp.asarray(seen)[:, None, None]),), alive
    T, P, S = 151, 70, 40  # odd, as lengths of prompts and responses together are
    prefix = Segment(make(Q, P, K, H), make(Q, P, K, H), length_Q=jnp.array([P, 33], jnp.int32))
    cache = Segment(make(B, S, K, H), make(B, S, K, H), length_Q=jnp.array([S, 0, 7, 3], jnp.int32))
    new = Segment(make(B, T, K, H), make(B, T, K, H), causal=True)
    hide = lambda size: jnp.asarray(np.where(rng.random((B, size)) < 0.3, MASK_VALUE, 0.0), jnp.float32)  # noqa: E731
    if name == "prompts":
        return make(B, T, N, H), (new,), np.ones((B, T), bool)
    if name == "responses":
        return make(B, T, N, H), (prefix, new), np.ones((B, T), bool)
    if name == "hidden":
        return make(B, T, N, H), (prefix, new.replace(bias=hide(T))), np.ones((B, T), bool)
    if name == "nothing":  # the first prompt is empty, and the first tokens of its rows are hidden
        bias = hide(T).at[:2, :5].set(MASK_VALUE).at[:2, 5].set(0.0)
        alive = np.ones((B, T), bool)
        alive[:2, :5] = False
        empty = prefix.replace(length_Q=jnp.array([0, 33], jnp.int32))
        return make(B, T, N, H), (empty, new.replace(bias=bias)), alive
    assert name == "served"
    new = new.replace(k=new.k[:, :20], v=new.v[:, :20], bias=hide(20))
    return make(B, 20, N, H), (prefix, cache.replace(bias=hide(S)), new), np.ones((B, 20), bool)


def dense(q, segments):
    """The library's attention with a mask that is written down entry by entry."""
    B, T = q.shape[:2]
    masks = []
    for s in segments:
        Q, S = s.k.shape[:2]
        mask = np.ones((B, T, S), bool)
        for b in range(B):
            row = b // (B // Q)
            for t in range(T):
                if s.visible is not None:
                    mask[b, t] &= np.asarray(s.visible)[row, 0, 0]
                if s.length_Q is not None:
                    mask[b, t, int(s.length_Q[row]) :] = False
                if s.bias is not None:
                    mask[b, t] &= np.asarray(s.bias)[row] == 0
                if s.causal:
                    mask[b, t, t + 1 :] = False
        masks.append(mask)
    mask = np.concatenate(masks, -1)[:, None]

    def compute(q, keys):
        k, v = (jnp.concatenate([jnp.repeat(x, B // len(x), 0) for x in xs], 1) for xs in zip(*keys, strict=True))
        return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask), implementation="xla")

    return compute


def run(compute, name, dtype):
    """What a way to compute gives: values, and the gradient of a weighted sum of those where a query sees something."""
    q, segments, alive = call(name, dtype)
    weight = np.random.default_rng(9).normal(size=q.shape) * alive[..., None, None]

    def loss(q, keys):
        out = compute(q, keys)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    program = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), gradients = program(q, tuple((s.k, s.v) for s in segments))
    assert out.dtype == q.dtype and out.shape == q.shape
    return [np.asarray(x, np.float32) for x in (out, *jax.tree.leaves(gradients))]


@functools.cache
def wanted(name, dtype):
    q, segments, _ = call(name, dtype)
    return run(dense(q, segments), name, dtype)


def compare(function, name, atol, dtype=jnp.float32):
    """Fails where a way to compute a call differs from the library's."""
    _, segments, alive = call(name, dtype)

    def ours(q, keys):
        return function(q, tuple(s.replace(k=k, v=v) for s, (k, v) in zip(segments, keys, strict=True)))

    out, *gradients = run(ours, name, dtype)
    want, *others = wanted(name, dtype)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[alive], want[alive], atol=atol)
    for one, other in zip(gradients, others, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=4 * atol, rtol=10 * atol)


@functools.cache
def small():
    return small_model(remat="dots")


CALLS = ("prompts", "responses", "hidden", "nothing", "served", "windows", "frames")


@pytest.mark.parametrize("name", CALLS)
def test_splash_is_plain_attention(name):
    assert refusal("splash", *call(name)[:2]) is None
    compare(INTERPRETED, name, 1e-5)


@pytest.mark.parametrize("name", ["hidden", "windows"])
def test_splash_in_bfloat16(name):
    compare(INTERPRETED, name, 3e-2, jnp.bfloat16)


def test_a_bias_that_splash_cannot_add_gives_nan_and_no_other_softmax():
    q, segments, _ = call("hidden")
    wrong = (segments[0], segments[1].replace(bias=segments[1].bias.at[1, 3].set(0.5)))
    assert np.isnan(jax.jit(INTERPRETED)(q, wrong)).all()


@pytest.mark.parametrize(
    ("name", "blocks"), [(name, True) for name in CALLS] + [("nothing", False), ("windows", False)]
)
def test_plain_attention_whole_and_in_blocks(name, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(attention, "SCORE_BYTES", 1)
        monkeypatch.setattr(attention, "LEAST_QUERIES", 8)  # divides neither 150, 140 nor 20
    compare(segment_attention, name, 1e-5)


def test_blocks_of_queries_with_a_mask_of_their_own_and_watched(monkeypatch):
    """A mask that differs from query to query, and what is paid to watched keys, in blocks as whole."""
    rng = np.random.default_rng(3)
    q, segments, _ = call("served")
    visible = rng.random((2, 2, 20, 70)) < 0.5
    segments = (segments[0].replace(visible=jnp.asarray(visible)), *segments[1:])
    weight = normal(rng, *q.shape)
    result = []
    for size, queries in ((attention.SCORE_BYTES, attention.LEAST_QUERIES), (1, 8)):
        monkeypatch.setattr(attention, "SCORE_BYTES", size)
        monkeypatch.setattr(attention, "LEAST_QUERIES", queries)
        out, received = jax.jit(lambda q, segments: attention_with_weights(q, segments, (0, 2)))(q, segments)
        gradient = jax.jit(jax.grad(lambda q, segments: jnp.sum(weight * segment_attention(q, segments))))
        result.append((out, *received, gradient(q, segments)))
    assert [x.shape for x in result[1][1:3]] == [(4, 20, 70), (4, 20, 20)]
    for one, other in zip(*result, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_embedded_default_is_never_cut_and_a_long_call_is():
    """By hand: 4 heads, 64 queries, 400 keys are 0.4 MB of scores; 28 heads, 9,216 by 9,216 are 9.5 GB a row."""
    size = lambda T, S, N: attention._block_size(  # noqa: E731
        jax.ShapeDtypeStruct((8, T, N, 128), jnp.float32),
        [Segment(jax.ShapeDtypeStruct((8, S, 2, 128), jnp.float32), None)],
    )
    assert [size(64, 400, 4), size(1, 100_000, 28), size(9216, 9216, 28), size(1600, 1600, 16)] == [64, 1, 128, 128]
    assert [size(4096, 1024, 4), size(1024, 1024, 4)] == [1024, 1024]


@pytest.mark.parametrize("name", ["prompts", "responses", "windows", "frames", "whole"])
def test_what_cudnn_is_asked_for_is_plain_attention(name, monkeypatch):
    q, segments, _ = call(name)
    compare(CUDNN, name, 1e-5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, (q, segments))
    assert refusal("cudnn", *half) is None
    asked = []

    def library(q, k, v, **arguments):
        asked.append(arguments)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16 and k.shape == v.shape and len(q) == len(k)
        assert not q.shape[1] % 2 and not k.shape[1] % 2  # on an H200, jax 0.11 refuses the gradient of odd lengths
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    assert attend("cudnn", *half).shape == q.shape
    (asked,) = asked
    lengths = asked.pop("key_value_seq_lengths")
    assert asked == {"is_causal": name in ("prompts", "responses"), "implementation": "cudnn"}
    if asked["is_causal"]:
        assert lengths is None
    elif name == "whole":
        assert lengths.tolist() == [141, 141]
    else:
        want = np.maximum(np.asarray(segments[0].visible)[:, 0, 0].sum(1), 1)
        assert lengths.dtype == jnp.int32 and lengths.tolist() == want.tolist()


def test_what_no_kernel_takes():
    plain = {name: call(name)[:2] for name in CALLS}
    half = {name: call(name, jnp.bfloat16)[:2] for name in CALLS}
    q, (prefix, new) = plain["responses"]
    assert {name: refusal("splash", *plain[name]) for name in CALLS} == dict.fromkeys(CALLS)
    assert {name: refusal("cudnn", *half[name]) for name in CALLS} == dict.fromkeys(CALLS) | {
        "hidden": "keys hidden by a bias",
        "nothing": "keys hidden by a bias",
        "served": "keys hidden by a bias",
    }
    assert refusal("cudnn", q, (prefix, new)) == "type float32"
    for kernel in ("splash", "cudnn"):
        assert refusal(kernel, q[:, :1], (prefix,)) == "one query"
        assert refusal(kernel, q, (new, prefix)) == "keys in order before other keys"
        each = prefix.replace(visible=jnp.ones((2, 2, 150, 70), bool))
        assert refusal(kernel, q, (each, new)) == "queries that see different keys"
    wide, few = (jnp.zeros((4, 150, 4, size), jnp.bfloat16) for size in (256, 20))
    assert [refusal("cudnn", x, (new,)) for x in (wide, few)] == ["head size 256", "head size 20"]
    short = new.replace(length_Q=jnp.zeros(4, jnp.int32))
    assert refusal("cudnn", q.astype(jnp.bfloat16), (short,)) == "masked keys in order"
    for shards in ((prefix, prefix, new), (prefix, prefix), (prefix.replace(length_Q=None), new), (prefix, short)):
        assert refusal("cudnn", q.astype(jnp.bfloat16), shards) == "several runs of keys"


def test_which_kernel_a_backend_gets():
    got = {(choice, backend): kernel_for(choice, backend, "9.0") for choice in ("auto", "xla", "splash", "cudnn")
           for backend in ("cpu", "gpu", "tpu")}  # fmt: skip
    assert [got["auto", backend] for backend in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert all(got[choice, backend] == choice for choice, backend in got if choice != "auto")
    # Before Ampere, and on GPUs that are not NVIDIA's, there is no such kernel.
    assert [kernel_for("auto", "gpu", name) for name in ("7.5", "8.0", "10.0", "gfx90a", "")] == [
        "xla", "cudnn", "cudnn", "xla", "xla",
    ]  # fmt: skip
    for choice, backend in (("splash", "cpu"), ("cudnn", "tpu")):
        with pytest.raises(ValueError, match=f"config.attention: {choice} needs a"):
            check_backend(choice, backend)
    check_backend("splash", "tpu"), check_backend("cudnn", "gpu"), check_backend("auto", "cpu")


def test_the_line_for_the_log():
    config = small()[0].config
    assert describe("auto", "xla", config) == describe("auto", "splash", config) == "attention in plain XLA"
    message = "attention by splash in the decoder and vision tower from 2 queries on"
    assert describe("splash", "splash", config) == message
    assert describe("cudnn", "cudnn", config) == "attention in plain XLA"  # float32
    with pytest.raises(ValueError, match="attention 'flash' is not one of auto, xla, splash, cudnn"):
        ModelConfig(**(vars(config) | {"attention": "flash"}))


def test_auto_takes_the_kernel_for_large_calls_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    taken = []
    monkeypatch.setattr(kernels, "splash_attention", lambda q, segments: taken.append(q.shape) or q)
    make = lambda T, H: (jnp.zeros((2, T, 2, H)), (Segment(*[jnp.zeros((2, T, 2, H))] * 2, causal=True),))  # noqa: E731
    shapes = lambda choice, *sizes: jax.eval_shape(lambda: attend(choice, *make(*sizes)))  # noqa: E731
    for sizes in ((128, 64), (127, 64), (128, 32), (1, 128)):
        shapes("auto", *sizes)
    assert taken == [(2, 128, 2, 64)]
    shapes("xla", 128, 64), shapes("splash", 20, 16)
    assert taken[1:] == [(2, 20, 2, 16)]


def test_a_model_with_the_kernel_computes_the_same(monkeypatch):
    """Vision tower, prompts, shared prefix, hidden slots of ROUTE, responses: log-probabilities and their gradient."""
    reattention = ReattentionConfig(
        "route", form="bias", max_insertions=2, rows_at_once=4, open_id=OPEN, close_id=CLOSE
    )
    vision, prompts, _ = looking_questions(2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 80, (4, 10)).astype(np.int32)
    ids[:, 3], ids[1:, 6] = OPEN, OPEN
    length = np.array([10, 9, 7, 10], np.int32)
    calls = []

    def counted(q, segments):
        calls.append((q.shape[1], len(segments)))
        return INTERPRETED(q, segments)

    monkeypatch.setattr(kernels, "splash_attention", counted)
    result = []
    model, params = small()
    kept = jax.jit(lambda params: response_selection(model, params, vision, prompts, ids, length, reattention, 2))(
        params
    )
    for choice in ("xla", "splash"):
        model = QwenVL(dataclasses.replace(model.config, attention=choice))

        def loss(params, model=model):
            logp, _ = response_logprobs(
                model, params, vision, prompts, ids, jnp.zeros(VOCAB), 1.0, reattention, length, kept
            )
            counts = np.arange(10) < length[:, None]
            return jnp.sum(jnp.where(counts, logp, 0.0)), logp * counts

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        result.append(jax.device_get(run(params)))
        assert bool(calls) == (choice == "splash")
    assert {shards for _, shards in calls} == {1, 2} and {tokens for tokens, _ in calls} >= {16, 24}
    ((_, logp), gradient), ((_, logp1), gradient1) = result
    np.testing.assert_allclose(logp, logp1, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient1), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=1e-4)
