"""What the pipeline's folders hold, read and checked: one folder a seed, as plain data for tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenla_jax.inference.attention_mass import PARTS
from qwenla_jax.utils import json_files

SAVED = 3  # number of what an evaluation saves; a folder with another number was made by another version
FINISHED = "table.json"  # what a run of the pipeline writes last
BASE, COLD, ZERO = "base", "cold start", "Qwen-Zero"
TEXT, COPY, ROUTE, VISION = "text-only", "copy", "route", "vision-only"
ROUTE_25, ROUTE_75 = "route 25", "route 75"
COPY_BLANK, COPY_OTHER = "copy of a blank image", "copy of another image"
RAW_COPY, RAW_ROUTE = "no BRPO + COPY", "no BRPO + ROUTE"
# In the order of the tables; others stand behind them by name.
SYSTEMS = (BASE, COLD, ZERO, TEXT, COPY, ROUTE, ROUTE_25, ROUTE_75, VISION, COPY_BLANK, COPY_OTHER, RAW_COPY, RAW_ROUTE)
NUMBERS = ("right", "well_formed", "tokens", "inserted_tokens", "reflections", "reflection_tokens")
NUMBERS += ("named", "invented", "missed", "details", "wrong_details")
TEXTS = ("id", "question", "answer", "response", "kind")


class StudyError(ValueError):
    """A part of a study is missing or is not what it should be; the message names it."""


@dataclasses.dataclass(frozen=True)
class AttentionSums:
    """Sums of attention over the tokens of each profiled question; see `attention_profile.attention_sums`.

    Attributes:
      edges: int [K + 1], bounds of the bins of response positions, in tokens.
      positions: name -> float [Q, K] for "tokens", "original", "inserted", "even".
      parts: name -> float [Q, 3], the columns as `inference.attention_mass.PARTS`.
    """

    edges: np.ndarray
    positions: Mapping[str, np.ndarray]
    parts: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One system in one seed.

    Attributes:
      texts: a mapping with TEXTS for each question.
      numbers: name -> float [Q] for each of NUMBERS.
      objects: for each question (token, right) of the objects that its answer names.
      attention: on visual tokens.
      heat: attention on the image at key words, see `attention_maps.heat_maps`.
      batch_rows: answers sampled together where time was taken.
      batch_s: float, seconds of each full batch.
      source, scenes_seed: of the questions' scenes.
      mode: how it looks again.
      keep_ratio: route's m, 0 to 1.
    """

    texts: tuple[Mapping[str, str], ...]
    numbers: Mapping[str, np.ndarray]
    objects: tuple[tuple[tuple[int, bool], ...], ...]
    attention: AttentionSums
    heat: tuple[Mapping[str, Any], ...]
    batch_rows: int
    batch_s: np.ndarray
    source: str
    scenes_seed: int
    mode: str
    keep_ratio: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """Reinforcement learning over its steps.

    Attributes:
      steps: int [N]; count, tokens, accuracy: float [N], reflections a sampled response, tokens in them, share of
        right ones.
      eval_steps, eval_right, eval_size: int [K], greedy answers to held-out questions on the way.
    """

    steps: np.ndarray
    count: np.ndarray
    tokens: np.ndarray
    accuracy: np.ndarray
    eval_steps: np.ndarray
    eval_right: np.ndarray
    eval_size: np.ndarray


@dataclasses.dataclass(frozen=True)
class Seed:
    """One run of the pipeline: its folder, its evaluated systems by name, and its BRPO (None without `brpo/`)."""

    path: Path
    systems: Mapping[str, Measured]
    curve: Curve | None


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs of the pipeline that differ in their seed.

    Attributes:
      seeds: at least one, all with the same systems and as many questions.
      left_out: what was not taken, in words.
    """

    seeds: tuple[Seed, ...]
    left_out: tuple[str, ...] = ()

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of the evaluated systems in the order of the tables."""
        there = self.seeds[0].systems
        return (*(name for name in SYSTEMS if name in there), *sorted(set(there) - set(SYSTEMS)))

    @property
    def questions(self) -> int:
        """Questions that each seed's systems answered."""
        return len(self.seeds[0].systems[self.systems[0]].texts)

    def require(self, *names: str) -> None:
        """Raises StudyError where a system was not evaluated."""
        missing = [name for name in names if name not in self.systems]
        if missing:
            raise StudyError(f"no evaluation of {', '.join(missing)} in {self.seeds[0].path / 'evaluate'}")

    def of(self, name: str) -> list[Measured]:
        """One system in all seeds. Raises StudyError where it was not evaluated."""
        self.require(name)
        return [seed.systems[name] for seed in self.seeds]


def collect(workdirs: Sequence[Path], left_out: Sequence[str] = ()) -> Study:
    """Reads the folders of a study.

    Args:
      workdirs: one a seed, as `pipeline.run_pipeline` leaves them.
      left_out: what else there is and is not taken, in words for the reader.

    Raises:
      StudyError: a folder, file, key or value is missing or wrong; it is named.
    """
    if not workdirs:
        raise StudyError("there is no folder to report on; expected at least one that launch/pipeline.py has filled")
    if len({path.resolve() for path in workdirs}) < len(workdirs):
        raise StudyError(f"a folder stands twice in {', '.join(map(str, workdirs))}; its questions would count twice")
    seeds = tuple(_seed(path) for path in workdirs)
    first = seeds[0]
    for other in seeds[1:]:
        lacking = sorted(set(first.systems) ^ set(other.systems))
        if lacking:
            poorer = other if lacking[0] in first.systems else first
            raise StudyError(f"{poorer.path}: no evaluation of {lacking[0]}, which another seed has")
        name = next(iter(first.systems))
        got, wanted = (len(seed.systems[name].texts) for seed in (other, first))
        if got != wanted:
            raise StudyError(
                f"{other.path}: {got} questions, but {wanted} in {first.path}; pooled they must be as many"
            )
    return Study(seeds, tuple(left_out))


def runs_in(workdir: Path) -> tuple[list[Path], list[str]]:
    """The runs that a folder holds: itself, or its folders `seed_*`, of which those that are not finished are left out.

    Returns:
      folders in the order of their numbers; and what is left out, in words.

    Raises:
      StudyError: no such folder, or no run in it is finished.
    """
    if not workdir.is_dir():
        raise StudyError(f"{workdir}: no such folder; expected one that launch/pipeline.py has filled")
    seeds = [path for path in workdir.glob("seed_*") if path.is_dir() and path.name[5:].isdigit()]
    if not seeds:
        return [workdir], []
    seeds.sort(key=lambda path: int(path.name[5:]))
    done = [path for path in seeds if (path / FINISHED).is_file()]
    if not done:
        raise StudyError(f"{workdir}: none of {', '.join(p.name for p in seeds)} has {FINISHED}; none is finished")
    return done, [f"{path.name} is not finished (it has no {FINISHED})" for path in seeds if path not in done]


def _seed(path: Path) -> Seed:
    folder = path / "evaluate"
    result = sorted(folder.glob("*/scores.json"))
    if not result:
        raise StudyError(f"{folder}: holds no scores.json; expected a folder for every system that was evaluated")
    systems: dict[str, Measured] = {}
    asked: list[str] = []
    for file in result:
        name, measured = _measured(file.parent)
        ids = [text["id"] for text in measured.texts]
        if asked and ids != asked:
            raise StudyError(
                f"{file.parent / 'answers.jsonl'}: other questions than {result[0].parent}; not comparable"
            )
        asked = ids
        systems[name] = measured
    return Seed(path, systems, _curve(path / "brpo" / "metrics.jsonl"))


def _measured(folder: Path) -> tuple[str, Measured]:
    path = folder / "scores.json"
    saved = _json(path)
    if not isinstance(saved, dict) or saved.get("of", {}).get("saved") != SAVED:
        raise StudyError(
            f"{path}: `of.saved` is not {SAVED}, so it was made by another version; delete {folder} and run "
            "launch/pipeline.py again, which evaluates anew"
        )
    try:
        look_again = saved["of"]["options"]["reattention"]
        name, timing = saved["name"], saved["scores"]["timing"]
        texts, numbers, objects = _answers(folder / "answers.jsonl")
        return name, Measured(
            texts=texts,
            numbers=numbers,
            objects=objects,
            attention=_attention_sums(folder / "attention.json"),
            heat=tuple(_json(folder / "heat.json")),
            batch_rows=int(timing["rows"]),
            batch_s=np.array(timing["batch_s"], float),
            source=str(saved["of"]["source"]),
            scenes_seed=int(saved["scenes_seed"]),
            mode=look_again["mode"],
            keep_ratio=float(look_again["keep_ratio"]),
        )
    except KeyError as error:
        raise StudyError(f"{path}: no {error}") from error


def _answers(path: Path) -> tuple[tuple[dict[str, str], ...], dict[str, np.ndarray], tuple[Any, ...]]:
    texts, numbers, objects = [], [], []
    for number, row in enumerate(_lines(path), 1):
        missing = [name for name in (*TEXTS, *NUMBERS, "objects") if name not in row]
        if missing:
            raise StudyError(f"{path}:{number}: no {', '.join(missing)}")
        wrong = [name for name in NUMBERS if not isinstance(row[name], int | float)]
        if wrong:
            raise StudyError(f"{path}:{number}: {wrong[0]} is {row[wrong[0]]!r}, expected a number")
        texts.append({name: str(row[name]) for name in TEXTS})
        numbers.append([float(row[name]) for name in NUMBERS])
        objects.append(tuple((int(token), bool(right)) for token, right in row["objects"]))
        if len(objects[-1]) != row["named"] or sum(not right for _, right in objects[-1]) != row["invented"]:
            raise StudyError(f"{path}:{number}: `objects` and the counts of `named` and `invented` do not fit together")
    if not texts:
        raise StudyError(f"{path}: holds no answers")
    return tuple(texts), dict(zip(NUMBERS, np.array(numbers).T, strict=True)), tuple(objects)


def _attention_sums(path: Path) -> AttentionSums:
    saved = _json(path)
    names = ("tokens", "original", "inserted", "even")
    try:
        edges = np.array(saved["edges"], int)
        positions = {name: np.array(saved["positions"][name], float) for name in names}
        parts = {name: np.array(saved["parts"][name], float) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path}: expected edges, positions and parts with {', '.join(names)}: {error}") from error
    rows = len(saved.get("ids", ()))
    for what, arrays, columns in (("positions", positions, len(edges) - 1), ("parts", parts, len(PARTS))):
        for name, values in arrays.items():
            if values.shape != (rows, columns):
                raise StudyError(f"{path}: {what}.{name} has shape {values.shape}, expected {(rows, columns)}")
    return AttentionSums(edges, positions, parts)


def _curve(path: Path) -> Curve | None:
    if not path.is_file():
        return None
    rows = list(_lines(path))
    train = [row for row in rows if "train/reflection/count_mean" in row]
    held = [row for row in rows if "eval/accuracy" in row]
    if not train:
        raise StudyError(f"{path}: no line has train/reflection/count_mean")
    column = lambda name: np.array([np.nan if r.get(name) is None else r[name] for r in train], float)  # noqa: E731
    try:
        size = np.array([row["eval/size"] for row in held], float)
    except KeyError as error:
        raise StudyError(f"{path}: a line with eval/accuracy has no {error}") from error
    return Curve(
        steps=np.array([row["step"] for row in train], int),
        count=column("train/reflection/count_mean"),
        tokens=column("train/reflection/tokens_mean"),
        accuracy=column("train/rewards/accuracy/mean"),
        eval_steps=np.array([row["step"] for row in held], int),
        eval_right=np.rint(np.array([row["eval/accuracy"] for row in held], float) * size).astype(int),
        eval_size=size.astype(int),
    )


def _json(path: Path) -> Any:
    try:
        return json_files.read_json(path)
    except FileNotFoundError as error:
        raise StudyError(f"{path}: no such file; expected what an evaluation saves") from error
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: not readable as JSON: {str(error).removeprefix(f'{path}: ')}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = json_files.read_bytes(path)
    except (OSError, ValueError) as error:
        message = str(getattr(error, "strerror", None) or error).removeprefix(f"{path}: ")
        raise StudyError(f"{path}: not readable: {message}; expected what the pipeline saves") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json_files.loads(line, f"{path}:{number}")
        except ValueError as error:
            raise StudyError(str(error)) from error
        if not isinstance(row, dict):
            raise StudyError(f"{path}:{number}: got {type(row).__name__}, expected an object")
        rows.append(row)
    return rows
