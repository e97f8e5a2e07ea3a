"""How a setting names questions: one source, or several with weights. Nothing is opened or imported here.

    scenes | brief_scenes | marked_scenes | easy_vqa              rendered questions, one source
    FILE.jsonl[#KEYS] | NAME:PATH[#KEYS]                          one source; KEYS: KEY=VALUE[&KEY=VALUE]
    length_scenes[#KEYS]    scenes with reasoning of a chosen length; KEYs: `length_options.LengthOptions.of`
    SOURCE*2,SOURCE*1                                             a mixture; the weight may be left out (1)

NAME is one of `readers.READERS`. KEYs leave records out by what their text tells: `max_options=N`, `images=1` (exactly
one), `kinds=A|B`. Where there are conversations (llava_cot, parquet, JSONL), `turns=first` takes the first turn alone.
Of parquet and JSONL, `columns=FIELD:COLUMN|FIELD:COLUMN` names the columns, see `data.datasets.columns`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from glob import glob, has_magic
from pathlib import Path

from qwenla_jax.data.datasets.columns import parse_columns
from qwenla_jax.data.datasets.readers import READERS
from qwenla_jax.data.synthetic.length_options import LENGTH_SCENES, LengthOptions

BUILT_IN_SOURCES = ("scenes", "brief_scenes", "marked_scenes", "easy_vqa", LENGTH_SCENES)
KEYS = ("max_options", "images", "kinds", "turns", "columns")
ROWS = ("parquet", "jsonl")  # readers of rows with columns of any names
_WEIGHT = re.compile(r"\*(\d+(?:\.\d*)?|\.\d+)$")


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a setting.

    Attributes:
      name: short, and different from the other parts' names.
      text: as it was written, without its weight.
      reader: a name of `READERS`, "jsonl", or one of `BUILT_IN_SOURCES`.
      path: of a dataset or file; empty for the built-in ones.
      keys: what follows the `#`.
      weight: its share of a mixture, relative to the others'.
    """

    name: str
    text: str
    reader: str
    path: str
    keys: Mapping[str, str]
    weight: Fraction

    @property
    def columns(self) -> dict[str, str]:
        """The column of each field that the key `columns` names."""
        return parse_columns(self.keys.get("columns", ""))


def parse(spec: str) -> tuple[Part, ...]:
    """The sources that a setting names, at least one.

    Raises:
      ValueError: a part that has none of the forms above; the message names it.
    """
    if spec in BUILT_IN_SOURCES or (spec.endswith(".jsonl") and os.path.isfile(spec)):
        return (_part(spec, Fraction(1)),)
    parts: list[Part] = []
    for text in spec.split(","):
        match = _WEIGHT.search(text)
        weight = Fraction(match[1]) if match else Fraction(1)
        if not weight:
            raise ValueError(f"{text!r}: the weight is 0; expected more, or leave the source out")
        part = _part(text[: match.start()] if match else text, weight)
        same = sum(part.name == other.name.partition(".")[0] for other in parts)
        parts.append(dataclasses.replace(part, name=f"{part.name}.{same + 1}") if same else part)
    return tuple(parts)


def _part(text: str, weight: Fraction) -> Part:
    if text in BUILT_IN_SOURCES:
        return Part(text, text, text, "", {}, weight)
    if text.startswith(f"{LENGTH_SCENES}#"):
        pairs = [pair.partition("=") for pair in text.partition("#")[2].split("&")]
        keys = {key: value for key, _, value in pairs}
        try:
            LengthOptions.of(keys)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
        return Part(LENGTH_SCENES, text, LENGTH_SCENES, "", keys, weight)
    reader, colon, rest = text.partition(":")
    name = reader
    if reader not in READERS or not colon:
        reader, rest = "jsonl", text
        file = text if text.endswith(".jsonl") else text.partition("#")[0]
        name = Path(file).stem.replace(".", "_")
        if not file.endswith(".jsonl"):
            raise ValueError(
                f"{text!r}: expected scenes, easy_vqa, an existing .jsonl file, or NAME:PATH with a NAME of "
                f"{', '.join(READERS)}"
            )
    path, mark, tail = (rest, "", "") if rest.endswith(".jsonl") else rest.partition("#")
    keys: dict[str, str] = {}
    for pair in tail.split("&") if mark else ():
        key, equals, value = pair.partition("=")
        if key not in KEYS or not equals or not value:
            raise ValueError(f"{text!r}: {pair!r} is no KEY=VALUE with a KEY of {', '.join(KEYS)}")
        keys[key] = value
    if not path:
        raise ValueError(f"{text!r}: expected a path after {reader}:")
    if not re.fullmatch(r"\d+", keys.get("max_options", "1")):
        raise ValueError(f"{text!r}: max_options={keys['max_options']}, expected a whole number")
    if keys.get("images", "1") != "1":
        raise ValueError(f"{text!r}: images={keys['images']}, expected 1")
    if "turns" in keys and (keys["turns"] != "first" or reader not in ("llava_cot", *ROWS)):
        raise ValueError(f"{text!r}: turns={keys['turns']}, expected turns=first, of llava_cot, parquet or JSONL")
    if "columns" in keys and reader not in ROWS:
        raise ValueError(f"{text!r}: the columns of {reader} are known; expected columns=... of parquet or JSONL")
    try:
        parse_columns(keys.get("columns", ""))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    return Part(name, text, reader, str(Path(path).expanduser()), keys, weight)


def problems(spec: str) -> Iterator[str]:
    """Problems of a setting: its form, and files that do not exist. No file is opened."""
    try:
        parts = parse(spec)
    except ValueError as error:
        yield str(error)
        return
    for part in parts:
        path = Path(part.path)
        if part.reader in BUILT_IN_SOURCES:
            continue
        if part.reader == "jsonl" and not os.path.isfile(path):
            yield f"there is no file {part.text!r}; expected scenes, easy_vqa, an existing .jsonl file or NAME:PATH"
        elif not os.path.exists(path) and not (has_magic(part.path) and glob(part.path)):
            yield f"{part.text!r}: there is no file or folder {part.path!r}"
