"""Mixing against counting and against a mixture written out by hand."""

import collections
from fractions import Fraction

import numpy as np
import pytest

from qwenla_jax.data.record import Record
from qwenla_jax.data.sources.mixture import Mixture


class _Numbers:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Record(str(int(index)), (), "?", "1", None, "x")


def mix(sizes, weights, **more):
    names = "abcdefg"[: len(sizes)]
    sources = {name: _Numbers(size) for name, size in zip(names, sizes, strict=True)}
    return Mixture(sources, dict(zip(names, weights, strict=True)), **more)


def brute_force(mixture, sizes):
    """Draws one after the other, a queue a source, refilled when it is empty."""
    order = [mixture.place(i)[0] for i in range(sum(mixture.block.values()))]
    queues = {name: collections.deque() for name in sizes}
    for i in range(len(mixture)):
        name = order[i % len(order)]
        if not queues[name]:
            queues[name].extend(range(sizes[name]))
        yield name, queues[name].popleft()


@pytest.mark.parametrize(
    "sizes, weights, block",
    [
        ((7, 3), (2, 1), [2, 1]),
        ((10, 10, 10), (0.5, 0.3, 0.2), [5, 3, 2]),
        ((4, 9), (0.1, 0.2), [1, 2]),
        ((5,), (3.7,), [1]),
        ((100, 1, 13), (Fraction(1, 3), Fraction(1, 6), Fraction(1, 2)), [2, 1, 3]),
        ((3, 50), (4, 6), [2, 3]),
        ((1740, 3040, 5000, 1040, 2101), (1, 1, 1, 1, 1), [1] * 5),
    ],
)
def test_proportions_are_exact_in_every_block_and_places_those_of_queues(sizes, weights, block):
    mixture = mix(sizes, weights)
    assert list(mixture.block.values()) == block
    places = [mixture.place(i) for i in range(len(mixture))]
    width = sum(block)
    assert len(mixture) % width == 0
    for start in range(0, len(mixture), width):
        counts = collections.Counter(name for name, _ in places[start : start + width])
        assert [counts[name] for name in "abcdefg"[: len(sizes)]] == block
    assert places == list(brute_force(mixture, dict(zip("abcdefg", sizes, strict=False))))
    # Every record of every source is there, and one block less would miss some.
    seen = collections.Counter(places)
    assert set(seen) == {(name, i) for name, size in zip("abcdefg", sizes, strict=False) for i in range(size)}
    if len(mixture) > width:
        assert len(set(places[:-width])) < len(seen)


def test_a_block_is_spread_out():
    names = "".join(mix((100, 100), (3, 1)).place(i)[0] for i in range(4))
    assert sorted(names) == list("aaab") and names not in ("baaa", "aaab")
    long = [mix((1000, 1000), (9, 1)).place(i)[0] for i in range(100)]
    for start in range(90):
        assert long[start : start + 11].count("b") in (1, 2)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_each_pass_an_order_of_its_own_without_repeats(seed):
    sizes = {"a": 20, "b": 6}
    mixture = mix(sizes.values(), (1, 2), seed=seed)
    drawn = {name: [] for name in sizes}
    for i in range(len(mixture)):
        name, inner = mixture.place(i)
        drawn[name].append(inner)
    passes = [drawn["b"][i : i + 6] for i in range(0, len(drawn["b"]) - 5, 6)]
    assert all(sorted(each) == list(range(6)) for each in passes) and len({tuple(each) for each in passes}) > 3
    assert sorted(drawn["a"]) == list(range(20)) and drawn["a"] != list(range(20))
    backwards = [mixture.place(i) for i in reversed(range(len(mixture)))][::-1]
    again = mix(sizes.values(), (1, 2), seed=seed)
    assert backwards == [again.place(i) for i in range(len(again))]
    other = mix(sizes.values(), (1, 2), seed=seed + 1)
    assert backwards != [other.place(i) for i in range(len(other))]


def test_records_carry_their_source():
    mixture = mix((3, 2), (1, 1))
    assert [mixture[i].id for i in range(6)] == ["a/0", "b/0", "a/1", "b/1", "a/2", "b/0"]
    assert mixture[np.int64(4)].id == "a/2"
    for index in (-1, 6):
        with pytest.raises(IndexError, match="outside a mixture of 6"):
            mixture[index]


@pytest.mark.parametrize(
    "sizes, weights, message",
    [
        ((3, 3), (1, 0), "weight of 'b' is 0"),
        ((3, 3), (1, -1), "weight of 'b' is -1"),
        ((3, 3), (1, float("nan")), "weight of 'b' is nan"),
        ((3, 3), (1, float("inf")), "weight of 'b' is inf"),
        ((3, 0), (1, 1), "source 'b' holds no record"),
        ((3, 3), (1, 0.0000001), "need blocks of 10000001"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        mix(sizes, weights)
    with pytest.raises(ValueError, match="expected the same names"):
        Mixture({"a": _Numbers(1)}, {"b": 1})
