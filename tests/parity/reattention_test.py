"""COPY and ROUTE against transformers: logits, greedy continuations, and what ROUTE keeps and why.

`QWENLA_ARCHITECTURES=24` tries more random models, as in `model_test.py`.
"""

import functools
import os
from types import SimpleNamespace

import jax
import numpy as np
import plain
import pytest
import torch
from models import sampler_of
from official import CAP, Ids, Official, ids_of, responses, with_block

import qwenla_jax
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.reattention import splice
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.reattention.route import select
from qwenla_jax.sampling import slots, step
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.logprobs import response_logprobs, response_selection, response_states

TOLERANCE = 1e-4
# Odd grids, two images, padded batches, rows without an image, one to four KV heads, tied and untied.
MORE = "QWENLA_ARCHITECTURES" in os.environ
FAST, SLOW = (5, 12), (3, 4, 7, 14, 15) if MORE else (4, 7, 14)
# Of Qwen3-VL (conftest.py), whose inserted tokens have features for DeepStack: padded rows, and two images.
QWEN3, QWEN3_SLOW = (104, 111), (100, 106, 107) if MORE else (106,)


def cases(fast, slow):
    """Parameters of a test, those of the second kind marked as slow."""
    return [*fast, *(pytest.param(*values, marks=pytest.mark.slow) for values in slow)]


def ours(model, params, vision, prompts, ids_BxR, reattention, selected=None):
    """Logits that predict each response token, and what was kept."""

    @jax.jit
    def run(params, vision, prompts, ids_BxR):
        length_B = np.full(len(ids_BxR), ids_BxR.shape[1], np.int32)
        chosen = selected
        if chosen is None and reattention.inserts:
            chosen = response_selection(model, params, vision, prompts, ids_BxR, length_B, reattention, CAP)
        states = response_states(model, params, vision, prompts, ids_BxR, reattention, length_B, chosen)
        return logits_of(params, states), chosen

    return jax.device_get(run(params, vision, prompts, ids_BxR))


def look_options(arch, **changes):
    open_id, close_id = ids_of(arch)
    return ReattentionConfig(
        **{"mode": "copy", "max_insertions": CAP, "open_id": open_id, "close_id": close_id} | changes
    )


def kept_sets(c, q, kept_ExX):
    """The visual tokens of question q that each insertion shows, by their number within the prompt."""
    own = np.flatnonzero(c.prompts.visual_QxP[q] >= 0).tolist()
    source_X = c.prompts.block.source_QxX[q]
    return [{own.index(s) for s in source_X[np.flatnonzero(selected_X)] if s in own} for selected_X in kept_ExX]


@pytest.fixture
def case(oracle, saved):
    """A function: seed -> model of both sides with the same inputs."""

    def make(seed):
        arch = oracle.architecture(seed)
        official, folder = saved(arch)
        batch = oracle.inputs(arch)
        model, params = qwenla_jax.load(folder)
        prompts = with_block(batch, arch, oracle)
        return SimpleNamespace(
            arch=arch,
            hf=Official(official, Ids.of(arch), batch, oracle.cases[arch.case]),
            model=model,
            params=params,
            vision=batch.vision,
            prompts=prompts,
            oracle=oracle,
        )

    return make


@pytest.mark.parametrize("seed", cases(FAST + QWEN3, [(seed,) for seed in SLOW + QWEN3_SLOW]))
@torch.no_grad()
def test_copy_is_the_image_given_again(case, seed):
    c = case(seed)
    Q = len(c.prompts.length_Q)
    ids_BxR = responses(c.arch, Q, 20, seed)
    logits, _ = ours(c.model, c.params, c.vision, c.prompts, ids_BxR, look_options(c.arch))
    for q in range(Q):
        expected = c.hf.logits(q, ids_BxR[q])[:-1].numpy()
        np.testing.assert_allclose(logits[q], expected, atol=TOLERANCE, rtol=0)
        if c.hf.rows[q].grids:  # the tolerance sees the images
            assert np.abs(c.hf.logits(q, ids_BxR[q], tags=0)[:-1].numpy() - expected).max() > 100 * TOLERANCE


# What is given again (None: all), and in which form.
SAMPLED = cases(
    [(5, None, "compact"), (12, 0.3, "compact"), (111, None, "compact"), (104, 0.3, "compact")],
    [(4, 0.7, "bias"), (7, None, "compact"), (106, 0.7, "bias")]
    + MORE * [(3, 0.1, "compact"), (14, 0.7, "compact"), (15, None, "compact")],
)


@pytest.mark.parametrize("seed, share, form", SAMPLED)
def test_sampling_is_greedy_over_the_expanded_prompt(case, seed, share, form):
    """The tag is made likely enough that it comes; rows get their images at different steps."""
    c = case(seed)
    Q, tokens = len(c.prompts.length_Q), c.oracle.tokens
    logit_bias_V = suppression_bias(c.arch.vocab, c.arch.vocab, range(c.arch.vocab - 4, c.arch.vocab))
    imaged = next(q for q, row in enumerate(c.hf.rows) if row.grids)
    while ids_of(c.arch)[0] not in c.hf.greedy(imaged, 24, logit_bias_V):
        logit_bias_V[ids_of(c.arch)[0]] += 0.5
    mode = {} if share is None else {"mode": "route", "keep_ratio": share, "form": form}
    reattention = look_options(c.arch, rows_at_once=2, **mode)
    options = SampleOptions(1, tokens, 0.0, 1.0, (c.arch.vocab - 1,), reattention)
    run = sampler_of(c.model, options)
    rollout = run(
        c.params, c.vision, c.prompts, logit_bias_V, np.uint32(0), np.uint32(0), np.arange(Q, dtype=np.uint32)
    )
    expected = [c.hf.greedy(q, tokens, logit_bias_V, share) for q in range(Q)]
    np.testing.assert_array_equal(rollout.ids_BxR, expected)
    tags = [row[:-1].count(ids_of(c.arch)[0]) for row in expected]
    assert tags[imaged] > 0
    for q, row in enumerate(c.hf.rows):
        assert rollout.inserted_B[q] == (min(tags[q], CAP) if row.grids else 0)
        assert rollout.skipped_B[q] == tags[q] - rollout.inserted_B[q]
        if share is not None:
            with torch.no_grad():
                selected = c.hf.routed(q, expected[q][:-1], share)[1]
            assert kept_sets(c, q, rollout.selected_BxExX[q])[: len(selected)] == selected


ROUTED = cases(
    [
        *[(5, 0.1, "compact"), (5, 0.7, "compact"), (12, 0.3, "compact"), (5, 0.5, "bias")],
        *[(104, 0.5, "compact"), (111, 0.3, "bias")],
    ],
    [(4, 0.3, "compact"), (7, 0.5, "compact"), (14, 0.1, "bias"), (106, 0.7, "compact")]
    + MORE
    * [
        *[(5, 0.3, "compact"), (12, 0.1, "compact"), (12, 0.7, "compact"), (12, 0.5, "bias")],
        *[(3, 0.7, "bias"), (15, 0.7, "compact")],
    ],
)


@pytest.mark.parametrize("seed, share, form", ROUTED)
@torch.no_grad()
def test_route_is_the_most_attended_tokens_at_their_positions(case, monkeypatch, seed, share, form):
    """Scores, the kept set, and the logits of the whole response, before and after the insertions."""
    found_ExBxP = []

    def recorded(options, prompts, received_BxP, shown_B):
        jax.debug.callback(lambda x: found_ExBxP.append(np.asarray(x)), received_BxP, ordered=True)
        return select(options, prompts, received_BxP, shown_B)

    monkeypatch.setattr(splice, "select", recorded)
    c = case(seed)
    Q = len(c.prompts.length_Q)
    ids_BxR = responses(c.arch, Q, 20, seed)
    reattention = look_options(c.arch, mode="route", keep_ratio=share, form=form)
    logits, selected_BxExX = ours(c.model, c.params, c.vision, c.prompts, ids_BxR, reattention)
    jax.effects_barrier()
    by_attention = 0
    for q, row in enumerate(c.hf.rows):
        expected, selected, scores = c.hf.routed(q, ids_BxR[q].tolist(), share)
        own = np.flatnonzero(c.prompts.visual_QxP[q] >= 0)
        for e, (want, score_M) in enumerate(zip(selected, scores, strict=True)):
            np.testing.assert_allclose(found_ExBxP[e][q][own], score_M, rtol=TOLERANCE, atol=1e-6)
            assert kept_sets(c, q, selected_BxExX[q])[e] == want
            assert len(want) == plain.share_of(share, len(own))
            by_attention += want != set(range(len(want)))
        np.testing.assert_allclose(logits[q], expected[:-1], atol=TOLERANCE, rtol=0)
        if row.grids:  # the tolerance sees what is left out
            assert np.abs(c.hf.logits(q, ids_BxR[q])[:-1].numpy() - expected[:-1].numpy()).max() > 10 * TOLERANCE
    assert by_attention  # and not by raster order


@pytest.mark.parametrize("seed", (FAST[1], QWEN3[1]))
def test_the_ends_of_route(case, seed):
    """All of the tokens are COPY, none of them is text alone."""
    c = case(seed)
    ids_BxR = responses(c.arch, len(c.prompts.length_Q), 20, seed)
    run = functools.partial(ours, c.model, c.params, c.vision, c.prompts, ids_BxR)
    copied, blind = (run(look_options(c.arch, mode=mode))[0] for mode in ("copy", "none"))
    for form in ("compact", "bias"):
        for share, same in ((1.0, copied), (0.0, blind)):
            np.testing.assert_array_equal(run(look_options(c.arch, mode="route", keep_ratio=share, form=form))[0], same)


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "without_features"])
@pytest.mark.parametrize("mode", ["copy", "route"])
def test_replay_is_what_was_sampled(case, monkeypatch, mode, dropped):
    """Log-probabilities of two samples a question; an insertion without its features for DeepStack is seen."""
    c = case(QWEN3[0])
    width = c.model.config.text.hidden_size
    embed = step.embed_with_sources
    bare = lambda *args: embed(*args[:-1], args[-1].at[..., width:].set(0))  # noqa: E731
    monkeypatch.setattr(step, "embed_with_sources", bare if dropped else embed)
    slots._programs_alone.cache_clear()
    Q = len(c.prompts.length_Q)
    logit_bias_V = suppression_bias(c.arch.vocab, c.arch.vocab, range(c.arch.vocab - 4, c.arch.vocab))
    logit_bias_V[ids_of(c.arch)[0]] += 3
    reattention = look_options(c.arch, mode=mode, rows_at_once=2)
    sample = sampler_of(c.model, SampleOptions(2, 24, 1.0, 1.0, (c.arch.vocab - 1,), reattention))
    rollout = sample(c.params, c.vision, c.prompts, logit_bias_V, 0, 0, np.arange(2 * Q, dtype=np.uint32))
    slots._programs_alone.cache_clear()
    assert rollout.inserted_B.sum() > Q
    replayed = jax.jit(functools.partial(response_logprobs, c.model, temperature=1.0, reattention=reattention))
    given = c.params, c.vision, c.prompts, rollout.ids_BxR, logit_bias_V
    logp_BxR, _ = replayed(*given, length_B=rollout.length_B, selected_BxExX=rollout.selected_BxExX)
    here_BxR = np.arange(24) < rollout.length_B[:, None]
    distance = np.abs(np.where(here_BxR, logp_BxR - rollout.logp_BxR, 0)).max()
    assert distance > 100 * TOLERANCE if dropped else distance < TOLERANCE, distance
