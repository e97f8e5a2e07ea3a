"""The engine: a row's bits under any schedule, the trainer's draws, no compilation, and what a mistake would do."""

import collections
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import CLOSE, END, IMAGE, OPEN, START, STOP, VIDEO, VOCAB, looking_questions, small_model
from transformers import RepetitionPenaltyLogitsProcessor

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.model import pages
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.reattention.options import ReattentionConfig, forced_tokens
from qwenla_jax.sampling import engine as engine_module
from qwenla_jax.sampling import param_layout, slot_sizes, slots, step
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import draw, nucleus, suppression_bias, token_keys, uniforms
from qwenla_jax.train.logprobs import response_states
from qwenla_jax.types import VisionBatch
from qwenla_jax.utils.compile_counter import CompileCounter

QUESTIONS, IMAGES, G, R, SLOTS, STEPS = 8, 2, 2, 26, 3, 5
BIAS = suppression_bias(VOCAB, VOCAB, [IMAGE, VIDEO, START, END])
BIAS[OPEN] += 3.0
COPY = ReattentionConfig("copy", max_insertions=2, rows_at_once=2, open_id=OPEN, close_id=CLOSE)
MODES = (
    dataclasses.replace(COPY, mode="none"),
    COPY,
    dataclasses.replace(COPY, mode="route", keep_ratio=0.5),
    dataclasses.replace(COPY, mode="vision_only", max_insertions=1),
    dataclasses.replace(COPY, mode="route", keep_ratio=0.3, max_inserted_tokens=8),
)
DRAWS = ((0.0, 1.0), (0.7, 0.9), (1.0, 1.0))
PENALTIES = ((0.0, 0.0, 1.0), (0.7, 0.4, 1.0), (0.0, 0.0, 1.5), (-0.3, -0.2, 0.8))  # presence, frequency, repetition
TOP = (None, 3, 0, 5)
BY_ROW = dataclasses.replace(COPY, mode="route", by_row=True)
OPTIONS = SampleOptions(G, R, 0.0, 1.0, (STOP, 95), BY_ROW, penalties=True, top_logprobs=5)
BUCKETS = Buckets((IMAGES,), (16,), (4,), (24,), (48,), images=IMAGES, patch_values=96)


@functools.cache
def model():
    return small_model(initializer_range=0.2)


@functools.cache
def asked():
    return looking_questions(QUESTIONS)[:2]


def alone(q):
    """One question of the batch, as if collated by itself."""
    vision, prompts = asked()
    own = slice(q * IMAGES, (q + 1) * IMAGES)
    prompts = jax.tree.map(lambda x: x[q : q + 1], prompts)
    visual = np.where(prompts.visual_QxP >= 0, prompts.visual_QxP - q * IMAGES * 4, -1)
    arrays = (vision.patches_IxSxC, vision.hw_IxSx2, vision.valid_IxS, vision.gather_IxM)
    return VisionBatch(*(x[own] for x in arrays)), prompts.replace(visual_QxP=visual)


def request(number):
    """Requests differ in everything that one can set."""
    q = number % QUESTIONS
    temperature, top_p = DRAWS[number % len(DRAWS)]
    rows = 1 + number % G
    presence, frequency, repetition = PENALTIES[number // 2 % len(PENALTIES)]
    return Request(
        *alone(q),
        samples=[q * G + row for row in range(rows)],
        seed=5 + number // 20,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=(R, 9, 17)[number // 3 % 3],
        reattention=MODES[number // 2 % len(MODES)],
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        top_logprobs=TOP[number // 3 % len(TOP)],
    )


REQUESTS = 24
SCHEDULES = int(os.environ.get("QWENLA_SCHEDULES", "4"))


def engine(slots=SLOTS, page=8, together=False, **changes):
    """With pages of 8 slots, two a round; or a page a row, read whole, as where devices are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_sizes, "PAGE", page)
        if together:  # as on accelerators
            own = lambda options, sizes, on_one_cpu: dataclasses.replace(options, page=page, together=True)  # noqa: E731
            patch.setattr(engine_module, "paged", own)
        return Engine(*model(), OPTIONS, BUCKETS, slots, BIAS, STEPS, token_bytes=in_text, **changes)


def in_text(token):
    return f"{token},".encode()


@pytest.fixture(scope="module", autouse=True)
def few_pages_a_round():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "ROUND_BYTES", 2 * 4 * 2 * 8 * (8 + 4))
        yield


def until_it_ends(one, asked):
    """What a request's updates come to: its rollout, and the log-probabilities of its rows."""
    one.submit(asked)
    logprobs = None
    while True:
        (update,) = one.step()
        logprobs = joined(logprobs, update.logprobs)
        if update.rollout is not None:
            return update.rollout, logprobs


def joined(rows, new):
    """The log-probabilities of rows with what is new of them; None where none were asked for."""
    return new if new is None or rows is None else [old + more for old, more in zip(rows, new, strict=True)]


@functools.cache
def told(page=8):
    """Every request by itself, one after the other."""
    one = engine(page=page)
    return [until_it_ends(one, request(n)) for n in range(REQUESTS)]


@functools.cache
def reference(page=8):
    return [rollout for rollout, _ in told(page)]


def same_bits(got, want):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def run_schedule(one, rng, page=8):
    """Requests that arrive at random times; some are cancelled. Returns ended ones by number, and the cancelled.

    The log-probabilities of every update are those of its tokens in the reference, and no token is left out.
    """
    order = rng.permutation(REQUESTS).tolist()
    tickets, ended, cancelled, streamed, logprobs = {}, {}, set(), {}, {}
    while order or one.busy:
        for _ in range(min(len(order), int(rng.integers(0, 4)))):
            number = order.pop()
            tickets[one.submit(request(number))] = number
        if tickets and rng.random() < 0.15:
            ticket = int(rng.choice(list(tickets)))
            if tickets[ticket] not in ended:
                one.cancel(ticket)
                cancelled.add(tickets[ticket])
        for update in one.step():
            number = tickets[update.ticket]
            assert number not in cancelled and number not in ended
            rows = streamed.setdefault(number, [[] for _ in update.ids])
            for row, ids in zip(rows, update.ids, strict=True):
                row += ids
            logprobs[number] = joined(logprobs.get(number), update.logprobs)
            for row, entries, whole in zip(rows, logprobs[number] or (), told(page)[number][1] or (), strict=False):
                assert entries == whole[: len(row)], (number, len(row), len(entries))
            if update.rollout is not None:
                ended[number] = update.rollout, logprobs[number]
                for row, ids, n in zip(rows, update.rollout.ids_BxR, update.rollout.length_B, strict=True):
                    assert row == ids[:n].tolist()
    return ended, cancelled


def differing(one, seed, page=8):
    """Requests whose bits are not those of the reference, and how many ended."""
    ended, cancelled = run_schedule(one, np.random.default_rng(seed), page)
    assert set(ended) | cancelled == set(range(REQUESTS)) and not set(ended) & cancelled
    return {number for number, got in ended.items() if not same_bits(got, told(page)[number])}, len(ended)


@pytest.mark.parametrize("page", [8, 64], ids=["pages", "whole rows"])
def test_a_rows_bits_are_independent_of_the_schedule_and_nothing_compiles(page):
    one = engine(page=page)
    assert (one.options.page == 8) == (page == 8)
    assert one.warm_up() > 0
    want = reference(page)
    assert sum(rollout.inserted_B.sum() for rollout in want) > 20
    assert {len(rollout.length_B) for rollout in want} == {1, G}
    assert {n % STEPS > 0 for rollout in want for n in rollout.length_B} == {True, False}  # some end within a loop
    done = 0
    with CompileCounter() as counter:
        for seed in range(SCHEDULES):
            wrong, ended = differing(one, seed, page)
            assert not wrong
            done += ended
    assert counter.count == 0
    assert REQUESTS * SCHEDULES / 2 < done < REQUESTS * SCHEDULES  # some were cancelled


def agrees(got, want):
    """Whether tokens, insertions and log-probabilities (within 1e-5) are equal."""
    names = ("ids_BxR", "length_B", "stopped_B", "inserted_B", "skipped_B", "selected_BxExX")
    equal = all(np.array_equal(getattr(got, name), getattr(want, name)) for name in names)
    return equal and np.abs(got.logp_BxR - want.logp_BxR).max() < 1e-5


@pytest.mark.parametrize(
    ("slots", "page", "way"), [(2, 64, ""), (7, 16, ""), (3, 24, ""), (3, 8, "apart"), (3, 8, "together")]
)
def test_other_slots_and_pages_and_layers_apart_give_the_same_rows(slots, page, way, monkeypatch):
    """Of 64 slots prompts and responses are one page each; of 24 prompts alone, so whole rows stand beside pages."""
    monkeypatch.setattr(param_layout, "LEAST_APART", 0 if way == "apart" else 2**25)
    one = engine(slots, page, way == "together")
    one.params = one.params  # laid out already
    assert ("0" in one.params["decoder"]["layers"]) == (way == "apart")
    got = {number: rollout for number, _, rollout in one.run(map(request, range(REQUESTS)))}
    assert all(agrees(got[number], want) for number, want in enumerate(reference()))


def test_images_are_hashed_once_for_all_responses(monkeypatch):
    one, hashed, contiguous = engine(), [], np.ascontiguousarray
    one._programs = one._programs._replace(encode=lambda *given: object(), prefill=lambda *given: object())
    monkeypatch.setattr(np, "ascontiguousarray", lambda x: hashed.append(x) or contiguous(x))
    first, again, other = request(0), request(0), request(1)
    same = [dataclasses.replace(first, samples=(sample,)) for sample in range(5)]
    results = [one._prefill(each) for each in (*same, again, other)]
    assert [sum(x is each.vision.patches_IxSxC for x in hashed) for each in (first, again, other)] == [1, 1, 1]
    assert len(set(map(id, results))) == 2 and results[5] is results[0]


def test_batches_of_questions_give_the_same_rows():
    """Which are prefilled together, and put into slots one by one."""
    vision, prompts = asked()
    sizes = dataclasses.replace(BUCKETS, frames=(QUESTIONS * IMAGES,))
    one = Engine(*model(), OPTIONS, sizes, SLOTS, BIAS, questions=QUESTIONS)
    mode, numbers = MODES[2], np.arange(QUESTIONS * G)
    batches = [
        Request(vision, prompts, numbers, QUESTIONS - 1, 5, temperature=0.7, top_p=0.9, reattention=mode),
        Request(vision, prompts, numbers + 100, seed=5, reattention=mode),
    ]
    got = {(batch, question): rollout for batch, question, rollout in one.run(batches)}
    assert set(got) == {(0, q) for q in range(QUESTIONS - 1)} | {(1, q) for q in range(QUESTIONS)}
    single = engine()
    for (batch, q), rollout in got.items():
        own = dataclasses.replace(batches[batch], samples=batches[batch].samples[q * G : (q + 1) * G], count=None)
        own = dataclasses.replace(own, **dict(zip(("vision", "prompts"), alone(q), strict=True)))
        assert agrees(rollout, next(single.run([own]))[2])


@functools.cache
def states(reattention):
    return jax.jit(functools.partial(response_states, model()[0], reattention=reattention))


def drawn(logits_NxV, one, uniform_Nx2):
    if not one.temperature:
        return np.argmax(logits_NxV, axis=-1)
    logits_NxV = logits_NxV / one.temperature
    return np.asarray(draw(logits_NxV if one.top_p == 1 else nucleus(logits_NxV, one.top_p), uniform_Nx2))


def penalized(logits_NxV, one, row_R):
    """The logits that each of a row's tokens is drawn by: transformers' processor, then OpenAI's formula."""
    prompt, out_NxV = one.prompts.ids_QxP[0, : one.prompts.length_Q[0]], np.array(logits_NxV)
    repetition = RepetitionPenaltyLogitsProcessor(one.repetition_penalty)
    for n, logits_V in enumerate(out_NxV):
        before = np.concatenate([prompt, row_R[:n]]).astype(np.int64)
        logits_V[:] = repetition(torch.tensor(before[None]), torch.tensor(logits_V[None]))[0]
        for token, count in collections.Counter(row_R[:n].tolist()).items():
            logits_V[token] -= one.presence_penalty + count * one.frequency_penalty
    return out_NxV


def test_the_trainers_pass_and_the_rows_keys_give_every_draw():
    """But at ties: where a random number that differs by 1e-5 of itself draws the sampled token.

    Log-probabilities are those before the penalties; in updates of the model's own distribution, with the most likely.
    """
    params = model()[1]
    sampled = ties = forced = insertions = moved = alternatives = 0
    for number in range(REQUESTS):
        one, (rollout, reported) = request(number), told()[number]
        # A request of one row is taken twice, and all R places of a row are drawn, so that few programs are compiled.
        length_B, ids_BxR, selected_BxExX = (
            np.resize(x, (G, *x.shape[1:])) for x in (rollout.length_B, rollout.ids_BxR, rollout.selected_BxExX)
        )
        given = (one.vision, one.prompts, ids_BxR)
        own = {"length_B": length_B, "selected_BxExX": selected_BxExX} if one.reattention.inserts else {}
        logits_BxRxV = np.asarray(logits_of(params, states(one.reattention)(params, *given, **own)))
        forced_BxR = np.asarray(forced_tokens(one.reattention, one.prompts, ids_BxR, length_B))
        insertions += int(rollout.inserted_B.sum())
        for row, sample in enumerate(one.samples):
            own_RxV, all_R = jnp.asarray(logits_BxRxV[row] + BIAS), np.arange(R)
            logits = jnp.asarray(penalized(logits_BxRxV[row], one, ids_BxR[row]) + BIAS)
            u = uniforms(token_keys(*(np.full(R, x, np.uint32) for x in (one.seed, one.step, sample)), all_R))
            t = all_R[: length_B[row]]
            draws = [np.asarray(drawn(logits, one, u * factor))[t] for factor in (1, 1 - 1e-5, 1 + 1e-5)]
            ids = ids_BxR[row, t]
            moved += int((np.argmax(logits, -1) != np.argmax(own_RxV, -1))[t].sum())
            free = ~forced_BxR[row, t]
            assert ((draws[0] == ids) | (draws[1] == ids) | (draws[2] == ids))[free].all()
            ties += int((draws[0] != ids)[free].sum())
            sampled, forced = sampled + int(free.sum()), forced + int((~free).sum())
            scale = one.temperature or 1.0
            logp = np.asarray(jax.nn.log_softmax(own_RxV / scale))[t, ids]
            np.testing.assert_allclose(rollout.logp_BxR[row, t][free], logp[free], atol=1e-5)
            assert (reported is None) == (one.top_logprobs is None)
            if reported is not None:
                model_RxV = np.asarray(jax.nn.log_softmax(own_RxV))
                np.testing.assert_allclose([each.logprob for each in reported[row]], model_RxV[t, ids], atol=1e-5)
                for each, logp_V in zip(reported[row], model_RxV[t], strict=True):
                    top, values = ([pair[i] for pair in each.top] for i in (0, 1))
                    assert len(set(top)) == one.top_logprobs
                    np.testing.assert_allclose(values, logp_V[top], atol=1e-5)
                    np.testing.assert_allclose(values, np.sort(logp_V)[::-1][: one.top_logprobs], atol=1e-5)
                    alternatives += len(top)
    assert sampled > 250 and ties <= 1 and forced > 0 and insertions > 20 and moved > 50 and alternatives > 300


def neighbours_keys(monkeypatch):
    keys = step.token_keys
    monkeypatch.setattr(step, "token_keys", lambda seed, step, s_B, t_B: keys(seed, step, jnp.roll(s_B, 1), t_B))


def insertion_of_another_row(monkeypatch):
    class Wrong(step.RowSubset):
        def take(self, x, axis=0, share=1):
            return super().take(jnp.roll(x, 1, axis), axis, share)

    monkeypatch.setattr(step, "RowSubset", Wrong)


def slot_off_by_one(monkeypatch):
    put = slots.put_slots
    off = lambda slot_Q: jnp.where(slot_Q < SLOTS, (slot_Q + 1) % SLOTS, slot_Q)  # noqa: E731
    monkeypatch.setattr(slots, "put_slots", lambda state, new, slot_Q, shards: put(state, new, off(slot_Q), shards))


def stale_cache_row(monkeypatch):
    put = slots.put_slots

    def stale(state, *rest):
        new = put(state, *rest)
        return new.replace(cache=new.cache.replace(length_R=state.cache.length_R))

    monkeypatch.setattr(slots, "put_slots", stale)


def stale_counts(monkeypatch):
    put = slots.put_slots
    monkeypatch.setattr(slots, "put_slots", lambda state, *rest: put(state, *rest).replace(counts=state.counts))


INSERTED = (slot_off_by_one, stale_cache_row, stale_counts)


@pytest.mark.parametrize("mistake", [neighbours_keys, insertion_of_another_row, *INSERTED])
def test_a_mistake_changes_bits(mistake, monkeypatch):
    one = engine()
    wrong = lambda: {n for n, _, got in one.run(map(request, range(REQUESTS))) if not same_bits(got, reference()[n])}  # noqa: E731
    assert not wrong()
    mistake(monkeypatch)
    broken = slots._programs_alone.__wrapped__(model()[0].config, one.options, one._sizes)
    which = "insert" if mistake in INSERTED else "decode"
    one._programs = one._programs._replace(**{which: getattr(broken, which)})
    assert wrong()


def test_memory_is_that_of_slots_and_buckets():
    """By hand; and the loop over tokens writes keys and values in place: it has no room for a second copy of them."""
    slots, most = 16, 256
    one = Engine(*model(), dataclasses.replace(OPTIONS, max_new_tokens=most), BUCKETS, slots, BIAS)
    layers, heads, size, width, prompt = 2, 2, 8, 32, 24
    row = -(-(most + 2 * 12) // 64) * 64  # two insertions of 12 slots; pages of 64
    keys = 2 * layers * heads * size * 4 * (slots * prompt + slots * G * row)
    counts = slots * VOCAB + slots * G * VOCAB * 2  # a byte of each prompt's tokens, two of each row's
    reported = slots * G * one._steps * (4 + 5 * 8)
    known = keys + slots * prompt * width * 4 + counts + reported
    without = dataclasses.replace(OPTIONS, max_new_tokens=most, penalties=False, top_logprobs=None)
    fields = slots * G * 4 * 4  # three penalties and the number of alternatives
    smaller = Engine(*model(), without, BUCKETS, slots, BIAS).state_bytes
    assert one.state_bytes - smaller == counts + reported + fields
    assert known < one.state_bytes < 1.1 * known
    flags = lambda n: jax.ShapeDtypeStruct((n,), bool)  # noqa: E731
    state, steps = jax.eval_shape(one._programs.empty), jax.ShapeDtypeStruct((), np.int32)
    program = one._programs.decode.lower(one.params, state, BIAS, flags(slots * G), steps, flags(slots))
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes == pytest.approx(one.state_bytes, rel=0.01)
    assert memory.temp_size_in_bytes < keys / 2


def test_a_stop_string_ends_a_row_and_what_follows_is_discarded():
    """Between two insertions; and at a tag, whose insertion has run although nothing comes after it.

    Some end in the middle of a loop, which goes on: the log-probabilities of all tokens up to there are reported.
    """
    one, inserted, in_loop = engine(), [], 0
    for number, want in enumerate(reference()):
        ids = want.ids_BxR[0, : want.length_B[0]].tolist()
        tags = [i for i, token in enumerate(ids) if token == OPEN]
        new = [end for end in range(2, len(ids)) if ids[end - 1] not in ids[: end - 1]]  # the last token of these is
        ends = [end for end in new if want.inserted_B[0] == 2 and tags[0] < end <= tags[1]]
        if not ends or len(inserted) > 3:
            continue
        end = ends[-1]
        asked = dataclasses.replace(request(number), top_logprobs=2)
        got, logprobs = until_it_ends(one, dataclasses.replace(asked, stop=("never", f",{ids[end - 1]},")))
        whole = until_it_ends(one, asked)[1]
        in_loop += end % STEPS > 0
        assert logprobs == [row[:n] for row, n in zip(whole, got.length_B, strict=True)]
        assert got.length_B[0] == end and not got.stopped_B[0]
        for name in ("ids_BxR", "logp_BxR"):
            assert np.array_equal(getattr(got, name)[0, :end], getattr(want, name)[0, :end])
        assert (got.ids_BxR[0, end:] == STOP).all() and not got.logp_BxR[0, end:].any()
        assert got.inserted_B[0] == ids[: end - 1].count(OPEN) < 2
        assert not got.selected_BxExX[0, got.inserted_B[0] :].any()
        inserted.append(int(got.inserted_B[0]))
    assert set(inserted) == {0, 1} and in_loop
    assert not one.busy and not differing(one, 1)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": (0, 1, 2)}, "samples: got 3, expected 1 to 2"),
        ({"temperature": -1.0}, "temperature and top_k must be at least 0"),
        ({"top_k": -1}, "temperature and top_k must be at least 0"),
        ({"count": 2}, "count: got 2, expected 1 to 1"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"max_new_tokens": R + 1}, f"max_new_tokens: got {R + 1}, expected 1 to {R}"),
        ({"stop": ("",)}, "stop: expected texts"),
        ({"presence_penalty": 2.1}, "presence_penalty: got 2.1, expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: got nan, expected -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty: got inf, expected a number above 0"),
        ({"top_logprobs": 6}, "top_logprobs: got 6, expected 0 to 5, or None"),
        (
            {"reattention": dataclasses.replace(COPY, form="bias")},
            "reattention: expected an engine by_row with the same form",
        ),
        ({"reattention": dataclasses.replace(COPY, max_insertions=3)}, "max_insertions: expected at most 2"),
        ({"prompts": alone(0)[1].replace(block=None)}, "with their `block`"),
        ({"prompts": jax.tree.map(lambda x: x[:, :20] if x.ndim > 1 else x, alone(0)[1])}, "tokens: expected 1 of"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        engine().submit(dataclasses.replace(request(0), **changes))


def test_an_engine_without_them_refuses_penalties_and_logprobs():
    plain = Engine(*model(), dataclasses.replace(OPTIONS, penalties=False, top_logprobs=None), BUCKETS, SLOTS, BIAS)
    for changes in ({"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}):
        with pytest.raises(ValueError, match=r"expected an engine with `penalties`"):
            plain.submit(dataclasses.replace(request(0), **changes))
    with pytest.raises(ValueError, match="top_logprobs: got 0, expected None from this engine"):
        plain.submit(dataclasses.replace(request(0), top_logprobs=0))
    with pytest.raises(ValueError, match="top_logprobs: got 21, expected 0 to 20, or None"):
        dataclasses.replace(OPTIONS, top_logprobs=21)
