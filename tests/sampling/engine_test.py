"""The engine: a row's bits under any schedule, the sampler's rows, no compilation, and what a mistake would do."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from models import CLOSE, END, IMAGE, OPEN, START, STOP, VIDEO, VOCAB, looking_questions, small_model

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.reattention.options import ReattentionConfig, row_reattention
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


def engine(slots=SLOTS):
    return Engine(*model(), OPTIONS, BUCKETS, slots, BIAS, STEPS, decode=lambda ids: "".join(f"{i}," for i in ids))


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


if __name__ == "__main__":
    import time
    t=time.time(); one=engine(); print('init', time.time()-t)
    print('warm', one.warm_up(), one._room, one.state_bytes)
    t=time.time(); reference(); print('ref', time.time()-t)
    for r in reference()[:6]: print(r.length_B, r.inserted_B, r.skipped_B, r.stopped_B)
    t=time.time()
    with CompileCounter() as c:
        for s in range(10): print(s, differing(one, s))
    print('10 sched', time.time()-t, c.count)
