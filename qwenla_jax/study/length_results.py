"""Results of the length study: one small JSON file for each arm, and what has to be true of them.

A file holds sums over blocks of scenes, and for each scene whether its answer is right. From these files alone the
report is made again; the models are not needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_arms import ARMS, CONDITIONS, FRESH_SEED, Arm
from qwenla_jax.study.statistics import Ratio
from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import write_text

VERSION = 2  # of what a file holds
BLOCK = 20  # scenes of a block
BY_SCENE = ("right", "worked", "kind")  # one digit a scene
CONTINUED, FREE, FORCED = "continued", "free", "forced"
TOP = ("version", "base", "base_stamp", "seed", "condition", "arm", "used", "model", "images", "questions", "cells")


@dataclasses.dataclass(frozen=True)
class Result:
    """One arm of one base model, seed and condition, as its file has it.

    Attributes:
      path: of the file.
      base, base_stamp: the base model's name, and a stamp that differs for each training of it.
      seed, condition, arm: which.
      used: what it was measured with: `reattention`, `squeezed`, `words`, `order`, `scenes_seed`.
      model: what its model was trained with, from the model's own folder: `reattention`, `words`, `order`, `tokens`,
        `seed`, `steps`.
      images: `tested` and `trained`, their numbers, and `shared`, those in both.
      questions: digest of ids, questions and answers.
      cells: (working, N) -> way of measuring -> measure -> float [scenes] or [blocks].
      seconds: wall time of training and measuring.
      answers: cell -> way of measuring -> the first answers, to read.
    """

    path: Path
    base: str
    base_stamp: str
    seed: int
    condition: str
    arm: str
    used: Mapping[str, Any]
    model: Mapping[str, Any]
    images: Mapping[str, int]
    questions: str
    cells: Mapping[tuple[str, int], Mapping[str, Mapping[str, np.ndarray]]]
    seconds: Mapping[str, float]
    answers: Mapping[str, Mapping[str, Sequence[str]]]

    def ratio(self, working: str, tokens: int, way: str, over: str, under: str | None = None) -> Ratio:
        """A measure a scene, or over another measure, or over "objects": all that the scene has.

        Raises:
          StudyError: it was not measured.
        """
        try:
            cell = self.cells[working, tokens][way]
            top = cell[over]
            if under == "objects":
                bottom = cell["named"] - cell["invented"] + cell["missed"]
            else:
                bottom = np.full(len(top), 1.0 if over in BY_SCENE else BLOCK) if under is None else cell[under]
        except KeyError as error:
            raise StudyError(f"{self.path}: no {way} {over} at {tokens} tokens of {working} ({error})") from error
        return Ratio(top, bottom)


def encode(numbers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Measures by scene as JSON values: a digit a scene, or sums over blocks. Whole blocks alone are kept."""
    result: dict[str, Any] = {}
    for name, values in numbers.items():
        whole = values[: len(values) // BLOCK * BLOCK]
        if name in BY_SCENE:
            result[name] = "".join(str(int(value)) for value in whole)
        else:
            result[name] = np.round(whole.reshape(-1, BLOCK).sum(1), 4).tolist()
    return result


def write_result(path: Path, content: Mapping[str, Any], version: int = VERSION) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"version": version, **content}, separators=(",", ":")) + "\n")


def read_content(path: Path, keys: Sequence[str], what: str, version: int = VERSION) -> dict[str, Any]:
    """What `write_result` has written.

    Args:
      path: of the file.
      keys: what it has to have.
      what: whose result it should be, for messages.
      version: of what it holds.

    Raises:
      StudyError: it cannot be read, lacks a key or is of another version; the message names file and key.
    """
    try:
        saved = json_files.read_object(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: not readable as JSON: {str(error).removeprefix(f'{path}: ')}") from error
    if lacking := [key for key in keys if key not in saved]:
        raise StudyError(f"{path}: no {', '.join(lacking)}; expected a result of {what}")
    if saved["version"] != version:
        raise StudyError(f"{path}: version {saved['version']}, expected {version}; delete it, and it is made anew")
    return saved


def read_result(path: Path) -> Result:
    """Reads a file.

    Raises:
      StudyError: it cannot be read or lacks something; the message names file and key.
    """
    saved = read_content(path, TOP, "the length study")
    cells = {}
    try:
        for name, ways in saved["cells"].items():
            working, _, tokens = name.partition("/")
            cells[working, int(tokens)] = {
                way: {measure: _decoded(values) for measure, values in measures.items()}
                for way, measures in ways.items()
            }
    except (AttributeError, TypeError, ValueError) as error:
        raise StudyError(f"{path}: cells: {error}; expected WORKING/TOKENS, and measures of numbers") from error
    names = [field.name for field in dataclasses.fields(Result) if field.name not in ("path", "cells")]
    rest = {name: saved.get(name, {}) for name in names}
    return Result(path=path, cells=cells, **rest)


def _decoded(values: str | Sequence[float]) -> np.ndarray:
    return np.array([int(digit) for digit in values] if isinstance(values, str) else values, float)


def read_results(folder: Path) -> list[Result]:
    """All results of a folder, checked.

    Raises:
      StudyError: there is none, one cannot be read, or one is not what it should be.
    """
    paths = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    if not paths:
        raise StudyError(f"{folder}: holds no results; expected files that qwenla study --protocol=length has written")
    results = [read_result(path) for path in paths]
    if invalid := list(problems(results)):
        raise StudyError("\n".join(invalid))
    return results


def problems(results: Sequence[Result]) -> Iterable[str]:
    """What is wrong with results: the analysis's own checks, one line each.

    A label that is another arm's, a missing insertion, test scenes that were trained on, and arms that did not
    answer the same questions or do not share a base model.
    """
    for result in results:
        if result.arm not in ARMS:
            yield f"{result.path}: arm {result.arm!r}; expected one of {', '.join(ARMS)}"
            continue
        arm = ARMS[result.arm]
        yield from _labels(result, arm)
        yield from _insertions(result, arm)
        shared = result.images.get("shared")
        if shared != 0:
            yield f"{result.path}: {shared} of {result.images.get('tested')} test images were trained on; expected 0"
    first: dict[Any, Result] = {}
    for result in results:
        alike = {
            "the same questions": ((result.seed, result.condition), lambda one: one.questions),
            "one base model": (result.base, lambda one: one.base_stamp),
        }
        for what, (key, of) in alike.items():
            other = first.setdefault((what, key), result)
            if of(result) != of(other):
                yield f"{result.path} and {other.path}: expected {what}"
        key = ("once", result.base, result.seed, result.condition, result.arm)
        if first.setdefault(key, result) is not result:
            yield f"{result.path} and {first[key].path}: the same arm twice"


def _labels(result: Result, arm: Arm) -> Iterable[str]:
    """What an arm was trained and measured with, against what its name says."""
    model = ARMS[arm.model] if arm.model else arm
    for what, got, wanted in (
        ("was measured", result.used, arm),
        ("has a model that was trained", result.model, model),
    ):
        for name in (field.name for field in dataclasses.fields(ReattentionOptions)):
            have, want = got.get("reattention", {}).get(name), getattr(wanted.reattention, name)
            if have != want:
                yield f"{result.path}: {arm.name} {what} with reattention.{name}={have!r}, expected {want!r}"
        if got.get("words") != wanted.words:
            yield f"{result.path}: {arm.name} {what} with words={got.get('words')!r}, expected {wanted.words}"
    condition = CONDITIONS.get(result.condition)
    if condition is None:
        yield f"{result.path}: condition {result.condition!r}; expected one of {', '.join(CONDITIONS)}"
        return
    for name, got, want in (
        ("order", result.used.get("order"), condition.order),
        ("model.order", result.model.get("order"), condition.order),
        ("model.tokens", result.model.get("tokens"), [condition.low, condition.high]),
        ("squeezed", result.used.get("squeezed"), arm.squeezed),
        ("model.seed", result.model.get("seed"), result.seed),
        ("scenes_seed", result.used.get("scenes_seed"), result.seed + FRESH_SEED),
    ):
        if got != want:
            yield f"{result.path}: {name} is {got!r}, expected {want!r}"


def _insertions(result: Result, arm: Arm) -> Iterable[str]:
    """Inserted slots of a written or given response, which has one reflection: those of the arm, in every block."""
    want = arm.inserted(int(result.used.get("visual_tokens", 0)))
    for (working, tokens), ways in result.cells.items():
        for way in (FORCED, *([] if arm.squeezed else [CONTINUED])):
            where, got = f"{result.path}: {working}/{tokens}: ", ways.get(way, {}).get("inserted_tokens")
            if got is None:
                yield f"{where}no {way} inserted_tokens"
            elif not np.array_equal(got, np.full(len(got), BLOCK * want)):
                mean = float(got.mean()) / BLOCK
                yield f"{where}{mean:g} tokens put in an answer ({way}), expected {want} of {arm.name}"
