"""Opens the sources that a setting names, see `data.sources.spec`."""

from __future__ import annotations

from pathlib import Path

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.datasets.jsonl import jsonl
from qwenla_jax.data.datasets.llava_cot import llava_cot
from qwenla_jax.data.datasets.parquet import parquet_questions
from qwenla_jax.data.datasets.raw_record import FileImage, RecordError
from qwenla_jax.data.datasets.readers import READERS
from qwenla_jax.data.images.decode import ImageError
from qwenla_jax.data.record import Split
from qwenla_jax.data.sources.mixture import Mixture, Picked
from qwenla_jax.data.sources.skip_invalid import TooManyInvalid
from qwenla_jax.data.sources.spec import ROWS, Part, parse
from qwenla_jax.data.sources.splits import SelectedRecords, own_split, unusable
from qwenla_jax.data.synthetic.easy_vqa import EasyVqaSource
from qwenla_jax.data.synthetic.length_options import LENGTH_SCENES, LengthOptions
from qwenla_jax.data.synthetic.source import SCENE_SOURCES, LengthSceneSource, SceneSource, scene_source

Source = SelectedRecords | SceneSource | EasyVqaSource


def make_source(
    name: str,
    split: Split,
    *,
    seed: int,
    size: int | None = None,
    reflection_share: float = 0.5,
    correction_share: float = 0.3,
    style: str = "structured",
    whole: bool = False,
    max_invalid: int = 0,
    once: bool = False,
) -> RecordSource:
    """The source that a setting names.

    A mixture shuffles each of its sources and repeats those that are smaller than their share. The held-out split, and
    a mixture with `once`, has every record exactly once, in the mixture's proportions as long as its sources last. Ids
    of a mixture's records have their source's name before them.

    Args:
      name: see `data.sources.spec`.
      split: which part of it, see `data.sources.splits`.
      seed: of drawn scenes, and of the order of easy-VQA and of mixtures.
      size: most records; None for all.
      reflection_share, correction_share, style: see `scene_questions.ask`; the style is that of scenes alone.
      whole: all records whatever the split, because the other split comes from another source; a dataset's own splits
        still apply.
      max_invalid: most records that may be invalid by their text; they are left out.
      once: no record comes twice.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an invalid name, more invalid records than `max_invalid`, or no record left.
      ModuleNotFoundError: a package is missing.
    """
    parts = parse(name)
    shares = dict(reflection_share=reflection_share, correction_share=correction_share)
    alone = len(parts) == 1
    opened: dict[str, Source] = {}
    for part in parts:
        opened[part.name] = open_part(
            part, split, size=size if alone else None, whole=whole, seed=seed, style=style, **shares
        )
    unusable([source for source in opened.values() if isinstance(source, SelectedRecords)], max_invalid)
    for part in parts:
        if not len(opened[part.name]):
            raise ValueError(f"{part.text}: holds no record for the split {split}")
    if alone:
        return opened[parts[0].name]
    mixture = Mixture(opened, {part.name: part.weight for part in parts}, seed=seed)
    if split == "held_out" or once:
        return Picked(mixture, mixture.firsts()[:size])
    return mixture if size is None else Picked(mixture, range(min(size, len(mixture))))


def open_part(
    part: Part,
    split: Split,
    *,
    seed: int,
    size: int | None = None,
    reflection_share: float = 0.5,
    correction_share: float = 0.3,
    style: str = "structured",
    whole: bool = False,
) -> Source:
    """One source of a setting; arguments and errors as in `make_source`. Invalid records are left out, and listed."""
    if part.reader in SCENE_SOURCES:
        return scene_source(part.reader, seed, split, size, reflection_share, correction_share, style)
    if part.reader == LENGTH_SCENES:
        return LengthSceneSource(seed, split, size, LengthOptions.of(part.keys), style)
    if part.reader == "easy_vqa":
        return EasyVqaSource(split, size, seed, reflection_share)
    split_path = own_split(part.reader, Path(part.path), split)
    path, first = split_path or Path(part.path), "turns" in part.keys
    if part.reader in ROWS:
        dataset = (jsonl if part.reader == "jsonl" else parquet_questions)(path, part.columns, first)
    else:
        dataset = llava_cot(path, later_turns=False) if first else READERS[part.reader](path)
    return SelectedRecords(dataset, part.reader, split, whole or split_path is not None, part.keys, size)


def sources_of(source: RecordSource) -> dict[str, RecordSource]:
    """The sources of a mixture of `make_source`, by name; a source that is no mixture under ""."""
    inner = source.source if isinstance(source, Picked) else source
    return dict(inner.sources) if isinstance(inner, Mixture) else {"": inner}


def readable(source: RecordSource, most: int) -> RecordSource:
    """A source without the records whose images cannot be opened; opens all of them, in order.

    For callers that index a source and must not see a record twice; training uses `SkipInvalid` instead.

    Raises:
      TooManyInvalid: there are more than `most`, those that are invalid by their text included.
    """
    texts = sum(len(part.faults) for part in sources_of(source).values() if isinstance(part, SelectedRecords))
    valid, invalid = [], []
    for index in range(len(source)):
        try:
            source[index]
            valid.append(index)
        except (ImageError, RecordError) as error:
            invalid.append(str(error))
            if len(invalid) + texts > most:
                message = "\n".join(invalid[:5])
                message = f"more than {most} records cannot be used (config.data.max_invalid):\n{message}"
                raise TooManyInvalid(message) from error
    return source if not invalid else Picked(source, valid)


def image_files(source: RecordSource) -> dict[str, Path]:
    """The file of each record that has one image in a file of its own, by the record's id."""
    files: dict[str, Path] = {}
    for name, part in sources_of(source).items():
        if isinstance(part, SelectedRecords):
            for index in range(len(part)):
                raw_record = part.raw_record(index)
                if len(raw_record.images) == 1 and isinstance(raw_record.images[0], FileImage):
                    files[f"{name}/{raw_record.id}" if name else raw_record.id] = raw_record.images[0].path
    return files
