"""Blocks against the positions of a prompt in which the images stand again.

Those positions themselves are checked against transformers.
"""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.collate import collate_prompts, collate_responses, make_buckets
from qwenla_jax.data.batching.example import to_prompt_example, to_sft_example
from qwenla_jax.data.batching.mrope_positions import visual_positions
from qwenla_jax.data.batching.reinsertion import reinserted_images
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.data.record import Record
from qwenla_jax.text.tokenizer import train_tiny_tokenizer

IMAGE, START, END = 90, 92, 93


def prompt(grids, rng):
    """Ids, positions and visual indexes of a prompt with these images, and the next position."""
    ids = [1] * int(rng.integers(0, 4))
    for rows, cols in grids:
        ids += [START, *[IMAGE] * (rows * cols), END, *[2] * int(rng.integers(0, 3))]
    ids = np.array([*ids, 3], np.int32)
    pos, next_pos = visual_positions(ids, IMAGE, -1, grids, 1)
    return ids, pos, np.where(ids == IMAGE, np.cumsum(ids == IMAGE) - 1, -1), next_pos


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("delimiters", [True, False])
def test_positions_are_those_of_the_images_given_again(seed, delimiters):
    """After some text of the response, once and once more."""
    rng = np.random.default_rng(seed)
    grids = [tuple(int(n) for n in rng.integers(1, 7, 2)) for _ in range(1 + seed % 3)]
    ids, pos, visual, next_pos = prompt(grids, rng)
    block = reinserted_images(visual, pos, grids, ReattentionOptions(delimiters=delimiters))
    again = []
    for rows, cols in grids:
        again += [START] * delimiters + [IMAGE] * (rows * cols) + [END] * delimiters
    np.testing.assert_array_equal(ids[block.source_X], again)
    assert visual[block.source_X[np.array(again) == IMAGE]].tolist() == list(range(sum(r * c for r, c in grids)))
    assert (block.moves_X == 1).all()
    text = [5] * int(rng.integers(0, 6))
    want, after = visual_positions([*ids, *text, *again, 6, *text, *again], IMAGE, -1, grids * 3, 1)
    first = len(ids) + len(text)
    np.testing.assert_array_equal(block.pos_Xx3 + next_pos + len(text), want[first : first + len(again)])
    behind = next_pos + len(text) + block.span
    np.testing.assert_array_equal(want[first + len(again)], [behind] * 3)
    np.testing.assert_array_equal(block.pos_Xx3 + behind + 1 + len(text), want[-len(again) :])
    assert after == behind + 1 + len(text) + block.span
    assert block.source_X.dtype == block.pos_Xx3.dtype == block.moves_X.dtype == np.int32


def test_a_block_by_hand():
    """Token (i, j) of an image of 2 x 3 stands at (p+1, p+1+i, p+1+j) and its end at p+1+3."""
    ids = np.array([7, START, *[IMAGE] * 6, END, 8])
    pos, _ = visual_positions(ids, IMAGE, -1, [(2, 3)], 1)
    block = reinserted_images(np.where(ids == IMAGE, 0, -1), pos, [(2, 3)], ReattentionOptions())
    assert block.pos_Xx3.tolist() == [
        [0, 0, 0],
        *[[1, 1 + i, 1 + j] for i in range(2) for j in range(3)],
        [4, 4, 4],
    ]
    assert block.span == 5 and block.source_X.tolist() == list(range(1, 9))


@pytest.mark.parametrize("delimiters", [True, False])
def test_original_positions_are_the_prompts_own(delimiters):
    """Only the delimiters take new ones, two an image."""
    rng = np.random.default_rng(1)
    grids = [(2, 3), (4, 1)]
    ids, pos, visual, _ = prompt(grids, rng)
    block = reinserted_images(visual, pos, grids, ReattentionOptions(delimiters=delimiters, positions="original"))
    seen = ids[block.source_X] == IMAGE
    np.testing.assert_array_equal(block.pos_Xx3[seen], pos[visual >= 0])
    assert (block.moves_X == ~seen).all()
    assert block.pos_Xx3[~seen].tolist() == ([[n] * 3 for n in range(4)] if delimiters else [])
    assert block.span == (4 if delimiters else 0)


def test_no_image_no_block():
    block = reinserted_images(np.full(3, -1), np.zeros((3, 3), np.int32), [], ReattentionOptions())
    assert len(block.source_X) == len(block.moves_X) == block.span == 0 and block.pos_Xx3.shape == (0, 3)


def test_slots():
    assert ReattentionOptions().slots(2, 5) == 14 and ReattentionOptions(delimiters=False).slots(2, 5) == 10


LAYOUT = ImageLayout(patch_size=4, merge_size=2, temporal_patch_size=2, window_size=16)
SETTINGS = ProcessorSettings(16 * 16, 32 * 32, (0.5,) * 3, (0.5,) * 3, patch_size=4)


def records(seed, tok, response=None):
    """Three records with one, two and no image of any size; the first image fills the largest bucket."""
    rng = np.random.default_rng(seed)
    sizes = [[(32, 32)], [tuple(rng.integers(16, 60, 2).tolist()) for _ in range(2)], []]
    make = to_prompt_example if response is None else to_sft_example
    images = [tuple(Image.new("RGB", size) for size in own) for own in sizes]
    made = [Record(str(n), own, "how many?", "1", response, "count") for n, own in enumerate(images)]
    return [make(record, tok, SETTINGS, LAYOUT) for record in made]


@pytest.mark.parametrize("delimiters", [True, False])
def test_a_batch_holds_each_prompts_block_in_a_shape_of_its_bucket(delimiters):
    tok = train_tiny_tokenizer(["how many circles are there?"], 320)
    buckets = make_buckets(LAYOUT, 4, SETTINGS.min_pixels, SETTINGS.max_pixels, 96, 96)
    options, shapes, lengths = ReattentionOptions(delimiters=delimiters), set(), set()
    for seed in range(4):
        examples = records(seed, tok)
        vision, prompts = collate_prompts(examples, buckets, 4, options)
        block = prompts.block
        shapes.add(tuple(x.shape for x in jax.tree.leaves(block)))
        for q, example in enumerate(examples):
            grids = [(frame.rows, frame.cols) for frame in example.frames]
            want = reinserted_images(example.visual_T, example.pos_Tx3, grids, options)
            n = int(block.length_Q[q])
            np.testing.assert_array_equal(block.source_QxX[q, :n], want.source_X)
            np.testing.assert_array_equal(block.pos_QxXx3[q, :n], want.pos_Xx3)
            np.testing.assert_array_equal(block.moves_QxX[q, :n], want.moves_X)
            assert (block.source_QxX[q, n:] == -1).all() and block.span_Q[q] == want.span
            assert block.tokens_QxN[q].tolist() == [r * c for r, c in grids] + [0] * (2 - len(grids))
            # The slots' visual tokens are the prompt's own, in order.
            seen = prompts.visual_QxP[q, block.source_QxX[q, :n]]
            assert seen[seen >= 0].tolist() == [i for i in prompts.visual_QxP[q] if i >= 0]
            lengths.add(n)
        assert block.length_Q[2] == block.length_Q[3] == 0
    assert len(shapes) == 1 and len(lengths) > 4


def test_the_shape_of_a_block_does_not_depend_on_how_many_images_several_are():
    """One image a prompt takes the slots of one; two or three take those of three, and never more than the prompt."""
    tok = train_tiny_tokenizer(["how many circles are there?"], 320)
    buckets = make_buckets(LAYOUT, 4, SETTINGS.min_pixels, SETTINGS.max_pixels, 96, 96, max_images=3)
    images = (Image.new("RGB", (32, 32)),)

    def slots(*counts):
        made = [Record(str(n), images * n, "how many?" * (4 - n), "1", None, "count") for n in counts]
        examples = [to_prompt_example(record, tok, SETTINGS, LAYOUT) for record in made]
        _, prompts = collate_prompts(examples, buckets, 4, ReattentionOptions())
        assert prompts.block.length_Q.tolist()[: len(counts)] == [18 * n for n in counts]
        return prompts.ids_QxP.shape[1], prompts.block.source_QxX.shape[1], prompts.block.tokens_QxN.shape[1]

    assert slots(1, 0)[1:] == slots(1, 1, 1, 1)[1:] == (18, 1)
    assert slots(1, 2)[1:] == slots(2, 2, 2, 0)[1:] == slots(3, 1)[1:] == (54, 3)
    buckets = dataclasses.replace(buckets, prompts=(48, 96), images=8)
    assert slots(1, 2) == (96, 96, 8)


def test_prompts_and_responses_of_a_batch_are_the_examples_cut_in_two():
    tok = train_tiny_tokenizer(["how many circles are there?"], 320)
    buckets = make_buckets(LAYOUT, 4, SETTINGS.min_pixels, SETTINGS.max_pixels, 96, 96)
    tag = tok.ids.reflection_open
    text = "so <REFLECTION>a</REFLECTION> and <REFLECTION>b</REFLECTION> two"
    examples = records(0, tok, text)
    collate = lambda lengths, insertions: collate_responses(  # noqa: E731
        examples, buckets, 4, lengths, insertions, ReattentionOptions(), tag
    )
    _, prompts, responses = collate((8, 64, 128), (1, 3))
    _, alone = collate_prompts(records(0, tok), buckets, 4, ReattentionOptions())
    jax.tree.map(np.testing.assert_array_equal, prompts, alone)
    for q, example in enumerate(examples):
        answer = example.ids_T[example.prompt_length :]
        assert responses.ids_BxR[q, : responses.length_B[q]].tolist() == answer.tolist()
        assert (answer == tag).sum() == 2
    assert responses.length_B[3] == 0 and responses.ids_BxR.shape == (4, 64) and responses.insertion_BxE.shape == (4, 3)
    assert collate((64,), (1,))[2].insertion_BxE.shape == (4, 1)
    with pytest.raises(ValueError, match="record '0' has a response of .* at most 8 are allowed"):
        collate((4, 8), (1,))
