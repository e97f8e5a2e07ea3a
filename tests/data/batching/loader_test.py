"""The order of the data: a restart, another seed, whole epochs."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.data.batching.collate import Buckets, collate_sft
from qwenla_jax.data.batching.example import to_sft_example
from qwenla_jax.data.batching.loader import batch_indices, make_pipeline
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.data.record import Record
from qwenla_jax.text.tokenizer import train_tiny_tokenizer


class _Numbers:
    """A source whose records carry nothing but their number."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Record(str(int(index)), (), "?", "1", "1", "count")


def _pipeline(size, seed=0, start_step=0, threads=2, batch_size=4):
    return make_pipeline(
        _Numbers(size),
        lambda record: int(record.id),
        lambda numbers: tuple(numbers),
        batch_size,
        seed,
        start_step=start_step,
        threads=threads,
    )


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("start", [1, 5, 13, 200])
@pytest.mark.parametrize("threads", [0, 2])
def test_restart_at_any_step_goes_on_exactly(start, threads):
    whole = _take(_pipeline(151, seed=3), start + 6)
    assert _take(_pipeline(151, seed=3, start_step=start, threads=threads), 6) == whole[start:]


def _grouped(start):
    lengths = np.random.default_rng(0).integers(5, 100, 200)
    return make_pipeline(
        _Numbers(200),
        lambda record: SimpleNamespace(number=int(record.id), ids_T=np.zeros(lengths[int(record.id)])),
        lambda examples: [(example.number, len(example.ids_T)) for example in examples],
        4,
        seed=3,
        start_step=start,
        group=5,
    )


def test_groups_hold_the_same_records_with_less_padding_and_restart_exactly():
    whole = _take(_grouped(0), 20)
    for start in (1, 5, 13):
        assert _take(_grouped(start), 7) == whole[start : start + 7]
    padding = {}
    for name, batches in (("grouped", whole), ("plain", [])):
        if name == "plain":
            drawn = [batch_indices(3, step, 4, 200).tolist() for step in range(20)]
            known = dict(pair for batch in whole for pair in batch)
            assert sorted(known) == sorted(n for batch in drawn for n in batch)
            for first in range(0, 20, 5):
                group = {n for batch in drawn[first : first + 5] for n in batch}
                assert group == {n for batch in whole[first : first + 5] for n, _ in batch}
            batches = [[(n, known[n]) for n in batch] for batch in drawn]
        padding[name] = sum(4 * max(n for _, n in batch) - sum(n for _, n in batch) for batch in batches)
    assert padding["grouped"] < 0.5 * padding["plain"]
    firsts = [max(n for _, n in batch) for batch in whole[:5]]
    assert firsts != sorted(firsts)


def test_batch_indices_are_what_the_pipeline_draws():
    for step, batch in enumerate(_take(_pipeline(11, seed=3), 20)):
        assert batch_indices(3, step, 4, 11).tolist() == list(batch)


@pytest.mark.parametrize("size", [1, 3, 16, 17])
def test_every_record_once_an_epoch(size):
    drawn = np.concatenate([batch_indices(5, step, 4, size) for step in range(size)]).reshape(4, size)
    for epoch in drawn:
        assert sorted(epoch) == list(range(size))
    if size >= 16:
        assert len({tuple(epoch) for epoch in drawn}) == 4


def test_seeds_differ_and_are_not_shifted_epochs_of_each_other():
    size = 64
    epochs = {(seed, epoch): tuple(batch_indices(seed, epoch, size, size)) for seed in range(3) for epoch in range(3)}
    assert len(set(epochs.values())) == len(epochs)


def test_real_batches_are_equal_bit_for_bit_after_a_restart():
    tok = train_tiny_tokenizer(["how many shapes are there"])
    settings = ProcessorSettings(56 * 56, 120 * 120, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    buckets = Buckets((4,), (64, 128), (32,), (64,), (96,))

    class Images(_Numbers):
        def __getitem__(self, index):
            rng = np.random.default_rng(int(index))
            size = (*(int(n) for n in rng.integers(60, 120, 2)), 3)
            image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
            return Record(str(index), (image,), "how many shapes?", "1", f"there are {index}", "count")

    def run(start):
        return make_pipeline(
            Images(9),
            lambda record: to_sft_example(record, tok, settings, ImageLayout()),
            lambda examples: collate_sft(examples, buckets),
            batch_size=4,
            seed=1,
            start_step=start,
        )

    whole = _take(run(0), 5)
    for (vision, tokens), (vision_again, tokens_again) in zip(whole[3:], _take(run(3), 2), strict=True):
        for one, other in ((vision, vision_again), (tokens, tokens_again)):
            for name, array in vars(one).items():
                np.testing.assert_array_equal(array, getattr(other, name), err_msg=name)


def test_errors_of_a_record_come_through():
    def invalid(record):
        raise ValueError(f"record {record.id!r} is broken")

    for threads in (0, 2):
        iterator = make_pipeline(_Numbers(1), invalid, list, 1, 0, threads=threads)
        with pytest.raises(ValueError, match="record '0' is broken"):
            next(iterator)


def test_bad_arguments_are_refused_at_once():
    before = threading.active_count()
    with pytest.raises(ValueError, match="holds no record"):
        _pipeline(0)
    with pytest.raises(ValueError, match="batch_size"):
        _pipeline(3, batch_size=0)
    with pytest.raises(ValueError, match="-1"):
        _pipeline(3, seed=-1)
    with pytest.raises(ValueError, match="threads"):
        _pipeline(3, threads=-1)
    assert threading.active_count() == before
