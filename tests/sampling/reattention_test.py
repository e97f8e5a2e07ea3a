"""Sampling with insertions: against sequences written out in full, against the trainer, and row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from models import (
    CLOSE,
    END,
    IMAGE,
    OPEN,
    START,
    STOP,
    VIDEO,
    VOCAB,
    looking_questions,
    round_alike,
    sampler_of,
    small_model,
)

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.logprobs import response_logprobs, response_selection
from qwenla_jax.utils.compile_counter import CompileCounter

Q, G, R, CAP = 4, 3, 14, 2
BIAS = suppression_bias(VOCAB, VOCAB, [IMAGE, VIDEO, START, END])
BIAS[OPEN] += 3.0
COPY = ReattentionConfig("copy", max_insertions=CAP, rows_at_once=2, open_id=OPEN, close_id=CLOSE)
ROUTE = dataclasses.replace(COPY, mode="route", keep_ratio=0.5)
HIDING = dataclasses.replace(ROUTE, form="bias")
SHUT = dataclasses.replace(COPY, mode="vision_only")
# A block takes 4 to 12 slots: some prompts have room for two, some for one, some for none.
TIGHT = dataclasses.replace(COPY, max_insertions=3, max_inserted_tokens=12)


@functools.cache
def model():
    return small_model(initializer_range=0.2)


@functools.cache
def moved():
    """The parameters as after an update."""
    return jax.tree.map(lambda x: x + 0.03 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), model()[1])


@functools.cache
def sampler(reattention, temperature):
    options = SampleOptions(G, R, temperature, 1.0, (STOP, 95), reattention)
    return sampler_of(model()[0], options, rounds_alike=True)


@functools.cache
def trainer(reattention, temperature):
    def run(params, vision, prompts, ids_BxR, length_B, selected_BxExX):
        return response_logprobs(
            model()[0], params, vision, prompts, ids_BxR, BIAS, temperature, reattention, length_B, selected_BxExX
        )[0]

    return jax.jit(run)


@functools.cache
def selector(reattention):
    def run(params, vision, prompts, ids_BxR, length_B):
        return response_selection(
            model()[0], params, vision, prompts, ids_BxR, length_B, reattention, reattention.max_insertions
        )

    return jax.jit(run)


@functools.cache
def in_full():
    """Log-probabilities of everything, from one pass without any cache: [B, T, V]."""

    @jax.jit
    def run(params, vision, ids, pos, visual, temperature):
        logits = logits_of(params, model()[0].apply({"params": params}, vision, ids, pos, visual))
        return jax.nn.log_softmax((logits + BIAS) / temperature)

    return run


def draw(reattention, vision, prompts, temperature=1.0, params=None, numbers=None, step=0):
    numbers = np.arange(len(prompts.length_Q) * G) if numbers is None else np.asarray(numbers)
    params = model()[1] if params is None else params
    run = sampler(reattention, temperature)
    return jax.device_get(run(params, vision, prompts, BIAS, np.uint32(0), np.uint32(step), numbers.astype(np.uint32)))


def allowed(reattention, prompts, q):
    """Insertions that question `q` has room for, by hand."""
    tokens, images = int(prompts.block.tokens_QxN[q].sum()), int((prompts.block.tokens_QxN[q] > 0).sum())
    if not images:
        return 0
    if reattention.max_inserted_tokens is None:
        return reattention.max_insertions
    return min(reattention.max_insertions, reattention.max_inserted_tokens // (tokens + 2 * images))


def visual_kept(prompts, q, selected_X):
    """Numbers of the visual tokens among the slots that were kept."""
    n = int(prompts.block.length_Q[q])
    own = np.flatnonzero(prompts.visual_QxP[q] >= 0).tolist()
    return {
        own.index(s) for s, k in zip(prompts.block.source_QxX[q, :n], selected_X[:n], strict=True) if k and s in own
    }


def tags_of(rollout, row):
    """Tags that have a token behind them."""
    return int((rollout.ids_BxR[row, : rollout.length_B[row] - 1] == OPEN).sum())


CASES = [
    pytest.param(COPY, 1.0, id="copy"),
    pytest.param(ROUTE, 0.7, id="route-compact"),
    pytest.param(HIDING, 1.0, id="route-bias"),
    pytest.param(SHUT, 0.7, id="vision_only"),
    pytest.param(TIGHT, 1.0, id="budget"),
]


@pytest.mark.parametrize(("reattention", "temperature"), CASES)
def test_sampler_trainer_and_the_sequence_in_full_agree(reattention, temperature):
    """Also with other parameters, as after an update."""
    vision, prompts, grids = looking_questions(Q)
    counts, refused, forced = [], 0, 0
    for step, params in enumerate((model()[1], moved()), 1):
        rollout = draw(reattention, vision, prompts, temperature, params, step=step)
        ids, length = rollout.ids_BxR, rollout.length_B
        counted = np.arange(R) < length[:, None]
        logp = np.asarray(
            trainer(reattention, temperature)(params, vision, prompts, ids, length, rollout.selected_BxExX)
        )
        rows = []
        for b in range(Q * G):
            q, n, most = b // G, int(length[b]), allowed(reattention, prompts, b // G)
            used = min(tags_of(rollout, b), most)
            assert rollout.inserted_B[b] == used and rollout.skipped_B[b] == tags_of(rollout, b) - used
            counts.append(tags_of(rollout, b) if grids[q] else -1)
            refused += int(rollout.skipped_B[b]) if grids[q] else 0
            selected = [visual_kept(prompts, q, rollout.selected_BxExX[b, e]) for e in range(used)]
            rows.append(plain.write_out(prompts, grids, q, ids[b, :n], most, selected))
            if reattention.mode == "vision_only":
                first = np.flatnonzero(ids[b, : n - 1] == OPEN)[:used] + 1
                assert (ids[b, first] == CLOSE).all() and not rollout.logp_BxR[b, first].any()
                counted[b, first], forced = False, forced + len(first)
        whole = np.asarray(in_full()(params, vision, *plain.stack(rows, 64), temperature))
        for b, row in enumerate(rows):
            n = int(length[b])
            pred = [row.prompt - 1, *row.slot_R[:-1]]
            want = whole[b, pred, ids[b, :n]]
            np.testing.assert_allclose(logp[b, :n], want, atol=1e-5, rtol=0)
            at = counted[b, :n]
            np.testing.assert_allclose(rollout.logp_BxR[b, :n][at], want[at], atol=1e-5, rtol=0)
        assert np.abs((logp - rollout.logp_BxR) * counted).max() < 1e-5
    assert {0, 1, 2} <= set(counts) and max(counts) > CAP and refused > 0
    assert bool(forced) == (reattention.mode == "vision_only")


def test_the_budget_gives_some_prompts_fewer_than_the_cap():
    _, prompts, _ = looking_questions(Q)
    room = {allowed(TIGHT, prompts, q) for q in range(Q)}
    assert len(room) == 3 and max(room) < TIGHT.max_insertions


@pytest.mark.parametrize("reattention", [ROUTE, HIDING], ids=["compact", "bias"])
def test_route_records_what_teacher_forcing_and_the_definition_give(reattention):
    """The definition: attention matrices in numpy, averaged, summed over the tokens so far, the best ceil(m M)."""
    vision, prompts, grids = looking_questions(Q, seed=2)
    net, params = model()
    visual_ZxD = np.asarray(net.apply({"params": params}, vision, method="encode"))
    rollout = draw(reattention, vision, prompts, 0.7 if reattention is ROUTE else 1.0)
    again = np.asarray(selector(reattention)(params, vision, prompts, rollout.ids_BxR, rollout.length_B))
    compared, first = 0, 0
    for b in range(Q * G):
        q, n, used = b // G, int(rollout.length_B[b]), int(rollout.inserted_B[b])
        assert np.array_equal(again[b, :used], rollout.selected_BxExX[b, :used])
        assert not rollout.selected_BxExX[b, used:].any()
        want = plain.sample_token(
            params, net.config.text, visual_ZxD, prompts, grids, q, rollout.ids_BxR[b, :n], CAP, 0.5
        )
        got = [visual_kept(prompts, q, rollout.selected_BxExX[b, e]) for e in range(used)]
        assert got == want, (b, got, want)
        compared += used
        first += sum(selected != set(range(len(selected))) for selected in got)
        delimiters = [x for x, s in enumerate(prompts.block.source_QxX[q]) if s >= 0 and prompts.visual_QxP[q, s] < 0]
        assert rollout.selected_BxExX[b, :used][:, delimiters].all()
    assert compared >= 6 and first >= 4


def test_no_share_is_text_alone():
    vision, prompts, _ = looking_questions(Q)
    nothing = draw(dataclasses.replace(ROUTE, keep_ratio=0.0), vision, prompts)
    text = draw(ReattentionConfig(), vision, prompts.replace(block=None))
    assert (text.ids_BxR == OPEN).any() and nothing.selected_BxExX.shape[1] == 0
    for one, other in ((nothing.ids_BxR, text.ids_BxR), (nothing.logp_BxR, text.logp_BxR)):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("reattention", [COPY, HIDING], ids=["copy", "route-bias"])
def test_a_rows_text_is_independent_of_its_neighbours(reattention):
    vision, prompts, _ = looking_questions(Q, seed=1)
    whole = draw(reattention, vision, prompts)
    assert (whole.inserted_B > 0).sum() > 2
    order = np.array([2, 0, 3, 1])
    numbers = (order[:, None] * G + np.arange(G)).reshape(-1)
    other = draw(reattention, vision, jax.tree.map(lambda x: x[order], prompts), numbers=numbers)
    same_rows(other, jax.tree.map(lambda x: x[numbers], whole), slice(None))
    strangers = jax.tree.map(lambda a, b: np.concatenate([a[:2], b[2:]]), prompts, looking_questions(Q, seed=6)[1])
    alone = draw(reattention, vision, strangers)
    same_rows(alone, whole, slice(2 * G))
    assert not np.array_equal(alone.ids_BxR[2 * G :], whole.ids_BxR[2 * G :])


def same_rows(one, other, rows, atol=1e-6):
    for name in ("ids_BxR", "length_B", "inserted_B", "skipped_B", "selected_BxExX", "stopped_B"):
        np.testing.assert_array_equal(getattr(one, name)[rows], getattr(other, name)[rows], err_msg=name)
    np.testing.assert_allclose(one.logp_BxR[rows], other.logp_BxR[rows], atol=atol, rtol=0)


@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow), Q * G])
def test_how_many_rows_are_served_together_changes_nothing(rows):
    """The other tests serve two at once."""
    vision, prompts, _ = looking_questions(Q, seed=1)
    want = draw(COPY, vision, prompts)
    tags = [np.flatnonzero(row == OPEN)[:1].tolist() for row, n in zip(want.ids_BxR, want.inserted_B, strict=True) if n]
    assert len({tuple(t) for t in tags}) > 2, "rows must look at different steps"
    same_rows(draw(dataclasses.replace(COPY, rows_at_once=rows), vision, prompts), want, slice(None))


def test_questions_of_one_engine_may_differ_in_mode():
    """Each is answered as by a program of its own mode, whatever the modes of its neighbours."""
    vision, prompts, _ = looking_questions(Q, seed=1)
    modes = (dataclasses.replace(COPY, mode="none"), COPY, ROUTE, SHUT)
    several = dataclasses.replace(COPY, mode="route", by_row=True)
    options = SampleOptions(G, R, 1.0, 1.0, (STOP, 95), several)
    numbers = np.arange(Q * G, dtype=np.uint32)
    alone = [draw(one, vision, prompts) for one in modes]
    buckets = Buckets((8,), (16,), (4,), (24,), (48,), images=2, patch_values=96)
    engine = Engine(*model(), options, buckets, 3, BIAS, questions=Q)
    engine._programs = round_alike(engine._programs)
    requests = [Request(vision, prompts, numbers, temperature=1.0, reattention=mode) for mode in modes]
    inserted = set()
    for mode, question, got in engine.run(requests):
        rows = slice(question * G, (question + 1) * G)
        want = jax.tree.map(lambda x, rows=rows: x[rows], alone[mode])
        E, X = want.selected_BxExX.shape[1:]
        same_rows(got.replace(selected_BxExX=got.selected_BxExX[:, :E, :X]), want, slice(None), 1e-5)
        inserted |= {modes[mode].mode} if got.inserted_B.any() else set()
    assert inserted == {"copy", "route", "vision_only"}


def test_no_compilation_after_the_first_batch():
    """Other texts, other images, other lengths, other numbers of reflections, in the same buckets."""
    run = functools.partial(draw, HIDING)
    seen = []
    for seed in range(2, 8):
        vision, prompts, _ = looking_questions(Q, seed=seed)
        with CompileCounter() as counter:
            rollout = run(vision, prompts, step=seed)
            selected = selector(HIDING)(model()[1], vision, prompts, rollout.ids_BxR, rollout.length_B)
            trainer(HIDING, 1.0)(model()[1], vision, prompts, rollout.ids_BxR, rollout.length_B, selected)
        seen.append((counter.count, int(rollout.inserted_B.sum())))
    assert all(count == 0 for count, _ in seen[1:]), seen
    assert len({inserted for _, inserted in seen}) > 2
    vision, prompts, _ = looking_questions(Q, prompt=32)
    with CompileCounter() as counter:
        trainer(HIDING, 1.0)(model()[1], vision, prompts, rollout.ids_BxR, rollout.length_B, selected)
    assert counter.count > 0  # the negative control


def test_a_mode_that_inserts_needs_the_block():
    vision, prompts, _ = looking_questions(Q)
    with pytest.raises(ValueError, match="prompts: expected them with their `block`"):
        draw(COPY, vision, prompts.replace(block=None))
