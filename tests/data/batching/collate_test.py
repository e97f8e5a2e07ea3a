"""Examples and batches: read back by hand, with a tokenizer whose every byte is a token."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.collate import Buckets, collate_prompts, collate_sft, ladder, make_buckets
from qwenla_jax.data.batching.example import to_prompt_example, to_sft_example
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings, image_to_patches, smart_resize
from qwenla_jax.data.record import Record
from qwenla_jax.text.tokenizer import train_tiny_tokenizer

LAYOUT = ImageLayout()
SETTINGS = ProcessorSettings(56 * 56, 200 * 200, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
BUCKETS = Buckets(frames=(2, 4), slots=(64, 128, 256), visual=(8, 32), prompts=(32, 64), tokens=(64, 128))


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer(["Which colour is it?", "<SUMMARY>a</SUMMARY><CONCLUSION>red</CONCLUSION>"])


def _record(name, sizes=((112, 112),), question="How many?", response="<SUMMARY>x</SUMMARY>"):
    rng = np.random.default_rng(len(name))
    images = tuple(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes)
    return Record(name, images, question, "2", response, "count")


def test_prompt_example_by_hand(tok):
    example = to_prompt_example(_record("a", [(56, 84), (84, 56)]), tok, SETTINGS, LAYOUT, "Be brief.")
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    text += "".join("<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>" for _ in range(2))
    text += "How many?<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(example.ids_T.tolist()) == text
    assert example.prompt_length == len(example.ids_T) == len(example.pos_Tx3) == len(example.visual_T)
    at = np.flatnonzero(example.ids_T == tok.ids.image_pad)
    assert example.visual_T[at].tolist() == list(range(12))
    assert (np.delete(example.visual_T, at) == -1).all()
    assert [(frame.rows, frame.cols) for frame in example.frames] == [(3, 2), (2, 3)]
    # Each image of 6 tokens moves the position by 3 only.
    assert example.next_pos == len(example.ids_T) - 6


def test_loss_is_on_the_response_and_its_end(tok):
    records = [_record("a"), _record("bb", question="Which colour is that shape?", response="<CONCLUSION>2")]
    _, batch = collate_sft([to_sft_example(record, tok, SETTINGS, LAYOUT) for record in records], BUCKETS)
    for row, record in enumerate(records):
        targets = batch.target_BxR[row][batch.loss_BxR[row] == 1]
        assert tok.decode(batch.ids_BxT[row][targets].tolist()) == record.response + "<|im_end|>"
        assert batch.ids_BxT[row, targets[-1]] == tok.ids.im_end and targets[-1] == batch.length_B[row] - 1
        assert (batch.target_BxR[row] > 0).all()
    assert set(np.unique(batch.loss_BxR)) == {0.0, 1.0}
    assert batch.target_BxR.shape[1] == batch.ids_BxT.shape[1] // 2
    _, long = collate_sft([to_sft_example(_record("a", response="2" * 70), tok, SETTINGS, LAYOUT)], BUCKETS)
    assert long.loss_BxR.sum() == 71 and long.target_BxR.shape == long.ids_BxT.shape


@pytest.mark.parametrize(
    ("shards", "size", "held"), [(1, 4, [6, 20, 9, 0]), (2, 4, [6, 20, 9, 0]), (4, 8, [0, 0, 6, 20, 9, 0, 0, 0])]
)
def test_visual_indices_reach_the_right_image(tok, shards, size, held):
    records = [_record("a", []), _record("bb", [(56, 84), (112, 140)]), _record("ccc", [(84, 84)])]
    examples = [to_prompt_example(record, tok, SETTINGS, LAYOUT) for record in records]
    buckets = dataclasses.replace(BUCKETS, frames=(4, 8), shards=shards)
    vision, batch = collate_prompts(examples, buckets, batch_size=4)
    frames, M = vision.gather_IxM.shape
    assert (frames, M) == (size, 32) and vision.shards == shards
    # Stand in for the tower: a visual token is the four patches that it is merged from.
    merged = vision.patches_IxSxC.reshape(frames, -1, 4 * 1176)
    tokens = np.take_along_axis(merged, vision.gather_IxM[:, :, None], axis=1).reshape(frames * M, -1)
    for row, record in enumerate(records):
        visual = batch.visual_QxP[row]
        expected = []
        for image in record.images:
            frame = image_to_patches(image, SETTINGS, LAYOUT)
            expected += list(frame.patches_SxC.reshape(-1, 4 * 1176)[frame.gather_M])
        result = tokens[visual[visual >= 0]]
        own_run = row * shards // 4
        assert (visual[visual >= 0] // (frames * M // shards) == own_run).all()
        assert len(result) == len(expected)
        for one, other in zip(result, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(visual >= 0, batch.ids_QxP[row] == tok.ids.image_pad)
    assert vision.valid_IxS.sum(1).tolist() == [4 * n for n in held]


def test_padding_is_harmless(tok):
    example = to_prompt_example(_record("a"), tok, SETTINGS, LAYOUT)
    vision, batch = collate_prompts([example], BUCKETS, batch_size=3)
    n = len(example.ids_T)
    assert batch.length_Q.tolist() == [n, 1, 1]
    assert batch.next_pos_Q.tolist() == [example.next_pos, 1, 1]
    np.testing.assert_array_equal(batch.pos_QxPx3[0, :n], example.pos_Tx3)
    assert (batch.visual_QxP[1:] == -1).all() and (batch.visual_QxP[0, n:] == -1).all()
    assert not batch.ids_QxP[1:].any() and not vision.patches_IxSxC[1:].any() and not vision.valid_IxS[1:].any()
    _, sft = collate_sft([to_sft_example(_record("a"), tok, SETTINGS, LAYOUT)], BUCKETS, batch_size=3)
    assert not sft.loss_BxR[1:].any() and sft.length_B.tolist()[1:] == [1, 1]


def test_shapes_come_from_the_buckets_alone(tok):
    rng = np.random.default_rng(0)
    shapes = set()
    for number in range(60):
        sizes = [tuple(int(n) for n in rng.integers(20, 300, 2)) for _ in range(rng.integers(0, 3))]
        record = _record(str(number), sizes, "how " * int(rng.integers(1, 12)))
        vision, batch = collate_prompts([to_prompt_example(record, tok, SETTINGS, LAYOUT)], WIDE)
        shapes.add((vision.patches_IxSxC.shape, vision.gather_IxM.shape, batch.ids_QxP.shape))
    allowed = itertools.product(WIDE.frames, WIDE.slots, WIDE.visual, WIDE.prompts)
    assert shapes <= {((i, s, 1176), (i, m), (1, p)) for i, s, m, p in allowed}
    assert len(shapes) > 1


WIDE = Buckets(frames=(2,), slots=(256, 2048), visual=(64, 128), prompts=(64, 256), tokens=(256,))


@pytest.mark.parametrize(
    "record, message",
    [
        (_record("long", question="why " * 200), r"record 'long' needs \d+ prompts, .* bucket of prompts is 64"),
        (_record("wide", [(28 * 33, 30)]), r"record 'wide' needs \d+ slots, .* largest bucket of slots is 256"),
        (_record("large", [(168, 196)]), r"record 'large' needs 42 visual, .* largest bucket of visual is 32"),
        (_record("album", [(56, 56)] * 5), r"record 'album' has the most images, 5, needs 5 frames"),
    ],
)
def test_what_fits_no_bucket_is_named(tok, record, message):
    buckets = Buckets((2, 4), (64, 128, 256), (8, 32), (64,) if record.id == "long" else (256,), (256,))
    with pytest.raises(ValueError, match=message):
        collate_prompts([to_prompt_example(record, tok, SETTINGS, LAYOUT)], buckets)


def test_wrong_examples_are_refused(tok):
    with pytest.raises(ValueError, match="record 'dumb': .* needs a response"):
        to_sft_example(_record("dumb", response=None), tok, SETTINGS, LAYOUT)
    with pytest.raises(ValueError, match=r"record 'liar': .*<\|image_pad\|>"):
        to_sft_example(_record("liar", response="<|image_pad|>"), tok, SETTINGS, LAYOUT)
    with pytest.raises(ValueError, match="record 'line': .* 999x1"):
        to_prompt_example(_record("line", [(999, 1)]), tok, SETTINGS, LAYOUT)
    prompt, sft = (make(_record("a"), tok, SETTINGS, LAYOUT) for make in (to_prompt_example, to_sft_example))
    with pytest.raises(ValueError, match="'a' comes without a response"):
        collate_sft([prompt], BUCKETS)
    with pytest.raises(ValueError, match="'a' comes with a response"):
        collate_prompts([sft], BUCKETS)
    with pytest.raises(ValueError, match="takes 1 to 1 examples, got 2"):
        collate_sft([sft, sft], BUCKETS, batch_size=1)
    with pytest.raises(ValueError, match="got 0"):
        collate_sft([], BUCKETS, batch_size=1)


def test_another_image_has_to_be_there(tok):
    other = ReattentionOptions(mode="copy", content="other")
    one, two, wide = (
        to_prompt_example(_record(name, [size]), tok, SETTINGS, LAYOUT)
        for name, size in (("a", (56, 56)), ("b", (56, 56)), ("c", (56, 84)))
    )
    buckets = Buckets((2, 4), (64, 128, 256), (8, 32), (64,), (256,), patch_values=one.frames[0].patches_SxC.shape[1])
    collate_prompts([one, two], buckets, 2, other)
    for examples, count in (([one], 1), ([one, wide], 2)):
        with pytest.raises(ValueError, match=rf"'a' and what .* have {count} image.* at least two of one size"):
            collate_prompts(examples, buckets, 2, other)
    # Of each shard of rows: four rows on two devices are two and two.
    sharded = dataclasses.replace(buckets, shards=2)
    collate_prompts([one, two] * 2, sharded, 4, other)
    with pytest.raises(ValueError, match="have 1 image"):
        collate_prompts([one, two, one], sharded, 4, other)


def test_ladder_by_hand():
    assert ladder(1, 1) == (1,)
    assert ladder(5, 100) == (5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100)
    assert ladder(100, 900, 64) == (128, 192, 256, 384, 512, 768, 960)
    with pytest.raises(ValueError, match="low <= high"):
        ladder(3, 2)


def test_made_buckets_by_hand():
    buckets = make_buckets(LAYOUT, 8, 112 * 112, 112 * 112, 128, 192, max_images=3, max_aspect=1)
    assert (buckets.frames, buckets.slots, buckets.visual) == ((8, 16, 24), (64, 128, 192, 256), (16, 24, 25))
    assert buckets.prompts == (32, 48, 64, 96, 128) and buckets.tokens == (64, 96, 128, 192)
    assert buckets.patch_values == 3 * 2 * 14 * 14
    assert make_buckets(LAYOUT, 8, 1, 112 * 112, 128, 192, max_aspect=1).slots == (64,)


@pytest.mark.parametrize("aspect", [1, 2.5, 200])
@pytest.mark.parametrize("bounds", [(56 * 56, 300 * 300), (112 * 112, 112 * 112), (1, 5000), (90_000, 100_000)])
def test_no_image_falls_out_of_made_buckets(aspect, bounds):
    buckets = make_buckets(LAYOUT, 1, *bounds, 64, 64, max_aspect=aspect)
    rng = np.random.default_rng(0)
    largest_visual = largest_slots = 0
    for _ in range(20_000):
        ratio = min(aspect, float(np.exp(rng.uniform(0, np.log(aspect) * 1.1))))
        short = float(np.exp(rng.uniform(0, 7)))
        height, width = int(np.ceil(short)), max(1, int(np.ceil(short) * ratio))
        if rng.random() < 0.5:
            height, width = width, height
        rows, cols = (side // 28 for side in smart_resize(height, width, 28, *bounds))
        largest_visual = max(largest_visual, rows * cols)
        largest_slots = max(largest_slots, LAYOUT.frame_slots(rows, cols))
    assert largest_visual <= buckets.visual[-1] and largest_slots <= buckets.slots[-1]
    # Nor is the largest bucket out of all proportion.
    assert buckets.slots[-1] <= 2 * largest_slots


def test_buckets_out_of_order_are_refused():
    with pytest.raises(ValueError, match="buckets of slots"):
        Buckets((1,), (128, 64), (8,), (8,), (8,))
    with pytest.raises(ValueError, match=r"shards must be positive and divide the frame buckets \(4, 6\), got 4"):
        Buckets((4, 6), (64,), (8,), (8,), (8,), shards=4)
