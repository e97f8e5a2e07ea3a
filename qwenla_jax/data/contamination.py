"""Leak guard: records and pictures of what is trained on that are in what is evaluated, too.

Pictures are compared in four ways, from certain to likely: the same file, the same pixels, the same COCO number in
their file names (COCO's pictures of train2014, val2014 and train2017 carry one set of numbers), and the same look after
re-encoding and resizing. Look is compared in two steps: a hash of the 8x8 lowest frequencies of the discrete cosine
transform, of which at most `HASH_BITS` of 64 may differ, and, because line drawings share such hashes, the correlation
of 24x24 thumbnails, which has to reach `CORRELATION`. On 252 real mathematical drawings copies (JPEG of quality 30,
scaled to half or twice the size) differ in at most 18 bits and reach at least 0.98; different pictures reach 0.80 at
most. Pictures that were cropped, turned, drawn over or made grey are not found; those scaled to a quarter, or down
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
from qwenla_jax.data.datasets.raw_record import Entry, FilePicture, Picture, RecordError
from qwenla_jax.data.record import Record

HASH_BITS = 22
CORRELATION = 0.95
_SHAPE = 0.15  # sides' ratios of two copies differ by so much at most, as a logarithm
_THUMB = 24
_FLAT = 2.0  # standard deviation of grey below which a picture has no look of its own
_COCO = re.compile(r"COCO_(?:train|val|test)20\d\d_(\d{12})\.")
_COCO_FOLDER = re.compile(r"(?:^|/)(?:coco(?:/|$)|(?:train|val|test)20\d\d$)")
_NUMBER = re.compile(r"(\d{12})\.")


@dataclass(frozen=True)
class Print:
    """What is remembered of one picture.

    Attributes:
      record: id of its record.
      file: digest of its file; None where the source does not show it.
      pixels: digest of its size and RGB values; None where only a name is known.
      number: COCO's number of it, from its name; None where the name has none.
      look: hash of its look, 64 bits; None for a picture of one colour.
      thumb: float16 [1728], its thumbnail in RGB each channel with mean 0, of length 1; None like `look`.
      shape: logarithm of width / height.
    """

    record: str
    file: bytes | None = None
    pixels: bytes | None = None
    number: int | None = None
    look: int | None = None
    thumb: np.ndarray | None = None
    shape: float = 0.0


@dataclass(frozen=True)
class Prints:
    """What is remembered of a source.

    Attributes:
      name: of the source.
      ids: of its records.
      pictures: of its records, a picture of two records twice.
      unread: what could not be read, a message each.
      reasons: the kind of fault of each of these, for counting.
    """

    name: str
    ids: tuple[str, ...]
    pictures: tuple[Print, ...]
    unread: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def coco_number(name: str) -> int | None:
    """COCO's number of a picture called "COCO_val2014_000000310196.jpg" or "coco/train2017/000000310196.jpg"."""
    folder, _, file = name.rpartition("/")
    found = _COCO.search(name) or (_NUMBER.match(file) if _COCO_FOLDER.search(folder) else None)
    return int(found[1]) if found else None


def picture_print(image: Image.Image, record: str, file: bytes | None = None, name: str = "") -> Print:
    """What is remembered of a picture.

    Args:
      image: the picture, RGB.
      record: id of its record.
      file: the bytes it was decoded from, where they are known.
      name: its file name, where it is known.
    """
    image = image.convert("RGB")
    pixels = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=16)
    pixels.update(image.tobytes())
    look, thumb = None, None
    # Its filter widens with the reduction, so that it averages over all pixels and lines stay where they are.
    small = np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BILINEAR), np.float64)
    if small.std(axis=(0, 1)).max() >= _FLAT:
        low = _low_frequencies(small.mean(-1))
        look = int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
        centred = small - small.mean(axis=(0, 1))  # of each channel: a coloured background is no likeness
        thumb = (centred / np.linalg.norm(centred)).astype(np.float16).ravel()
    return Print(
        record,
        hashlib.blake2b(file, digest_size=16).digest() if file is not None else None,
        pixels.digest(),
        coco_number(name),
        look,
        thumb,
        math.log(image.width / image.height),
    )


def _low_frequencies(small: np.ndarray) -> np.ndarray:
    """float64 [64]: the 8x8 lowest frequencies of the cosine transform of a thumbnail."""
    at = np.arange(_THUMB)
    waves = np.cos(np.pi * np.outer(np.arange(8), 2 * at + 1) / (2 * _THUMB))
    return (waves @ small @ waves.T).ravel()


def take_prints(
    source: RecordSource, name: str, check: Callable[[Record], object] | None = None, size: int | None = None
) -> Prints:
    """Reads every record of a source; a source with `entry` (a corpus) shows its files' bytes and names as well.

    Args:
      source: the records; those that cannot be read are listed in `unread`.
      name: of the source.
      check: raises ValueError for a record that cannot be used for another reason.
      size: only the first so many.
    """
    ids: list[str] = []
    pictures: list[Print] = []
    unread: list[tuple[str, str]] = []
    known: dict[str, Print] = {}
    entry_of = getattr(source, "entry", None)
    for index in range(min(len(source), len(source) if size is None else size)):
        try:
            entry = None if entry_of is None else entry_of(index)
            if entry is not None and entry.fault is None:
                ids.append(entry.id)
            if check is None and entry is not None and all(each.name in known for each in entry.pictures):
                for _, message in entry.faults():
                    raise RecordError(entry.where, "text", message)
                pictures += [dataclasses.replace(known[each.name], record=entry.id) for each in entry.pictures]
                continue
            record = source[index]
            if check is not None:
                check(record)
            if entry is None:
                ids.append(record.id)
            for number, image in enumerate(record.images):
                if entry is None:
                    pictures.append(picture_print(image, record.id))
                    continue
                place = entry.pictures[number]
                if place.name not in known:
                    known[place.name] = picture_print(image, record.id, place.read(), place.name)
                pictures.append(dataclasses.replace(known[place.name], record=record.id))
        except ValueError as error:
            unread.append((str(getattr(error, "reason", "unusable")), str(error)))
    return Prints(
        name, tuple(ids), tuple(pictures), tuple(text for _, text in unread), tuple(kind for kind, _ in unread)
    )


class Entries(Protocol):
    """A corpus, or a part of one."""

    name: str

    def __len__(self) -> int:
        """Number of records."""

    def entry(self, index: int) -> Entry:
        """The row at an index from 0."""


def file_leaks(trained: Entries, evaluated: Entries, size: int | None = None) -> LeakReport:
    """Compares two corpora without opening a picture: by files, and by COCO's numbers in their names.

    Only files of one length are read, so that 100,000 pictures take seconds. Pictures inside of other files (parquet)
    are not compared.

    Args:
      trained, evaluated: the two.
      size: only the first so many records of the evaluation.
    """
    counts = len(trained), len(evaluated) if size is None else min(size, len(evaluated))
    rows = [[source.entry(i) for i in range(n)] for source, n in zip((trained, evaluated), counts, strict=True)]
    lengths = [{_length(each) for entry in entries for each in entry.pictures} for entries in rows]
    both = (lengths[0] & lengths[1]) - {None}
    digests: dict[str, bytes] = {}

    def prints(name: str, entries: list[Entry]) -> Prints:
        found = []
        for entry in entries:
            for each in entry.pictures:
                if _length(each) in both and each.name not in digests:
                    with contextlib.suppress(ValueError):  # what cannot be read is told of where its record is met
                        digests[each.name] = hashlib.blake2b(each.read(), digest_size=16).digest()
                found.append(Print(entry.id, digests.get(each.name), number=coco_number(each.name)))
        return Prints(name, tuple(entry.id for entry in entries), tuple(found))

    return find_leaks(prints(trained.name, rows[0]), prints(evaluated.name, rows[1]))


def _length(picture: Picture) -> int | None:
    """Of a picture's file; None where it has none of its own."""
    try:
        return picture.path.stat().st_size if isinstance(picture, FilePicture) else None
    except OSError:
        return None


def named_prints(name: str, pictures: Iterable[tuple[str, str]]) -> Prints:
    """Of an evaluation whose pictures are not at hand, such as POPE's or CHAIR's list of COCO file names.

    Args:
      name: of the evaluation.
      pictures: (id of the question, file name of its picture).
    """
    pairs = tuple(pictures)
    found = tuple(Print(record, number=coco_number(file)) for record, file in pairs)
    return Prints(name, tuple(record for record, _ in pairs), found)


@dataclass(frozen=True)
class Leak:
    """One picture of the training data that is in the evaluation.

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
      leaks: every pair of pictures found.
      pictures: number of the training data's pictures, and of those that are in the evaluation.
      unread: records of either that could not be read, and were not compared.
    """

    trained: str
    evaluated: str
    same_ids: tuple[str, ...]
    leaks: tuple[Leak, ...]
    pictures: tuple[int, int]
    unread: tuple[str, ...]

    def ids(self) -> tuple[str, ...]:
        """Records of the training data with a picture of the evaluation, to leave out."""
        return tuple(dict.fromkeys(leak.trained for leak in self.leaks))

    def text(self, most: int = 20) -> str:
        """The report, with at most so many ids of each kind."""
        total, leaked = self.pictures
        ids = self.ids()
        lines = [f"{leaked} pictures of {total} of {self.trained} are in {self.evaluated}{_some(ids, most)}"]
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


def find_leaks(trained: Prints, evaluated: Prints) -> LeakReport:
    """Compares two sources, every picture with every picture."""
    indices: dict[str, dict[object, list[Print]]] = {how: defaultdict(list) for how in ("file", "pixels", "number")}
    for each in evaluated.pictures:
        for how, index in indices.items():
            if (key := getattr(each, how)) is not None:
                index[key].append(each)
    looks = [each for each in evaluated.pictures if each.look is not None]
    hashes = np.array([each.look for each in looks], np.uint64)
    thumbs = np.array([each.thumb for each in looks], np.float32).reshape(len(looks), 3 * _THUMB**2)
    shapes = np.array([each.shape for each in looks])
    leaks: list[Leak] = []
    leaked = 0
    for each in trained.pictures:
        found: dict[str, Leak] = {}
        for how, index in indices.items():
            for other in index.get(getattr(each, how), ()):
                found.setdefault(other.record, Leak(each.record, other.record, how))
        if each.look is not None and looks:
            near = np.bitwise_count(hashes ^ np.uint64(each.look)) <= HASH_BITS
            near &= np.abs(shapes - each.shape) <= _SHAPE
            for at in np.flatnonzero(near):
                if (same := float(thumbs[at] @ each.thumb.astype(np.float32))) >= CORRELATION:
                    found.setdefault(looks[at].record, Leak(each.record, looks[at].record, "look", min(same, 1.0)))
        leaks += found.values()
        leaked += bool(found)
    both = set(evaluated.ids)
    return LeakReport(
        trained.name,
        evaluated.name,
        tuple(name for name in trained.ids if name in both),
        tuple(leaks),
        (len(trained.pictures), leaked),
        (*trained.unread, *evaluated.unread),
    )
