"""Splits and filters: which records of a dataset are trained on, and which are held out.

A dataset with its own splits keeps them: parquet files called `train` and one of `validation`, `val` and `test` (the
first of these is held out, since it selects checkpoints), or for Geometry3K, and where `datasets` saved several splits,
folders of these names. Of all others, JSONL files among them, every tenth record is held out, by a hash of its id.
Related records are in one split: the steps
of a problem of We-Math, which share its image, and the turns of a conversation of LLaVA-CoT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwenla_jax.data.datasets.raw_record import Dataset, RawRecord
from qwenla_jax.data.record import Record, Split, stable_hash

HELD_OUT = ("validation", "val", "test")


def own_split(reader: str, path: Path, split: Split) -> Path | None:
    """The path of a folder's own split; None where it has none."""
    if not path.is_dir():
        return None
    splits: dict[str, Path] = {}
    for name in ("train", *HELD_OUT):
        own = {"geometry3k": "", "parquet": "state.json"}.get(reader)
        places = [path / name] if own is not None and (path / name / own).exists() else []
        for folder in (path, path / "data"):
            places += [folder / f"{name}.parquet"] if (folder / f"{name}.parquet").is_file() else []
            places += [folder / f"{name}-*.parquet"] if any(folder.glob(f"{name}-*.parquet")) else []
        splits |= {name: places[0]} if places else {}
    held = next((name for name in HELD_OUT if name in splits), None)
    if "train" not in splits or held is None:
        return None
    return splits[held if split == "held_out" else "train"]


def family(reader: str, name: str) -> str:
    """The part of an id that decides on the split, which related records share."""
    if reader == "we_math":
        return name.rpartition("/")[0] or name
    return name.partition("#")[0] if reader == "llava_cot" else name


def left_out(raw_record: RawRecord, filters: Mapping[str, str]) -> str | None:
    """Why a source's filters leave out a record; None where they keep it.

    Args:
      raw_record: the record; one that could not be read is kept, to be reported or counted as invalid.
      filters: the keys of `spec.KEYS` with their values.
    """
    if raw_record.fault is not None:
        return None
    if "images" in filters and len(raw_record.images) != 1:
        return "several_images" if raw_record.images else "no_image"
    if "max_options" in filters and len(raw_record.options) > int(filters["max_options"]):
        return "many_options"
    return "other_kind" if "kinds" in filters and raw_record.kind not in filters["kinds"].split("|") else None


class SelectedRecords:
    """The records of one split of a dataset that are valid by their text; which ones depends on the data alone.

    Args:
      dataset: the dataset.
      reader: its reader's name, see `family`.
      split: which part; for "cold_start" every record needs a response.
      whole: all records, whatever the split.
      filters: see `left_out`.
      size: only the first so many.

    Attributes:
      name: of the dataset.
      total: records of the dataset, before anything was left out.
      faults: where, reason and message of every invalid record, of all splits.
      left_out: number of records that the filters left out, by reason; `refused`: that the reader did.

    Raises:
      ValueError: the filters leave nothing, or responses are needed and there is none at all.
    """

    def __init__(
        self,
        dataset: Dataset,
        reader: str,
        split: Split,
        whole: bool = False,
        filters: Mapping[str, str] | None = None,
        size: int | None = None,
    ) -> None:
        self._dataset, self.name, self.total = dataset, dataset.name, len(dataset)
        self.left_out, self.refused = Counter[str](), Counter(dataset.refused)
        faults: list[tuple[str, str, str]] = []
        indices = []
        answered = split != "cold_start"
        for index in range(len(dataset)):
            raw_record = dataset.raw_record(index)
            if (why := left_out(raw_record, filters or {})) is not None:
                self.left_out[why] += 1
                continue
            problems = raw_record.faults()
            answered = answered or raw_record.response is not None
            if not problems and split == "cold_start" and raw_record.response is None:
                problems = [("no_response", "response is missing; supervised training needs one")]
            faults += [(raw_record.where, reason, message) for reason, message in problems[:1]]
            if problems:
                continue
            if whole or (stable_hash(family(reader, raw_record.id)) % 10 == 0) == (split == "held_out"):
                indices.append(index)
        if self.left_out.total() == len(dataset):
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items()))
            raise ValueError(f"{dataset.name}: the filters leave nothing of its {len(dataset)} records ({counts})")
        self.faults = tuple(faults)
        if not answered and reader != "jsonl":
            raise ValueError(f"{dataset.name}: its records have no responses, and supervised training needs them")
        self._indices = tuple(indices[:size])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        """The record; raises as `Dataset` where an image cannot be opened."""
        return self._dataset[self._indices[index]]

    def raw_record(self, index: int) -> RawRecord:
        """The raw record, without opening its images."""
        return self._dataset.raw_record(self._indices[index])


def unusable(parts: Iterable[SelectedRecords], most: int) -> None:
    """Raises where more records than `most` are invalid by their text.

    Raises:
      ValueError: names the first twenty, with their places and what is expected.
    """
    faults = [fault for part in parts for fault in part.faults]
    if len(faults) <= most:
        return
    counts = ", ".join(f"{reason} {n}" for reason, n in sorted(Counter(f[1] for f in faults).items()))
    line = [f"{where}: {message}" for where, _, message in faults[:20]]
    line += [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
    raise ValueError(
        f"{len(faults)} records cannot be used ({counts}), at most {most} may be (config.data.max_invalid; "
        "train.py --check_data tells of all):\n" + "\n".join(line),
    )
