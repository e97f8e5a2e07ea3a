"""The sampler against the model itself: no cache, one row at a time, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import IMAGE, START, STOP, VOCAB, questions, sampler_of, small_model

from qwenla_jax.model.pages import append, empty_pages, reads
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.sampling.prefill import encode_prompts, text_positions
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.logprobs import response_logprobs

BIAS = suppression_bias(VOCAB, VOCAB, [IMAGE, IMAGE + 1, START, START + 1])
OPTIONS = SampleOptions(group_size=3, max_new_tokens=12, temperature=0.7, top_p=1.0, stop_ids=(STOP, 95))


@functools.cache
def model():
    return small_model()


@functools.cache
def sampler(options):
    return sampler_of(model()[0], options)


def draw(options, vision, prompts, params=None, numbers=None, seed=0, step=0):
    rows = len(prompts.length_Q) * options.group_size
    numbers = np.arange(rows, dtype=np.uint32) if numbers is None else np.asarray(numbers, np.uint32)
    params = model()[1] if params is None else params
    return jax.device_get(sampler(options)(params, vision, prompts, BIAS, np.uint32(seed), np.uint32(step), numbers))


def full_logits(params, vision, prompts, row, response):
    """Logits at every position of one prompt with its response, in one pass without any cache."""
    n = int(prompts.length_Q[row])
    ids = np.concatenate([prompts.ids_QxP[row, :n], response])[None]
    visual = np.concatenate([prompts.visual_QxP[row, :n], np.full(len(response), -1, np.int32)])[None]
    pos = np.concatenate(
        [prompts.pos_QxPx3[row, :n], prompts.next_pos_Q[row] + np.arange(len(response))[:, None] + np.zeros(3, int)]
    )[None].astype(np.int32)
    hidden = model()[0].apply({"params": params}, vision, ids, pos, visual)
    return np.asarray(logits_of(params, hidden))[0, n - 1 :]


def test_log_probabilities_are_those_of_a_full_pass():
    vision, prompts = questions(2)
    rollout = draw(OPTIONS, vision, prompts)
    for row in range(6):
        n = rollout.length_B[row]
        logits = full_logits(model()[1], vision, prompts, row // 3, rollout.ids_BxR[row, :n]) + BIAS
        want = jax.nn.log_softmax(logits[:n] / 0.7)[np.arange(n), rollout.ids_BxR[row, :n]]
        np.testing.assert_allclose(rollout.logp_BxR[row, :n], want, atol=1e-5)
        assert not rollout.logp_BxR[row, n:].any()


def test_greedy_is_the_argmax_of_a_full_pass():
    vision, prompts = questions(2, seed=3)
    rollout = draw(SampleOptions(1, 12, 0.0, 1.0, (STOP,)), vision, prompts)
    for row in range(2):
        n = rollout.length_B[row]
        logits = full_logits(model()[1], vision, prompts, row, rollout.ids_BxR[row, :n]) + BIAS
        assert np.array_equal(logits[:n].argmax(-1), rollout.ids_BxR[row, :n])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(temperature):
    """Also with other parameters, as after an update."""
    net, params = model()
    vision, prompts = questions(2)
    options = SampleOptions(3, 12, temperature, 1.0, (STOP, 95))
    trainer = jax.jit(functools.partial(response_logprobs, net, temperature=temperature))
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    for weights in (params, moved):
        rollout = draw(options, vision, prompts, weights)
        logp, entropy = trainer(weights, vision, prompts, rollout.ids_BxR, BIAS)
        counted = np.arange(12) < rollout.length_B[:, None]
        assert np.abs((np.asarray(logp) - rollout.logp_BxR) * counted).max() < 1e-5
        assert (np.asarray(entropy)[counted] > 0).all()
    stale, _ = trainer(moved, vision, prompts, draw(options, vision, prompts).ids_BxR, BIAS)
    assert np.abs(np.asarray(stale) - draw(options, vision, prompts).logp_BxR).max() > 0.1


def test_a_rows_text_is_independent_of_its_neighbours():
    vision, prompts = questions(4, seed=5)
    whole = draw(OPTIONS, vision, prompts)
    order = np.array([2, 0, 3, 1])
    numbers = (order[:, None] * 3 + np.arange(3)).reshape(-1)
    swapped = jax.tree.map(lambda x: x[order], prompts)  # `visual` still names the images where they lie
    other = draw(OPTIONS, vision, swapped, numbers=numbers)
    assert np.array_equal(other.ids_BxR, whole.ids_BxR[numbers])
    assert np.array_equal(other.length_B, whole.length_B[numbers])
    strangers = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), prompts, questions(4, seed=6)[1])
    alone = draw(OPTIONS, vision, strangers)
    assert np.array_equal(alone.ids_BxR[:3], whole.ids_BxR[:3])
    assert not np.array_equal(alone.ids_BxR[3:], whole.ids_BxR[3:])


def test_the_images_matter():
    vision, prompts = questions(2)
    rollout = draw(OPTIONS, vision, prompts)
    shuffled = jax.tree.map(lambda x: x[::-1], vision)
    net, params = model()
    score = jax.jit(functools.partial(response_logprobs, net, temperature=0.7))
    right, wrong = (np.asarray(score(params, v, prompts, rollout.ids_BxR, BIAS)[0]) for v in (vision, shuffled))
    assert (np.abs(right - wrong).max(1) > 1e-2).all()


def test_steps_and_seeds_draw_anew_and_repeat_exactly():
    vision, prompts = questions(2)
    first = draw(OPTIONS, vision, prompts)
    assert np.array_equal(first.ids_BxR, draw(OPTIONS, vision, prompts).ids_BxR)
    assert not np.array_equal(first.ids_BxR, draw(OPTIONS, vision, prompts, step=1).ids_BxR)
    assert not np.array_equal(first.ids_BxR, draw(OPTIONS, vision, prompts, seed=1).ids_BxR)


def test_stop_tokens_end_a_row_and_forbidden_ones_never_come():
    vision, prompts = questions(4, seed=8)
    ends, seen = [], set()
    for step in range(6):
        rollout = draw(OPTIONS, vision, prompts, step=step)
        for ids, n, stopped in zip(rollout.ids_BxR, rollout.length_B, rollout.stopped_B, strict=True):
            assert stopped == (ids[n - 1] in (STOP, 95))
            assert stopped or n == 12
            assert not set(ids[: n - 1]) & {STOP, 95}
            ends.append(bool(stopped))
            seen |= set(ids[:n].tolist())
    assert any(ends) and not all(ends)
    assert not seen & {IMAGE, IMAGE + 1, START, START + 1}


def test_cache_in_pieces_is_the_full_pass():
    """Tokens fed one by one and in runs of different lengths a row give the hidden states of one pass."""
    net, params = model()
    vision, prompts = questions(2)
    _, prefix, _ = encode_prompts(net, params, vision, prompts)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, IMAGE, (2, 7)).astype(np.int32)
    apply = functools.partial(net.apply, {"params": params})
    x = apply(ids, None, None, method="embed")
    pos = text_positions(jnp.asarray(prompts.next_pos_Q), 7)
    whole = apply(x, pos, prefix, method="decode").hidden_BxTxD
    cache = empty_pages(2, 2, 4, 2, 2, 8, "float32")
    got = np.zeros(whole.shape, np.float32)
    fed = np.zeros(2, np.int32)
    for counts in ([1, 1], [3, 1], [1, 3], [2, 2]):
        longest = max(counts)
        index = np.minimum(fed[:, None] + np.arange(longest), 6)
        take = np.arange(2)[:, None], index
        hidden, new, _ = apply(x[take], pos[take], prefix, reads(cache), method="decode")
        cache = append(reads(cache), *new, jnp.asarray(counts, jnp.int32), None)
        for row, count in enumerate(counts):
            got[row, fed[row] : fed[row] + count] = hidden[row, :count]
        fed += counts
    assert fed.tolist() == [7, 7] and cache.length_R.tolist() == [7, 7]
    np.testing.assert_allclose(got, whole, atol=1e-5)
