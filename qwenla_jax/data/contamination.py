"""Leak guard: records and images of what is trained on that are in what is evaluated, too.

Images are compared in four ways, from certain to likely: the same file, the same pixels, the same COCO number in
their file names (COCO's images of train2014, val2014 and train2017 carry one set of numbers), and the same look after
re-encoding and resizing. Look is compared in two steps: a hash of the 8x8 lowest frequencies of the discrete cosine
transform, of which at most `HASH_BITS` of 64 may differ, and, because line drawings share such hashes, the correlation
of 24x24 thumbnails, which has to reach `CORRELATION`. On 252 real mathematical drawings copies (JPEG of quality 30,
scaled to half or twice the size) differ in at most 18 bits and reach at least 0.98; different images reach 0.80 at
most. Images that were cropped, turned, drawn over or made grey are not found; those scaled to a quarter, or down
without smoothing, not always. Simple drawings on one background (easy-VQA) give some pairs that are no copies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.datasets.raw_record import FileImage, RawImage, RawRecord, RecordError
from qwenla_jax.data.record import Record

HASH_BITS = 22
CORRELATION = 0.95
_SHAPE = 0.15  # sides' ratios of two copies differ by so much at most, as a logarithm
_THUMB = 24
_FLAT = 2.0  # standard deviation of grey below which an image has no look of its own
_COCO = re.compile(r"COCO_(?:train|val|test)20\d\d_(\d{12})\.")
_COCO_FOLDER = re.compile(r"(?:^|/)(?:coco(?:/|$)|(?:train|val|test)20\d\d$)")
_NUMBER = re.compile(r"(\d{12})\.")


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of one image.

    Attributes:
      record: id of its record.
      file: digest of its file; None where the source does not show it.
      pixels: digest of its size and RGB values; None where only a name is known.
      number: COCO's number of it, from its name; None where the name has none.
      phash: perceptual hash, 64 bits; None for an image of one colour.
      thumb: float16 [1728], its thumbnail in RGB each channel with mean 0, of length 1; None like `phash`.
      shape: logarithm of width / height.
    """

    record: str
    file: bytes | None = None
    pixels: bytes | None = None
    number: int | None = None
    phash: int | None = None
    thumb: np.ndarray | None = None
    shape: float = 0.0


@dataclass(frozen=True)
class Fingerprints:
    """What is remembered of a source.

    Attributes:
      name: of the source.
      ids: of its records.
      images: of its records, an image of two records twice.
      unread: what could not be read, a message each.
      reasons: the kind of fault of each of these, for counting.
    """

    name: str
    ids: tuple[str, ...]
    images: tuple[Fingerprint, ...]
    unread: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def coco_number(name: str) -> int | None:
    """COCO's number of an image called "COCO_val2014_000000310196.jpg" or "coco/train2017/000000310196.jpg"."""
    folder, _, file = name.rpartition("/")
    result = _COCO.search(name) or (_NUMBER.match(file) if _COCO_FOLDER.search(folder) else None)
    return int(result[1]) if result else None


def image_fingerprint(image: Image.Image, record: str, file: bytes | None = None, name: str = "") -> Fingerprint:
    """What is remembered of an image.

    Args:
      image: the image, RGB.
      record: id of its record.
      file: the bytes it was decoded from, where they are known.
      name: its file name, where it is known.
    """
    image = image.convert("RGB")
    pixels = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    pixels.update(image.tobytes())
    phash, thumb = None, None
    # Its filter widens with the reduction, so that it averages over all pixels and lines stay where they are.
    small = np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BILINEAR), np.float64)
    if small.std(axis=(0, 1)).max() >= _FLAT:
        low = _low_frequencies(small.mean(-1))
        phash = int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
        centred = small - small.mean(axis=(0, 1))  # of each channel: a coloured background is no likeness
        thumb = (centred / np.linalg.norm(centred)).astype(np.float16).ravel()
    return Fingerprint(
        record,
        hashlib.blake2b(file, digest_size=16).digest() if file is not None else None,
        pixels.digest(),
        coco_number(name),
        phash,
        thumb,
        math.log(image.width / image.height),
    )


def _low_frequencies(small: np.ndarray) -> np.ndarray:
    """float64 [64]: the 8x8 lowest frequencies of the cosine transform of a thumbnail."""
    at = np.arange(_THUMB)
    waves = np.cos(np.pi * np.outer(np.arange(8), 2 * at + 1) / (2 * _THUMB))
    return (waves @ small @ waves.T).ravel()


def take_fingerprints(
    source: RecordSource, name: str, check: Callable[[Record], object] | None = None, size: int | None = None
) -> Fingerprints:
    """Reads every record of a source; a source with `entry` (a dataset) shows its files' bytes and names as well.

    Args:
      source: the records; those that cannot be read are listed in `unread`.
      name: of the source.
      check: raises ValueError for a record that cannot be used for another reason.
      size: only the first so many.
    """
    ids: list[str] = []
    images: list[Fingerprint] = []
    unread: list[tuple[str, str]] = []
    known: dict[str, Fingerprint] = {}
    raw_record_of = getattr(source, "raw_record", None)
    for index in range(min(len(source), len(source) if size is None else size)):
        try:
            raw_record = None if raw_record_of is None else raw_record_of(index)
            if raw_record is not None and raw_record.fault is None:
                ids.append(raw_record.id)
            if check is None and raw_record is not None and all(each.name in known for each in raw_record.images):
                for _, message in raw_record.faults():
                    raise RecordError(raw_record.where, "text", message)
                images += [dataclasses.replace(known[each.name], record=raw_record.id) for each in raw_record.images]
                continue
            record = source[index]
            if check is not None:
                check(record)
            if raw_record is None:
                ids.append(record.id)
            for number, image in enumerate(record.images):
                if raw_record is None:
                    images.append(image_fingerprint(image, record.id))
                    continue
                place = raw_record.images[number]
                if place.name not in known:
                    known[place.name] = image_fingerprint(image, record.id, place.read(), place.name)
                images.append(dataclasses.replace(known[place.name], record=record.id))
        except ValueError as error:
            unread.append((str(getattr(error, "reason", "unusable")), str(error)))
    return Fingerprints(
        name, tuple(ids), tuple(images), tuple(text for _, text in unread), tuple(kind for kind, _ in unread)
    )


class RawRecords(Protocol):
    """A dataset, or a part of one."""

    name: str

    def __len__(self) -> int:
        """Number of records."""
        ...

    def raw_record(self, index: int) -> RawRecord:
        """The row at an index from 0."""
        ...


def file_leaks(trained: RawRecords, evaluated: RawRecords, size: int | None = None) -> LeakReport:
    """Compares two datasets without opening an image: by files, and by COCO's numbers in their names.

    Only files of one length are read, so that 100,000 images take seconds. Images inside of other files (parquet)
    are not compared.

    Args:
      trained, evaluated: the two.
      size: only the first so many records of the evaluation.
    """
    counts = len(trained), len(evaluated) if size is None else min(size, len(evaluated))
    rows = [[source.raw_record(i) for i in range(n)] for source, n in zip((trained, evaluated), counts, strict=True)]
    lengths = [{_length(each) for raw_record in raw_records for each in raw_record.images} for raw_records in rows]
    both = (lengths[0] & lengths[1]) - {None}
    digests: dict[str, bytes] = {}

    def prints(name: str, raw_records: list[RawRecord]) -> Fingerprints:
        result = []
        for raw_record in raw_records:
            for each in raw_record.images:
                if _length(each) in both and each.name not in digests:
                    with contextlib.suppress(ValueError):  # what cannot be read is told of where its record is met
                        digests[each.name] = hashlib.blake2b(each.read(), digest_size=16).digest()
                result.append(Fingerprint(raw_record.id, digests.get(each.name), number=coco_number(each.name)))
        return Fingerprints(name, tuple(raw_record.id for raw_record in raw_records), tuple(result))

    return find_leaks(prints(trained.name, rows[0]), prints(evaluated.name, rows[1]))


def _length(image: RawImage) -> int | None:
    """Of an image's file; None where it has none of its own."""
    try:
        return image.path.stat().st_size if isinstance(image, FileImage) else None
    except OSError:
        return None


def named_fingerprints(name: str, images: Iterable[tuple[str, str]]) -> Fingerprints:
    """Of an evaluation whose images are not at hand, such as POPE's or CHAIR's list of COCO file names.

    Args:
      name: of the evaluation.
      images: (id of the question, file name of its image).
    """
    pairs = tuple(images)
    result = tuple(Fingerprint(record, number=coco_number(file)) for record, file in pairs)
    return Fingerprints(name, tuple(record for record, _ in pairs), result)


@dataclass(frozen=True)
class Leak:
    """One image of the training data that is in the evaluation.

    Attributes:
      trained, evaluated: ids of the records.
      how: "file", "pixels", "number" or "look", the most certain one that holds.
      correlation: of the thumbnails for "look", else 1.
    """

    trained: str
    evaluated: str
    how: str
    correlation: float = 1.0


@dataclass(frozen=True)
class LeakReport:
    """What of the training data is in the evaluation.

    Attributes:
      trained, evaluated: names of the two.
      same_ids: ids that both have; they need not mean the same question.
      leaks: every pair of images found.
      images: number of the training data's images, and of those that are in the evaluation.
      unread: records of either that could not be read, and were not compared.
    """

    trained: str
    evaluated: str
    same_ids: tuple[str, ...]
    leaks: tuple[Leak, ...]
    images: tuple[int, int]
    unread: tuple[str, ...]

    def ids(self) -> tuple[str, ...]:
        """Records of the training data with an image of the evaluation, to leave out."""
        return tuple(dict.fromkeys(leak.trained for leak in self.leaks))

    def text(self, most: int = 20) -> str:
        """The report, with at most so many ids of each kind."""
        total, leaked = self.images
        ids = self.ids()
        lines = [f"{leaked} images of {total} of {self.trained} are in {self.evaluated}{_some(ids, most)}"]
        for how in ("file", "pixels", "number", "look"):
            pairs = [f"{leak.trained} = {leak.evaluated}" for leak in self.leaks if leak.how == how]
            if pairs:
                lines.append(f"  by {how}, {len(pairs)} pairs{_some(pairs, most)}")
        lines.append(f"{len(self.same_ids)} ids of {self.trained} are in {self.evaluated}{_some(self.same_ids, most)}")
        if self.unread:
            lines.append(f"{len(self.unread)} records cannot be read and were not compared{_some(self.unread, most)}")
        return "\n".join(lines)


def _some(names: Sequence[str], most: int) -> str:
    shown = ", ".join(names[:most]) + (f", ... and {len(names) - most} more" if len(names) > most else "")
    return f": {shown}" if shown else ""


def find_leaks(trained: Fingerprints, evaluated: Fingerprints) -> LeakReport:
    """Compares two sources, every image with every image."""
    indices: dict[str, dict[object, list[Fingerprint]]] = {
        how: defaultdict(list) for how in ("file", "pixels", "number")
    }
    for each in evaluated.images:
        for how, index in indices.items():
            if (key := getattr(each, how)) is not None:
                index[key].append(each)
    hashed = [each for each in evaluated.images if each.phash is not None]
    hashes = np.array([each.phash for each in hashed], np.uint64)
    thumbs = np.array([each.thumb for each in hashed], np.float32).reshape(len(hashed), 3 * _THUMB**2)
    shapes = np.array([each.shape for each in hashed])
    leaks: list[Leak] = []
    leaked = 0
    for each in trained.images:
        result: dict[str, Leak] = {}
        for how, index in indices.items():
            for other in index.get(getattr(each, how), ()):
                result.setdefault(other.record, Leak(each.record, other.record, how))
        if each.phash is not None and each.thumb is not None and hashed:
            near = np.bitwise_count(hashes ^ np.uint64(each.phash)) <= HASH_BITS
            near &= np.abs(shapes - each.shape) <= _SHAPE
            for at in np.flatnonzero(near):
                if (same := float(thumbs[at] @ each.thumb.astype(np.float32))) >= CORRELATION:
                    result.setdefault(hashed[at].record, Leak(each.record, hashed[at].record, "look", min(same, 1.0)))
        leaks += result.values()
        leaked += bool(result)
    both = set(evaluated.ids)
    return LeakReport(
        trained.name,
        evaluated.name,
        tuple(name for name in trained.ids if name in both),
        tuple(leaks),
        (len(trained.images), leaked),
        (*trained.unread, *evaluated.unread),
    )
