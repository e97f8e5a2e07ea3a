"""Which records of a corpus are trained on, and which are held out.

A corpus that comes in splits of its own keeps them: parquet files called `train` and one of `validation`, `val` and
`test` (the first of these is held out, for it chooses among checkpoints), or of Geometry3K folders called so.
Of all others every tenth record is held out, by a hash of its id, as of JSONL files. Records that belong together are
on one side: the steps of a problem of We-Math, which share its picture, and the turns of a conversation of LLaVA-CoT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qwenla_jax.data.datasets.raw_record import Corpus, Entry
from qwenla_jax.data.record import Record, Split, stable_hash
from qwenla_jax.data.sources.filters import Filter, Filtered

HELD_OUT = ("validation", "val", "test")


def own_split(reader: str, path: Path, split: Split) -> Path | None:
    """Where a folder's own split lies; None where it has none."""
    if not path.is_dir():
        return None
    found: dict[str, Path] = {}
    for name in ("train", *HELD_OUT):
        places = [path / name] if reader == "geometry3k" and (path / name).is_dir() else []
        for folder in (path, path / "data"):
            places += [folder / f"{name}.parquet"] if (folder / f"{name}.parquet").is_file() else []
            places += [folder / f"{name}-*.parquet"] if any(folder.glob(f"{name}-*.parquet")) else []
        found |= {name: places[0]} if places else {}
    held = next((name for name in HELD_OUT if name in found), None)
    if "train" not in found or held is None:
        return None
    return found[held if split == "held_out" else "train"]


def family(reader: str, name: str) -> str:
    """What records that belong together share: the part of their ids that decides on the split."""
    if reader == "we_math":
        return name.rpartition("/")[0] or name
    return name.partition("#")[0] if reader == "llava_cot" else name


class Chosen:
    """The records of one split of a corpus that its text does not rule out; which ones depends on the data alone.

    Args:
      corpus: the corpus.
      reader: its reader's name, see `family`.
      split: which part; for "cold_start" every record needs a response.
      whole: all records, whatever the split.
      filters: what else is left out.
      size: only the first so many.

    Attributes:
      name: of the corpus.
      total: records of the corpus, before anything was left out.
      faults: where, reason and message of every record that cannot be used, of all splits.
      left_out: what the filters left out, by reason; and `refused`, what the reader did.

    Raises:
      ValueError: the filters leave nothing, or responses are needed and there is none at all.
    """

    def __init__(
        self,
        corpus: Corpus,
        reader: str,
        split: Split,
        whole: bool = False,
        filters: Iterable[Filter] = (),
        size: int | None = None,
    ) -> None:
        filtered = Filtered(corpus, filters)
        self._source = filtered
        self.name, self.total = corpus.name, len(corpus)
        self.left_out, self.refused = filtered.left_out, Counter(corpus.refused)
        faults: list[tuple[str, str, str]] = []
        kept = []
        answered = split != "cold_start"
        for index in range(len(filtered)):
            entry = filtered.entry(index)
            found = entry.faults()
            answered = answered or entry.response is not None
            if not found and split == "cold_start" and entry.response is None:
                found = [("no_response", "response is missing; supervised training needs one")]
            faults += [(entry.where, reason, message) for reason, message in found[:1]]
            if found:
                continue
            if whole or (stable_hash(family(reader, entry.id)) % 10 == 0) == (split == "held_out"):
                kept.append(index)
        self.faults = tuple(faults)
        if not answered and reader != "jsonl":
            raise ValueError(f"{corpus.name}: its records have no responses, and supervised training needs them")
        self._kept = tuple(kept[:size])

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        """The record; raises what `Corpus` raises where a picture cannot be opened."""
        return self._source[self._kept[index]]

    def entry(self, index: int) -> Entry:
        """The row, without opening its pictures."""
        return self._source.entry(self._kept[index])


def unusable(parts: Iterable[Chosen], most: int) -> None:
    """Refuses corpora of which more records than `most` cannot be used, as far as their text tells.

    Raises:
      ValueError: names the first twenty, with where they stand and what would be right.
    """
    faults = [fault for part in parts for fault in part.faults]
    if len(faults) <= most:
        return
    counts = ", ".join(f"{reason} {n}" for reason, n in sorted(Counter(f[1] for f in faults).items()))
    told = [f"{where}: {message}" for where, _, message in faults[:20]]
    told += [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
    raise ValueError(
        f"{len(faults)} records cannot be used ({counts}), at most {most} may be (config.data.max_broken; "
        "train.py --check_data tells of all):\n" + "\n".join(told),
    )
