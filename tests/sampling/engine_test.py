"""The engine: a row's bits under any schedule, the sampler's rows, no compilation, and what a mistake would do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CLOSE, END, IMAGE, OPEN, START, STOP, VIDEO, VOCAB, looking_questions, small_model

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.reattention.options import ReattentionConfig, row_reattention
from qwenla_jax.sampling import slots, step
from qwenla_jax.sampling.engine import Engine, Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sampler import sample
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.types import VisionBatch
from qwenla_jax.utils.compile_counter import CompileCounter

QUESTIONS, IMAGES, G, R, SLOTS, STEPS = 8, 2, 2, 24, 3, 5
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
OPTIONS = SampleOptions(G, R, 0.0, 1.0, (STOP, 95), dataclasses.replace(COPY, mode="route", by_row=True))
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
    return Request(
        *alone(q),
        samples=[q * G + row for row in range(rows)],
        seed=5 + number // 20,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=(R, 9, 17)[number // 3 % 3],
        reattention=MODES[number // 2 % len(MODES)],
    )


REQUESTS = 24


def engine():
    return Engine(*model(), OPTIONS, BUCKETS, SLOTS, BIAS, STEPS, decode=lambda ids: "".join(f"{i}," for i in ids))


@functools.cache
def reference():
    """Every request by itself, one after the other."""
    one = engine()
    return [next(one.run([request(n)]))[1] for n in range(REQUESTS)]


def same_bits(got, want):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def run_schedule(one, rng):
    """Requests that arrive at random times; some are cancelled. Returns ended ones by number, and the cancelled."""
    order = rng.permutation(REQUESTS).tolist()
    tickets, ended, cancelled, streamed = {}, {}, set(), {}
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
            if update.rollout is not None:
                ended[number] = update.rollout
                for row, ids, n in zip(rows, update.rollout.ids_BxR, update.rollout.length_B, strict=True):
                    assert row == ids[:n].tolist()
    return ended, cancelled


def differing(one, seed):
    """Requests whose bits are not those of the reference, and how many ended."""
    ended, cancelled = run_schedule(one, np.random.default_rng(seed))
    assert set(ended) | cancelled == set(range(REQUESTS)) and not set(ended) & cancelled
    return {number for number, got in ended.items() if not same_bits(got, reference()[number])}, len(ended)


def test_a_rows_bits_are_independent_of_the_schedule_and_nothing_compiles():
    one = engine()
    assert one.warm_up() > 0
    want = reference()
    assert sum(rollout.inserted_B.sum() for rollout in want) > 20
    assert {len(rollout.length_B) for rollout in want} == {1, G}
    done = 0
    with CompileCounter() as counter:
        for seed in range(12):
            wrong, ended = differing(one, seed)
            assert not wrong
            done += ended
    assert counter.count == 0
    assert REQUESTS * 8 < done < REQUESTS * 12  # some were cancelled


@functools.cache
def sampler(temperature, top_p):
    options = dataclasses.replace(OPTIONS, temperature=temperature, top_p=top_p)
    return jax.jit(functools.partial(sample, model()[0], options))


@pytest.mark.parametrize("draw", DRAWS[:2])
def test_rows_are_those_of_the_sampler(draw):
    """Which decodes all questions together, to the longest response, with the temperature compiled in."""
    vision, prompts = asked()
    compared = inserted = 0
    for first in (0, QUESTIONS):
        numbers = range(first, first + QUESTIONS)
        per_request = [row_reattention(request(n).reattention, prompts, G) for n in numbers]
        rows = jax.tree.map(
            lambda *x: np.stack(x)[np.repeat(np.arange(QUESTIONS), G), np.arange(QUESTIONS * G)], *per_request
        )
        samples = np.arange(QUESTIONS * G, dtype=np.uint32)
        whole = sampler(*draw)(model()[1], vision, prompts, BIAS, np.uint32(5), np.uint32(0), samples, rows)
        for number in numbers:
            if DRAWS[number % len(DRAWS)] != draw:
                continue
            got = reference()[number]
            for row, n in enumerate(got.length_B):
                b = number % QUESTIONS * G + row
                assert np.array_equal(got.ids_BxR[row, :n], whole.ids_BxR[b, :n])
                np.testing.assert_allclose(got.logp_BxR[row, :n], whole.logp_BxR[b, :n], atol=1e-5, rtol=0)
                assert n == whole.length_B[b] or n == request(number).max_new_tokens < R
                E = got.inserted_B[row]
                assert np.array_equal(got.selected_BxExX[row, :E], whole.selected_BxExX[b, :E])
                compared, inserted = compared + n, inserted + E
    assert compared > 80 and inserted >= 4


def neighbours_keys(monkeypatch):
    keys = step.token_keys
    monkeypatch.setattr(step, "token_keys", lambda seed, step, s_B, t_B: keys(seed, step, jnp.roll(s_B, 1), t_B))


def insertion_of_another_row(monkeypatch):
    class Wrong(step.RowSubset):
        def take(self, x, axis=0, share=1):
            return super().take(jnp.roll(x, 1, axis), axis, share)

    monkeypatch.setattr(step, "RowSubset", Wrong)


def slot_off_by_one(monkeypatch):
    put = slots.put_slot
    monkeypatch.setattr(slots, "put_slot", lambda state, one, slot: put(state, one, (slot + 1) % SLOTS))


def stale_cache_row(monkeypatch):
    put = slots.put_slot

    def stale(state, one, slot):
        new = put(state, one, slot)
        return new.replace(cache=new.cache.replace(length_B=state.cache.length_B))

    monkeypatch.setattr(slots, "put_slot", stale)


@pytest.mark.parametrize("mistake", [neighbours_keys, insertion_of_another_row, slot_off_by_one, stale_cache_row])
def test_a_mistake_changes_bits(mistake, monkeypatch):
    one = engine()
    one._room = {size: most for size, most in one._room.items() if size == max(one._room)}  # one decoding program
    sizes = 2 * 4, 24, max(one._room)
    wrong = lambda: {n for n, got in one.run(map(request, range(REQUESTS))) if not same_bits(got, reference()[n])}  # noqa: E731
    assert not wrong()
    mistake(monkeypatch)
    broken = slots.slot_programs.__wrapped__(model()[0].config, one.options, *sizes, STEPS)
    which = "insert" if mistake in (slot_off_by_one, stale_cache_row) else "decode"
    one._programs = one._programs._replace(**{which: getattr(broken, which)})
    assert wrong()


def test_a_stop_string_ends_a_row_and_what_follows_is_discarded():
    numbers = [n for n in range(REQUESTS) if reference()[n].inserted_B[0] == 2]
    want, number = reference()[numbers[0]], numbers[0]
    ids = want.ids_BxR[0, : want.length_B[0]].tolist()
    second = [i for i, token in enumerate(ids) if token == OPEN][1]
    end = next(i for i in range(second - 1, 0, -1) if ids[i] not in ids[:i]) + 1  # its last token is new
    one = engine()
    stop = f",{ids[end - 1]},"
    ((_, got),) = one.run([dataclasses.replace(request(number), stop=("never", stop))])
    assert got.length_B[0] == end and not got.stopped_B[0]
    for name in ("ids_BxR", "logp_BxR"):
        assert np.array_equal(getattr(got, name)[0, :end], getattr(want, name)[0, :end])
    assert (got.ids_BxR[0, end:] == STOP).all() and not got.logp_BxR[0, end:].any()
    assert got.inserted_B[0] == ids[: end - 1].count(OPEN) < 2
    assert not got.selected_BxExX[0, got.inserted_B[0] :].any()
    assert not one.busy and not differing(one, 1)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": (0, 1, 2)}, "samples: got 3, expected 1 to 2"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"max_new_tokens": R + 1}, f"max_new_tokens: got {R + 1}, expected 1 to {R}"),
        ({"stop": ("",)}, "stop: expected texts"),
        (
            {"reattention": dataclasses.replace(COPY, form="bias")},
            "reattention: expected an engine by_row with the same form",
        ),
        ({"reattention": dataclasses.replace(COPY, max_insertions=3)}, "max_insertions: expected at most 2"),
        ({"prompts": alone(0)[1].replace(block=None)}, "with their `block`"),
        ({"prompts": jax.tree.map(lambda x: x[:, :20] if x.ndim > 1 else x, alone(0)[1])}, "tokens: expected one of"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        engine().submit(dataclasses.replace(request(0), **changes))
