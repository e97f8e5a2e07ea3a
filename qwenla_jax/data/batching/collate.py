"""Collates examples to batches of few fixed shapes, so that the number of compilations is bounded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.reinsertion import reinserted_images
from qwenla_jax.data.images.preprocess import MAX_ASPECT, ImageLayout
from qwenla_jax.types import PromptBatch, ReinsertedImages, ResponseBatch, TokenBatch, VisionBatch


@dataclass(frozen=True)
class Buckets:
    """The sizes that a batch's axes may have; each axis takes the smallest that fits.

    Attributes:
      frames: I, images of the whole batch.
      slots: S, patch slots of an image, windows padded to their full size.
      visual: M, visual tokens of an image.
      prompts: P, tokens of a prompt.
      tokens: T, tokens of a prompt with its response.
      images: most images of a prompt. Batches with several images in a prompt have insertions with room for so many
        (or for their own most), so that their shapes do not depend on how many there are.
      patch_values: C, values of a patch; one number, which batches without an image need too.
      shards: U, equal shards of rows and of their images, see `VisionBatch`; 1 is used where it does not divide the
        rows of a batch.

    Raises:
      ValueError: sizes that are not positive and ascending, named by the axis; images that do not divide into shards.
    """

    frames: tuple[int, ...]
    slots: tuple[int, ...]
    visual: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: tuple[int, ...]
    images: int = 1
    patch_values: int = 1176
    shards: int = 1

    def __post_init__(self) -> None:
        """Checks that sizes are positive and ascending."""
        for field in fields(self):
            if field.name in ("images", "patch_values", "shards"):
                continue
            sizes = getattr(self, field.name)
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
                raise ValueError(f"buckets of {field.name} must be positive and ascending, got {sizes}")
        if self.images < 1 or self.patch_values < 1:
            raise ValueError(f"images and patch_values must be positive, got {self.images} and {self.patch_values}")
        if self.shards < 1 or any(size % self.shards for size in self.frames):
            raise ValueError(f"shards must be positive and divide the frame buckets {self.frames}, got {self.shards}")

    def fit(self, axis: str, size: int, whose: str) -> int:
        """The smallest bucket of `axis` that holds `size`.

        Raises:
          ValueError: there is none; the message names `whose` size it is and the largest bucket.
        """
        sizes: tuple[int, ...] = getattr(self, axis)
        for bucket in sizes:
            if size <= bucket:
                return bucket
        raise ValueError(f"{whose} needs {size} {axis}, but the largest bucket of {axis} is {sizes[-1]}")

    def shards_of(self, rows: int) -> int:
        """The shards that a batch of so many rows has."""
        return self.shards if rows % self.shards == 0 else 1

    def fit_frames(self, counts: Sequence[int], rows: int, whose: str) -> int:
        """The smallest bucket of frames whose shards hold the images of every shard of rows.

        Args:
          counts: images of the first rows; the others have none.
          rows: of the batch.
          whose: for the message of the ValueError that `fit` raises.
        """
        shards = self.shards_of(rows)
        most = max(sum(counts[first : first + rows // shards]) for first in range(0, rows, rows // shards))
        return self.fit("frames", most * shards, whose)


def ladder(low: int, high: int, multiple: int = 1) -> tuple[int, ...]:
    """Ascending sizes that end at `high` or just above: powers of two times 1 and 1.5.

    Args:
      low, high: the first and the last size, rounded up to the multiple.
      multiple: every size is a multiple of it.

    Raises:
      ValueError: not 1 <= low <= high, or the multiple is not positive.
    """
    if not 1 <= low <= high or multiple < 1:
        raise ValueError(f"expected 1 <= low <= high and a positive multiple, got {low}, {high}, {multiple}")
    first, last = -(-low // multiple), -(-high // multiple)
    steps = {first, last}
    power = 1
    while power < last:
        steps.update(step for step in (power, power * 3 // 2) if first < step < last)
        power *= 2
    return tuple(step * multiple for step in sorted(steps))


def make_buckets(
    layout: ImageLayout,
    batch_size: int,
    min_pixels: int,
    max_pixels: int,
    max_prompt_tokens: int,
    max_tokens: int,
    max_images: int = 1,
    max_aspect: float = MAX_ASPECT,
    shards: int = 1,
) -> Buckets:
    """Buckets that hold all images and texts within given bounds.

    Args:
      layout: the vision tower's numbers.
      batch_size: B; the batch's images are padded to multiples of it, so that they divide over devices as the rows do.
      min_pixels, max_pixels: the image processor's bounds.
      max_prompt_tokens, max_tokens: of a prompt, and of a prompt with its response.
      max_images: most images of a record; where the caller limits no record, on average over a batch, or over a shard
        of its rows.
      max_aspect: the longer side of an image over the shorter, at most; 1 where all images are square.
      shards: devices that rows are sharded over; 1 is used where the rows do not divide.

    Returns:
      Sizes in steps of 1.5 or less (of 2 at the small end), see `ladder`.

    Raises:
      ValueError: bounds out of order, or an aspect below 1.
    """
    if not 1 <= min_pixels <= max_pixels or max_aspect < 1:
        raise ValueError(
            "expected 1 <= min_pixels <= max_pixels and max_aspect of at least 1, got"
            f" {min_pixels}, {max_pixels}, {max_aspect}"
        )
    grids = list(_largest_grids(min_pixels / layout.token_pixels**2, max_pixels / layout.token_pixels**2, max_aspect))
    least = max(1, min_pixels // layout.token_pixels**2)
    most = max(rows * cols for rows, cols in grids)
    slots = max(layout.frame_slots(rows, cols) for rows, cols in grids)
    fewest_slots = math.ceil(least / layout.window_tokens**2) * layout.window_slots
    return Buckets(
        frames=tuple(n * batch_size for n in ladder(1, max_images)),
        slots=ladder(min(fewest_slots, slots), slots, layout.window_slots),
        visual=ladder(min(least, most), most),
        prompts=ladder(min(32, max_prompt_tokens), max_prompt_tokens, 8),
        tokens=ladder(min(64, max_tokens), max_tokens, 8),
        images=max_images,
        patch_values=3 * layout.temporal_patch_size * layout.patch_size**2,
        shards=shards if batch_size % shards == 0 else 1,
    )


def _largest_grids(least: float, most: float, aspect: float) -> Iterator[tuple[int, int]]:
    """For each number of rows the most columns >= rows that `smart_resize` can give; bounds in visual tokens.

    Its two roundings exceed the bounds: an enlarged image is rounded up (one of 13x13 for at least 112x112 becomes
    140x140, because 4 tokens are computed as 4.000000001), and a shrunk strip has at least one row.
    """
    for rows in itertools.count(1):
        within = min(most / rows, aspect * (rows + 1))
        strip = min(2 * aspect, math.sqrt(aspect * most)) if rows == 1 else 0
        enlarged = min(aspect * rows, math.sqrt(aspect * least), least / (rows - 1) if rows > 1 else math.inf)
        cols = max(math.floor(within), math.floor(strip), math.ceil(enlarged + 1e-6))
        if cols < rows and rows > 1:
            return
        yield rows, max(cols, 1)


def collate_prompts(
    examples: Sequence[Example],
    buckets: Buckets,
    batch_size: int | None = None,
    block: ReattentionOptions | None = None,
) -> tuple[VisionBatch, PromptBatch]:
    """Pads prompts to buckets.

    Args:
      examples: at most `batch_size`, from `to_prompt_example`.
      buckets: the sizes allowed.
      batch_size: Q, the rows; None for as many as there are examples. A row without an example is one text token of
        id 0, so that no length is 0.
      block: options of the insertions; None where nothing is inserted.

    Raises:
      ValueError: no or too many examples, an example with a response, or one that fits no bucket, named by its record;
        other images are to be shown, and there are none or of other sizes.
    """
    for example in examples:
        if example.prompt_length != len(example.ids_T):
            raise ValueError(f"record {example.record.id!r} comes with a response, expected a prompt alone")
    vision, ids, pos, visual, length = _collate(examples, buckets, "prompts", batch_size)
    next_pos = np.ones(len(length), np.int32)
    next_pos[: len(examples)] = [example.next_pos for example in examples]
    images = None
    if block is not None:
        if block.content == "other":
            _check_others(examples, buckets, len(length))
        images = _collate_blocks(examples, buckets.images, ids.shape, vision.gather_IxM.shape[1], block)
    return vision, PromptBatch(ids, pos, visual, length, next_pos, images)


def _check_others(examples: Sequence[Example], buckets: Buckets, rows: int) -> None:
    """Raises ValueError where an insertion cannot show the next image of the batch in the place of its own."""
    per_shard = rows // buckets.shards_of(rows)
    for first in range(0, len(examples), per_shard):
        frames = [frame for example in examples[first : first + per_shard] for frame in example.frames]
        if len(frames) == 1 or len({(frame.rows, frame.cols) for frame in frames}) > 1:
            raise ValueError(
                f"reattention.content=other: {_named(examples[first])} and what is batched with it have {len(frames)} "
                "image(s); expected at least two of one size, of which each is shown in another's place"
            )


def collate_sft(
    examples: Sequence[Example], buckets: Buckets, batch_size: int | None = None
) -> tuple[VisionBatch, TokenBatch]:
    """Pads prompts with their responses to buckets; the loss weighs 1 on the response's tokens.

    The loss has room for half of a row's tokens, or for all where a response is longer than half: of two sizes a
    bucket, the smaller one spares the head most prompts with an image.

    Args:
      examples: at most `batch_size`, from `to_sft_example`.
      buckets: the sizes allowed.
      batch_size: B, as in `collate_prompts`; the loss of a row without an example is 0.

    Raises:
      ValueError: as in `collate_prompts`, and for an example without a response.
    """
    for example in examples:
        if example.prompt_length == len(example.ids_T):
            raise ValueError(f"record {example.record.id!r} comes without a response")
    vision, ids, pos, visual, length = _collate(examples, buckets, "tokens", batch_size)
    half, longest = ids.shape[1] // 2, max(len(example.ids_T) - example.prompt_length for example in examples)
    target_BxR = np.ones((len(ids), half if longest <= half else ids.shape[1]), np.int32)
    loss_BxR = np.zeros(target_BxR.shape, np.float32)
    for row, example in enumerate(examples):
        n = len(example.ids_T) - example.prompt_length
        target_BxR[row, :n] = np.arange(example.prompt_length, len(example.ids_T))
        loss_BxR[row, :n] = 1
    return vision, TokenBatch(ids, pos, visual, length, target_BxR, loss_BxR)


def collate_responses(
    examples: Sequence[Example],
    buckets: Buckets,
    batch_size: int | None,
    lengths: Sequence[int],
    insertions: Sequence[int],
    block: ReattentionOptions,
    tag: int,
) -> tuple[VisionBatch, PromptBatch, ResponseBatch]:
    """Pads prompts and, separately, their responses, for training with re-attention.

    Args:
      examples: at most `batch_size`, from `to_sft_example`.
      buckets: the sizes allowed of images and prompts.
      batch_size: B, as in `collate_prompts`; a row without an example has a response of length 0.
      lengths: the sizes allowed of responses, ascending.
      insertions: the numbers of insertions allowed, ascending; the batch takes the smallest that is enough for the
        response with the most tags, or the last.
      block: options of the insertions.
      tag: id of the token before which images are inserted.

    Raises:
      ValueError: as in `collate_sft`, or a response longer than allowed.
    """
    asked, answers = [], []
    for example in examples:
        n = example.prompt_length
        if n == len(example.ids_T):
            raise ValueError(f"record {example.record.id!r} comes without a response")
        answers.append(example.ids_T[n:])
        asked.append(
            dataclasses.replace(
                example,
                ids_T=example.ids_T[:n],
                pos_Tx3=example.pos_Tx3[:n],
                visual_T=example.visual_T[:n],
                next_pos=int(example.pos_Tx3[n, 0]),
            )
        )
    vision, prompts = collate_prompts(asked, buckets, batch_size, block)
    longest = max(range(len(answers)), key=lambda row: len(answers[row]))
    R = next((size for size in lengths if size >= len(answers[longest])), None)
    if R is None:
        raise ValueError(
            f"{_named(examples[longest])} has a response of {len(answers[longest])} tokens, but at most {lengths[-1]} "
            "are allowed"
        )
    rows = len(prompts.length_Q)
    most = max(int((ids == tag).sum()) for ids in answers)
    E = next((number for number in insertions if number >= most), insertions[-1])
    ids_BxR = np.zeros((rows, R), np.int32)
    length_B = np.zeros(rows, np.int32)
    for row, ids in enumerate(answers):
        ids_BxR[row, : len(ids)], length_B[row] = ids, len(ids)
    return vision, prompts, ResponseBatch(ids_BxR, length_B, np.tile(np.arange(E, dtype=np.int32), (rows, 1)))


def _collate(
    examples: Sequence[Example], buckets: Buckets, axis: str, batch_size: int | None
) -> tuple[VisionBatch, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = len(examples) if batch_size is None else batch_size
    if not 1 <= len(examples) <= rows:
        raise ValueError(f"a batch of {rows} rows takes 1 to {rows} examples, got {len(examples)}")
    T = max(buckets.fit(axis, len(example.ids_T), _named(example)) for example in examples)
    vision, first_frame = _collate_frames(examples, buckets, rows)
    M = vision.gather_IxM.shape[1]
    ids_BxT = np.zeros((rows, T), np.int32)
    pos_BxTx3 = np.zeros((rows, T, 3), np.int32)
    visual_BxT = np.full((rows, T), -1, np.int32)
    length_B = np.ones(rows, np.int32)
    for row, (example, first) in enumerate(zip(examples, first_frame, strict=True)):
        n = len(example.ids_T)
        ids_BxT[row, :n] = example.ids_T
        pos_BxTx3[row, :n] = example.pos_Tx3
        length_B[row] = n
        counts = [frame.num_visual_tokens for frame in example.frames]
        flat = [(first + number) * M + np.arange(count) for number, count in enumerate(counts)]
        if flat:
            at = np.flatnonzero(example.visual_T >= 0)  # an image may stand more than once, or in part
            visual_BxT[row, at] = np.concatenate(flat)[example.visual_T[at]]
    return vision, ids_BxT, pos_BxTx3, visual_BxT, length_B


def _collate_blocks(
    examples: Sequence[Example], most: int, prompts: tuple[int, int], tokens: int, options: ReattentionOptions
) -> ReinsertedImages:
    """The padded insertions. Their slots follow from the buckets alone, and from whether a record has several images.

    Args:
      examples, options: see `collate_prompts`.
      most: images that a record may have.
      prompts: rows, and tokens of the longest prompt.
      tokens: visual tokens of an image.
    """
    (rows, P), N = prompts, max(1, *(len(example.frames) for example in examples))
    X = options.slots(N, tokens)
    if N > 1:
        N = max(N, most)
        X = min(options.slots(N, tokens), P)  # an insertion repeats parts of its prompt
    source_QxX = np.full((rows, X), -1, np.int32)
    pos_QxXx3 = np.zeros((rows, X, 3), np.int32)
    moves_QxX = np.zeros((rows, X), np.int32)
    length_Q, span_Q = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    tokens_QxN = np.zeros((rows, N), np.int32)
    for row, example in enumerate(examples):
        if example.record.videos:
            raise ValueError(
                f"{_named(example)} has a video, which cannot be put into a response again (the paper does so with "
                "images); leave the re-attention out or the record"
            )
        grids = [(frame.rows, frame.cols) for frame in example.frames]
        source, pos, moves, span_Q[row] = reinserted_images(example.visual_T, example.pos_Tx3, grids, options)
        tokens_QxN[row, : len(grids)] = [r * c for r, c in grids]
        n = length_Q[row] = len(source)
        source_QxX[row, :n], pos_QxXx3[row, :n], moves_QxX[row, :n] = source, pos, moves
    return ReinsertedImages(source_QxX, pos_QxXx3, moves_QxX, length_Q, span_Q, tokens_QxN)


def _collate_frames(examples: Sequence[Example], buckets: Buckets, rows: int) -> tuple[VisionBatch, list[int]]:
    """The batch's images, consecutive within a shard, and for each example the row of its first image."""
    S, M, C = buckets.slots[0], buckets.visual[0], buckets.patch_values
    for example in examples:
        for frame in example.frames:
            S = max(S, buckets.fit("slots", len(frame.valid_S), _named(example)))
            M = max(M, buckets.fit("visual", frame.num_visual_tokens, _named(example)))
            if frame.patches_SxC.shape[1] != C:
                raise ValueError(
                    f"{_named(example)} has {frame.patches_SxC.shape[1]} values a patch, but the buckets have {C}"
                )
    counts, shards = [len(example.frames) for example in examples], buckets.shards_of(rows)
    most = max(examples, key=lambda example: len(example.frames))
    whose = f"a batch of {len(examples)} records, of which {_named(most)} has the most images, {len(most.frames)},"
    frames = buckets.fit_frames(counts, rows, whose)
    vision = VisionBatch(
        patches_IxSxC=np.zeros((frames, S, C), np.float32),
        hw_IxSx2=np.zeros((frames, S, 2), np.int32),
        valid_IxS=np.zeros((frames, S), bool),
        gather_IxM=np.zeros((frames, M), np.int32),
        shards=shards,
    )
    first_frame, at = [], 0
    for row, example in enumerate(examples):
        shard, within = divmod(row, rows // shards)
        at = at if within else shard * (frames // shards)
        first_frame.append(at)
        for frame in example.frames:
            n = len(frame.valid_S)
            vision.patches_IxSxC[at, :n] = frame.patches_SxC
            vision.hw_IxSx2[at, :n] = frame.hw_Sx2
            vision.valid_IxS[at, :n] = frame.valid_S
            vision.gather_IxM[at, : len(frame.gather_M)] = frame.gather_M
            at += 1
    return vision, first_frame


def _named(example: Example) -> str:
    return f"record {example.record.id!r}"
