"""Which tags look: against a loop over the tokens of each row."""

import numpy as np
import pytest
from models import CLOSE, OPEN, looking_questions

from qwenla_jax.reattention.options import ReattentionConfig, allowed_insertions, find_insertions, forced_tokens


def reattention(**changes):
    return ReattentionConfig(**{"mode": "copy", "max_insertions": 3, "open_id": OPEN, "close_id": CLOSE} | changes)


def by_hand(ids, length, allowed):
    """A tag looks while some are allowed and a token comes after it."""
    inserts, turns, used = [], [], 0
    for t, token in enumerate(ids):
        insertions = token == OPEN and t + 1 < length and used < allowed
        used += insertions
        inserts.append(insertions)
        turns.append(used)
    return inserts, turns


def responses(rows, tokens, seed):
    rng = np.random.default_rng(seed)
    ids = np.where(rng.random((rows, tokens)) < 0.35, OPEN, 7).astype(np.int32)
    return ids, rng.integers(0, tokens + 1, rows).astype(np.int32), rng.integers(0, 4, rows).astype(np.int32)


def test_tags_are_found_as_a_loop_finds_them():
    ids, length, allowed = responses(60, 9, 0)
    inserts, turns = (np.asarray(x) for x in find_insertions(ids, length, allowed, OPEN))
    for b in range(60):
        want, turn = by_hand(ids[b], length[b], allowed[b])
        assert inserts[b].tolist() == want
        assert turns[b, : length[b]].tolist() == turn[: length[b]]
    used = [int(n) for n in inserts.sum(1)]
    assert set(used) == {0, 1, 2, 3}


def test_the_token_after_an_insertion_is_forced_in_one_mode():
    _, prompts, grids = looking_questions(4)
    ids, length, _ = responses(12, 9, 1)
    assert not np.asarray(forced_tokens(reattention(), prompts, ids, length)).any()
    forced = np.asarray(forced_tokens(reattention(mode="vision_only"), prompts, ids, length))
    for b in range(12):
        want, _ = by_hand(ids[b], length[b], 3 if grids[b // 3] else 0)
        assert forced[b].tolist() == [False, *want[:-1]]
        assert not forced[b, length[b] :].any()
    assert forced.any()


def test_cap_and_budget():
    """The blocks take 6, 10, 6 and 0 slots; at half, 4, 7, 4 and 0."""
    _, prompts, _ = looking_questions(4)
    assert prompts.block.length_Q.tolist() == [6, 10, 6, 0]
    allowed = lambda **changes: allowed_insertions(reattention(**changes), prompts).tolist()  # noqa: E731
    assert allowed() == [3, 3, 3, 0]
    assert allowed(max_inserted_tokens=12) == [2, 1, 2, 0]
    assert allowed(max_inserted_tokens=9) == [1, 0, 1, 0]
    assert allowed(max_inserted_tokens=0) == [0, 0, 0, 0]
    half = {"mode": "route", "keep_ratio": 0.5, "max_inserted_tokens": 12}
    assert allowed(**half) == [3, 1, 3, 0]
    assert allowed(**half, form="bias") == [2, 1, 2, 0]  # hidden tokens take their slots too
    assert allowed(max_insertions=0) == allowed(mode="none") == allowed(mode="route", keep_ratio=0.0) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "inserts", "selects", "uses_attention", "masks"),
    [
        ({"mode": "none"}, False, False, False, False),
        ({"mode": "copy", "keep_ratio": 0.5, "form": "bias"}, True, False, False, False),
        ({"mode": "vision_only", "keep_ratio": 0.0}, True, False, False, False),
        ({"mode": "route", "keep_ratio": 0.5}, True, True, True, False),
        ({"mode": "route", "keep_ratio": 0.5, "form": "bias"}, True, True, True, True),
        ({"mode": "route", "keep_ratio": 1.0, "form": "bias"}, True, False, False, False),
        ({"mode": "route", "keep_ratio": 0.0}, False, False, False, False),
        ({"mode": "route", "max_insertions": 0}, False, False, False, False),
    ],
)
def test_what_a_mode_does(changes, inserts, selects, uses_attention, masks):
    options = reattention(**changes)
    assert (options.inserts, options.selects, options.uses_attention, options.masks) == (
        inserts,
        selects,
        uses_attention,
        masks,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "paste"}, "mode 'paste'"),
        ({"form": "sparse"}, "form 'sparse'"),
        ({"keep_ratio": 1.5}, "keep_ratio: got 1.5, expected a number from 0 to 1"),
        ({"max_insertions": -1}, "max_insertions must be at least 0"),
        ({"rows_at_once": 0}, "rows_at_once at least 1"),
        ({"max_inserted_tokens": -2}, "max_inserted_tokens: got -2"),
        ({"open_id": -1}, "needs the ids of <REFLECTION>"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        reattention(**changes)
