"""What the harnesses wrote: each answer with their score of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwenla_jax.evals.table_files import Row, read_rows


class Stored(NamedTuple):
    """A run's answers to one benchmark.

    Attributes:
      run: its name.
      gold: the benchmark, a file of data.py.
      task: what scores it here.
      answers: for each answer the question's number, the text, and whether the harness takes it for right.
      figure: its headline figure in percent, and the name of the same figure here.
      each: False where it only says how many are right, not which.
    """

    run: str
    gold: str
    task: str
    answers: list[tuple[int, str, bool]]
    figure: tuple[float, str]
    each: bool = True


def stored_answers(out: Path) -> Iterator[Stored]:
    """Of all runs in a folder."""
    for folder in sorted(out.iterdir()):
        harness = next(name for name in _READERS if folder.name.startswith(name))
        yield from _READERS[harness](folder)


def _inspect(folder: Path) -> Iterator[Stored]:
    for path in sorted(folder.glob("*.json")):
        log = json.loads(path.read_text(encoding="utf-8"))
        answers = []
        for sample in log["samples"]:
            (score,) = sample["scores"].values()
            text = _text(sample["output"]["choices"][0]["message"]["content"])
            answers.append((int(sample["id"]), text, score["value"] == "C"))
        task = log["eval"]["task"]
        value = 100 * log["results"]["scores"][0]["metrics"]["accuracy"]["value"]
        yield Stored(folder.name, task, task, answers, (value, _ACCURACY[task]))


def _text(content: Any) -> str:
    """Of a message; reasoning is a part of its own."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _lm_eval(folder: Path) -> Iterator[Stored]:
    for benchmark in ("pope", "mathvision"):
        (path,) = folder.rglob(f"samples_{benchmark}_local_*.jsonl")
        answers = [(int(row["doc_id"]), _first(row["resps"]), row["exact_match"] == 1) for row in _lines(path)]
        value = 100 * _results(folder)[f"{benchmark}_local"]["exact_match,none"]
        yield Stored(folder.name, benchmark, benchmark, answers, (value, _ACCURACY[benchmark]))


def _lmms_eval(folder: Path) -> Iterator[Stored]:
    for path in sorted(folder.rglob("*_samples_*.jsonl")):
        benchmark = "pope" if "pope" in path.name else "mathvision"
        answers = [(int(row["doc_id"]), _first(row["filtered_resps"]), _lmms_right(row)) for row in _lines(path)]
        results = _results(folder)
        if benchmark == "pope":
            figure = (100 * results["pope"]["pope_accuracy,none"], "accuracy/random")
        else:
            figure = (results["mathvision_test"]["mathvision_standard_eval,none"], "accuracy")
        yield Stored(folder.name, benchmark, benchmark, answers, figure)


def _lmms_right(row: dict[str, Any]) -> bool:
    if "pope_accuracy" in row:
        return row["pope_accuracy"]["score"] == 1
    return bool(row["mathvision_standard_eval"]["scores"][0])


def _first(value: Any) -> str:
    while isinstance(value, list):
        value = value[0]
    return value


def _results(folder: Path) -> dict[str, Any]:
    (path,) = (path for path in folder.rglob("*results*.json"))
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _vlmevalkit(folder: Path) -> Iterator[Stored]:
    for model in sorted(path for path in folder.iterdir() if path.is_dir()):
        latest = max((path for path in model.glob("T*") if path.is_dir()), default=None)
        if latest is not None:
            yield from _vlmevalkit_model(folder.name, latest)


def _vlmevalkit_model(run: str, latest: Path) -> Iterator[Stored]:
    for path in sorted(latest.glob("*_POPE_local_auxmatch.xlsx")):
        answers = [(int(row.need("index")), row.text("prediction") or "", _true(row)) for row in read_rows(path)]
        overall = _csv(latest, "*_POPE_local_score.csv", "split", "Overall")
        yield Stored(run, "pope", "pope", answers, (float(overall["Overall"]), "F1"))
    for benchmark, name in (("mmstar", "MMStar_local"), ("mmmu", "MMMU_local")):
        for path in sorted(latest.glob(f"*_{name}_exact_matching_result.xlsx")):
            answers = [
                (int(row.need("index").rpartition("_")[2]), row.text("prediction") or "", row.text("hit") == "1")
                for row in read_rows(path)
            ]
            split = "validation" if benchmark == "mmmu" else "none"
            overall = _csv(latest, f"*_{name}_acc.csv", "split", split)
            yield Stored(run, benchmark, "mmstar", answers, (100 * float(overall["Overall"]), "accuracy"))
    for path in sorted(latest.glob("*_MathVision_local.xlsx")):
        answers = [(int(row.need("index")), row.text("prediction") or "", False) for row in read_rows(path)]
        overall = _csv(latest, "*_MathVision_local_*_score.csv", "Subject", "Overall")
        yield Stored(run, "mathvision", "mathvision", answers, (float(overall["acc"]), "accuracy"), each=False)


def _csv(folder: Path, pattern: str, column: str, value: str) -> dict[str, str]:
    """The row of a table in which a column has a value."""
    (path,) = folder.glob(pattern)
    with path.open(encoding="utf-8", newline="") as lines:
        (row,) = [row for row in csv.DictReader(lines) if row[column] == value]
    return row


def _true(row: Row) -> bool:
    return str(row.values["score"]).lower() in ("true", "1", "1.0")


_ACCURACY = {"pope": "accuracy/random", "mmstar": "accuracy", "mathvision": "accuracy"}
_READERS = {"inspect": _inspect, "lm-eval": _lm_eval, "lmms-eval": _lmms_eval, "vlmevalkit": _vlmevalkit}
