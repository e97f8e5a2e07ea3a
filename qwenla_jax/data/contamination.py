"""Contamination: records and images of the training data that are also in an evaluation.

Images are compared in four ways, from certain to likely: same file, same pixels, same COCO number in the file name
(train2014, val2014 and train2017 share one numbering), and same appearance after re-encoding and resizing. Appearance
("look") is compared in two steps: a hash of the 8x8 lowest frequencies of the discrete cosine transform, of which at
most `HASH_BITS` of 64 may differ; then, because line drawings share such hashes, the correlation of 24x24 thumbnails,
which must reach `CORRELATION`. On 252 real mathematical drawings, copies (JPEG of quality 30, scaled to half or twice
the size) differ in at most 18 bits and correlate at 0.98 or more; different images correlate at 0.80 or less. Cropped,
rotated, annotated or grey copies are not found; copies scaled to a quarter, or down without smoothing, not always.
Simple drawings on one background (easy-VQA) give some false positives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.datasets.raw_record import Dataset, FileImage, RawImage, RawRecord, RecordError
from qwenla_jax.data.record import Record
from qwenla_jax.data.sources.splits import SelectedRecords

HASH_BITS = 22
CORRELATION = 0.95
_SHAPE = 0.15  # largest difference of two copies' log(width / height)
_THUMB = 24
_FLAT = 2.0  # standard deviation of grey below which an image counts as one colour
_COCO = re.compile(r"COCO_(?:train|val|test)20\d\d_(\d{12})\.")
_COCO_FOLDER = re.compile(r"(?:^|/)(?:coco(?:/|$)|(?:train|val|test)20\d\d$)")
_NUMBER = re.compile(r"(\d{12})\.")


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of one image.

    Attributes:
      record: id of its record.
      file: digest of its file; None where the source gives no file.
      pixels: digest of its size and RGB values; None where only the name is known.
      number: COCO number in its file name; None where there is none.
      phash: perceptual hash, 64 bits; None for an image of one colour.
      thumb: float16 [1728], RGB thumbnail of norm 1, each channel with mean 0; None like `phash`.
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
    """The fingerprints of a source.

    Attributes:
      name: of the source.
      ids: of its records.
      images: of its records; an image of two records is listed twice.
      unread: a message for each record that could not be read.
      reasons: the kind of fault of each of these, for counting.
    """

    name: str
    ids: tuple[str, ...]
    images: tuple[Fingerprint, ...]
    unread: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def coco_number(name: str) -> int | None:
    """The COCO number in a file name such as "COCO_val2014_000000310196.jpg" or "coco/train2017/000000310196.jpg"."""
    folder, _, file = name.rpartition("/")
    result = _COCO.search(name) or (_NUMBER.match(file) if _COCO_FOLDER.search(folder) else None)
    return int(result[1]) if result else None


def image_fingerprint(image: Image.Image, record: str, file: bytes | None = None, name: str = "") -> Fingerprint:
    """The fingerprint of an image.

    Args:
      image: the image, RGB.
      record: id of its record.
      file: the bytes it was decoded from, where known.
      name: its file name, where known.
    """
    image = image.convert("RGB")
    pixels = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    pixels.update(image.tobytes())
    phash, thumb = None, None
    # Pillow's filter widens with the reduction: it averages over all pixels.
    small = np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BILINEAR), np.float64)
    if small.std(axis=(0, 1)).max() >= _FLAT:
        low = _low_frequencies(small.mean(-1))
        phash = int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
        centred = small - small.mean(axis=(0, 1))  # per channel, so that a shared background colour does not correlate
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
    """Reads every record of a source; of a source with `raw_record` (a dataset) the files and their names too.

    Args:
      source: the records; those that cannot be read are listed in `unread`.
      name: of the source.
      check: raises ValueError for a record that cannot be used for another reason.
      size: only the first so many records.
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


def file_leaks(
    trained: Dataset | SelectedRecords, evaluated: Dataset | SelectedRecords, size: int | None = None
) -> LeakReport:
    """Compares two datasets without opening an image: by files, and by COCO's numbers in their names.

    Only files whose sizes occur in both are read, so that 100,000 images take seconds. Images stored inside other files
    (parquet) are not compared.

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
                    with contextlib.suppress(ValueError):  # reported where the record is read
                        digests[each.name] = hashlib.blake2b(each.read(), digest_size=16).digest()
                result.append(Fingerprint(raw_record.id, digests.get(each.name), number=coco_number(each.name)))
        return Fingerprints(name, tuple(raw_record.id for raw_record in raw_records), tuple(result))

    return find_leaks(prints(trained.name, rows[0]), prints(evaluated.name, rows[1]))


def _length(image: RawImage) -> int | None:
    """Bytes of an image's own file; None where it has none."""
    try:
        return image.path.stat().st_size if isinstance(image, FileImage) else None
    except OSError:
        return None


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
      same_ids: ids in both; they need not mean the same question.
      leaks: every pair of images found.
      images: number of the training data's images, and of those that are in the evaluation.
      unread: messages for the records that could not be read and were not compared.
    """

    trained: str
    evaluated: str
    same_ids: tuple[str, ...]
    leaks: tuple[Leak, ...]
    images: tuple[int, int]
    unread: tuple[str, ...]

    def ids(self) -> tuple[str, ...]:
        """Ids of the training records that share an image with the evaluation."""
        return tuple(dict.fromkeys(leak.trained for leak in self.leaks))

    def text(self, most: int = 20) -> str:
        """The report, with at most `most` ids of each kind."""
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
