"""Results of the length study of a released model: a file for each (working, N, arm), and what has to be true of them.

From these files alone the report is made again; the model is not needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenla_jax.config.schema import to_dict
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_analysis import Study
from qwenla_jax.study.length_arms import ARMS
from qwenla_jax.study.length_results import CONTINUED, FORCED, Result, read_content, write_result

VERSION = 1
RELEASED = "released"  # in the place of a condition of training
_SHOWN = {"image": "own", "blank": "blank", "other": "other"}  # by content


@dataclasses.dataclass(frozen=True)
class ReleasedResult:
    """One arm at one N.

    Attributes:
      of: the settings that it depends on.
      model, working, tokens, arm: which.
      reattention: what it was measured with.
      prefix: digest of everything before the insertion; the same in all arms.
      right, logp_answer: by question; the latter in nats.
      inserted, visual: by question, tokens that were inserted, and visual tokens of its image.
      shown: by question, which image the inserted tokens show: own, blank, other or nothing.
      answers: the first ones, to read.
      seconds: wall time, compilation included.
    """

    of: Mapping[str, Any]
    model: str
    working: str
    tokens: int
    arm: str
    reattention: Mapping[str, Any]
    prefix: str
    right: np.ndarray
    logp_answer: np.ndarray
    inserted: np.ndarray
    visual: np.ndarray
    shown: tuple[str, ...]
    answers: tuple[str, ...] = ()
    seconds: float = 0.0


_ARRAYS = {"right": 0, "logp_answer": 4, "inserted": 0, "visual": 0}  # decimals


def write_released(path: Path, result: ReleasedResult) -> None:
    """Writes a file, whole or not at all."""
    content = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    for name, places in _ARRAYS.items():
        values = content[name].astype(float)
        content[name] = np.round(values, places).tolist() if places else values.astype(int).tolist()
    write_result(path, content, VERSION)


def read_released(path: Path) -> ReleasedResult:
    """Reads a file.

    Raises:
      StudyError: it cannot be read or lacks something; the message names file and key.
    """
    names = [field.name for field in dataclasses.fields(ReleasedResult)]
    saved = read_content(path, ("version", *names), "--protocol=released", VERSION)
    try:
        values: dict[str, Any] = {name: np.array(saved[name], float) for name in _ARRAYS}
    except (TypeError, ValueError) as error:
        raise StudyError(f"{path}: {error}; expected numbers by question") from error
    texts: dict[str, Any] = {name: tuple(saved[name]) for name in ("shown", "answers")}
    return ReleasedResult(**{name: saved[name] for name in names} | values | texts)


def read_all_released(folder: Path) -> list[ReleasedResult]:
    """All results of a folder, checked.

    Raises:
      StudyError: there is none, one cannot be read, or one is not what it should be.
    """
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise StudyError(
            f"{folder}: holds no results; expected files that qwenla study --protocol=released has written"
        )
    results = [read_released(path) for path in paths]
    if invalid := [problem for path, result in zip(paths, results, strict=True) for problem in _problems(path, result)]:
        raise StudyError("\n".join(invalid))
    first: dict[Any, tuple[Path, ReleasedResult]] = {}
    for path, result in zip(paths, results, strict=True):
        alike = {
            ("the same settings and questions", result.model): lambda one: one.of,
            ("the same reasoning before the insertion", result.model, result.working, result.tokens): lambda one: (
                one.prefix
            ),
        }
        for key, of in alike.items():
            other_path, other = first.setdefault(key, (path, result))
            if of(result) != of(other):
                raise StudyError(f"{path} and {other_path}: expected {key[0]}")
        key = ("once", result.model, result.working, result.tokens, result.arm)
        if first.setdefault(key, (path, result))[0] != path:
            raise StudyError(f"{path} and {first[key][0]}: the same arm twice")
    return results


def _problems(path: Path, result: ReleasedResult) -> Iterator[str]:
    """A label of another arm, and insertions that are missing or show another image."""
    arm = ARMS.get(result.arm)
    if arm is None:
        yield f"{path}: arm {result.arm!r}; expected one of {', '.join(ARMS)}"
        return
    for name, want in to_dict(arm.reattention).items():
        if (have := result.reattention.get(name)) != want:
            yield f"{path}: {arm.name} was measured with reattention.{name}={have!r}, expected {want!r}"
    lengths = {len(getattr(result, name)) for name in (*_ARRAYS, "shown")}
    if len(lengths) > 1 or not len(result.right):
        yield f"{path}: {sorted(lengths)} values; expected one a question, in every measure"
        return
    demanded = np.array([arm.inserted(int(count)) for count in result.visual])
    if wrong := int((result.inserted != demanded).sum()):
        mean = f"{result.inserted.mean():g} of {result.visual.mean():g}"
        yield f"{path}: {wrong} answers with other tokens put in than {arm.name} demands ({mean} in the mean)"
    want = "nothing" if arm.reattention.mode == "none" else _SHOWN.get(arm.reattention.content)
    if others := {what for what in result.shown if what != want}:
        yield f"{path}: {arm.name} showed {', '.join(sorted(others))}, expected {want}"


def studies(results: Sequence[ReleasedResult]) -> dict[str, Study]:
    """Results as the length study's analysis takes them, by model. Models are not pooled: they answer the same."""
    by_model: dict[str, dict[str, list[ReleasedResult]]] = {}
    for result in results:
        by_model.setdefault(result.model, {}).setdefault(result.arm, []).append(result)
    return {model: Study.of([_as_length(model, arm, cells) for arm, cells in arms.items()])
            for model, arms in by_model.items()}  # fmt: skip


def _as_length(model: str, arm: str, cells: Sequence[ReleasedResult]) -> Result:
    numbers = {
        (cell.working, cell.tokens): {
            CONTINUED: {"right": cell.right},
            FORCED: {"logp_answer": cell.logp_answer, "questions": np.ones(len(cell.right))},
        }
        for cell in cells
    }
    return Result(
        path=Path(f"{model} {arm}"),
        base=model,
        base_stamp=str(cells[0].of.get("model")),
        seed=0,
        condition=RELEASED,
        arm=arm,
        used={"reattention": cells[0].reattention},
        model={},
        images={},
        questions=str(cells[0].of.get("questions")),
        cells=numbers,
        seconds={"measuring": sum(cell.seconds for cell in cells)},
        answers={},
    )
