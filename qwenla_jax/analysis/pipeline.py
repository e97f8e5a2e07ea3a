"""The paper's five stages one after the other, and the table of what came out, on rendered scenes.

Paper: base model -> cold start -> BRPO (Qwen-Zero) -> distillation with verification -> supervised training of the base
model with COPY or ROUTE -> evaluation with the same. Every stage works in its own folder and is skipped when its result
is there, made with the same settings.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from qwenla_jax.analysis.attention import looks
from qwenla_jax.analysis.heat import heat_maps
from qwenla_jax.analysis.scored import score
from qwenla_jax.analysis.study import SAVED
from qwenla_jax.data.sources import SceneSource
from qwenla_jax.distill.options import DistillOptions
from qwenla_jax.distill.run import run as distill
from qwenla_jax.train.loop import Refused
from qwenla_jax.train.loop import run as train
from qwenla_jax.train.options import EvalOptions, ReattentionOptions, RunOptions
from qwenla_jax.train.runtime import build
from qwenla_jax.train.schema import to_dict

DONE = "done.json"
BEGUN = "made_from.json"  # the stamps of what a stage is made from, written before it begins
NEEDS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "cold_start": ("base",),
    "brpo": ("cold_start",),
    "distill": ("brpo",),
    "sft_text": ("base", "distill"),
    "sft_copy": ("base", "distill"),
    "sft_route": ("base", "distill"),
}
FRESH_SEED = 7_000  # added to the seed: the evaluation's scenes are nobody's training or tuning scenes
DISTILL_SEED = 3_000  # the questions of stage 3 are not those of stage 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the stages are run with.

    Attributes:
      base, cold_start, brpo, sft_copy, sft_route: as the config files of these names have them; where a stage starts
        from and what it reads is filled in here.
      distill: stage 3.
      seed: of all stages.
      questions: fresh scenes of the evaluation.
      profiled: of these, how many the attention is measured on.
      drawn: of these, on how many pictures the attention at key words is kept for drawing.
      curve_every, curve_size: BRPO answers so many held-out scenes greedily every so many steps and at both ends, for
        the curve of accuracy over steps; 0: never.
    """

    base: RunOptions
    cold_start: RunOptions
    brpo: RunOptions
    distill: DistillOptions
    sft_copy: RunOptions
    sft_route: RunOptions
    seed: int = 0
    questions: int = 1000
    profiled: int = 256
    drawn: int = 16
    curve_every: int = 60
    curve_size: int = 256


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the table: a model and how it looks again while it answers."""

    name: str
    stage: str
    reattention: ReattentionOptions


def run_pipeline(settings: Settings, workdir: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Runs whatever is not there yet and writes `table.json` and `table.md`.

    Args:
      settings: see there.
      workdir: holds a folder for every stage.
      note: told what is done, line by line.

    Returns:
      `systems`: name -> scores; `seconds`: stage -> wall time of the run that made it.

    Raises:
      train.loop.Refused: a stage's folder belongs to other settings, or was made from what is no longer there.
    """
    folder = lambda stage: str(workdir / stage / "hf")  # noqa: E731
    distilled = str(workdir / "distill" / "accepted.jsonl")
    quiet = EvalOptions(every=0, final_size=0)
    change = dataclasses.replace
    curve = quiet
    if settings.curve_every:
        size = settings.curve_size
        curve = EvalOptions(every=settings.curve_every, size=size, final_size=size, attention=False)

    def with_data(options: RunOptions, init_from: str, source: str, evaluated: EvalOptions = quiet) -> RunOptions:
        data = change(options.data, source=source, eval_source="scenes")
        return change(options, init_from=init_from, data=data, seed=settings.seed, eval=evaluated)

    text_only = change(settings.sft_copy, reattention=ReattentionOptions())
    stages: dict[str, tuple[Any, Callable[[Any, Path], Any]]] = {
        "base": (change(settings.base, seed=settings.seed, eval=quiet), train),
        "cold_start": (with_data(settings.cold_start, folder("base"), "scenes"), train),
        "brpo": (with_data(settings.brpo, folder("cold_start"), "scenes", curve), train),
        "distill": (
            change(settings.distill, init_from=folder("brpo"), seed=settings.seed + DISTILL_SEED),
            distill,
        ),
        "sft_text": (with_data(text_only, folder("base"), distilled), train),
        "sft_copy": (with_data(settings.sft_copy, folder("base"), distilled), train),
        "sft_route": (with_data(settings.sft_route, folder("base"), distilled), train),
    }
    seconds = {
        name: _stage(name, options, work, workdir, NEEDS[name], note) for name, (options, work) in stages.items()
    }
    none, copy = ReattentionOptions(), settings.sft_copy.reattention
    systems = (
        System("base", "base", none),
        System("cold start", "cold_start", none),
        System("Qwen-Zero", "brpo", none),
        System("text-only", "sft_text", none),
        System("copy", "sft_copy", copy),
        System("route", "sft_route", settings.sft_route.reattention),
        System("vision-only", "sft_copy", change(copy, mode="vision_only")),
    )
    found = {system.name: _evaluated(system, settings, workdir, note) for system in systems}
    result = {"systems": found, "seconds": seconds, "seed": settings.seed, "questions": settings.questions}
    _write(workdir / "table.json", result)
    (workdir / "table.md").write_text(table(found), encoding="utf-8")
    return result


def _stage(
    name: str,
    options: Any,
    work: Callable[[Any, Path], Any],
    workdir: Path,
    needs: tuple[str, ...],
    note: Callable[[str], None],
) -> float:
    """Runs one stage unless it is done; returns the seconds that it took, or had taken.

    Every result bears a stamp, and remembers the stamps of what it was made from.
    """
    folder = workdir / name
    path, wanted = folder / DONE, to_dict(options)
    made_from = {need: json.loads((workdir / need / DONE).read_text(encoding="utf-8"))["stamp"] for need in needs}
    begun = folder / BEGUN
    if folder.is_dir() and any(folder.iterdir()):
        if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8")) != made_from:
            raise Refused(f"{folder} was made from another {' or '.join(needs)}; delete it, and it is made anew")
    if path.is_file():
        done = json.loads(path.read_text(encoding="utf-8"))
        if done["options"] == wanted:
            note(f"{name}: done already in {folder}")
            return done["seconds"]
    note(f"{name}: in {folder}")
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    _write(begun, made_from)
    path.unlink(missing_ok=True)  # until the end it is not done
    work(options, folder)
    jax.clear_caches()  # the programs of one stage serve no other
    seconds = time.perf_counter() - begin
    done = {"options": wanted, "seconds": seconds, "stamp": uuid.uuid4().hex}
    _write(path, done)
    return seconds


def _write(path: Path, content: Any) -> None:
    """As JSON, whole or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content), encoding="utf-8")
    fresh.replace(path)


def _evaluated(system: System, settings: Settings, workdir: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Scores of one system, from disk where they are there."""
    folder = workdir / "evaluate" / system.name.replace(" ", "_")
    options = dataclasses.replace(
        settings.brpo,
        init_from=str(workdir / system.stage / "hf"),
        reattention=system.reattention,
        seed=settings.seed,
    )
    wanted = {
        "options": to_dict(options),
        "stamp": json.loads((workdir / system.stage / DONE).read_text(encoding="utf-8"))["stamp"],
        "questions": settings.questions,
        "profiled": settings.profiled,
        "drawn": settings.drawn,
        "saved": SAVED,
    }
    path = folder / "scores.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["of"] == wanted:
            note(f"evaluate {system.name}: done already")
            return saved["scores"]
    note(f"evaluate {system.name}")
    runtime, params = build(options)
    seed = settings.seed + FRESH_SEED
    source = SceneSource(seed, "held_out", settings.questions)
    sampler = runtime.sampler(runtime.sample_options(group_size=1, temperature=0.0))
    scores, lines = score(runtime, params, source, seed, sampler)
    scores["attention"], by_question = looks(runtime, params, source, settings.profiled, sampler=sampler)
    heat = heat_maps(runtime, params, source, settings.drawn, sampler)
    jax.clear_caches()
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # until all of it is there, the system is not evaluated
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _write(folder / "attention.json", by_question)
    _write(folder / "heat.json", heat)
    _write(path, {"of": wanted, "name": system.name, "scenes_seed": seed, "scores": scores})
    return scores


COLUMNS: tuple[tuple[str, str], ...] = (
    ("accuracy", "accuracy"),
    ("attribute", "accuracy/attribute"),
    ("compare", "accuracy/compare"),
    ("count", "accuracy/count"),
    ("existence", "accuracy/existence"),
    ("subtract", "accuracy/subtract"),
    ("format", "format"),
    ("CHAIR_i", "chair_i"),
    ("CHAIR_s", "chair_s"),
    ("recall", "recall"),
)


def table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown: shares in percent, accuracy with its 95% interval (Wilson), attention before, in and after
    reflections as mass on visual tokens and its ratio to evenly spread attention.
    """
    heads = [name for name, _ in COLUMNS] + ["reflections", "looks", "mass: before, in, after", "ratio: the same"]
    rows = ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, scores in systems.items():
        cells = []
        for _, key in COLUMNS:
            value = scores.get(key)
            cell = "-" if value is None else f"{100 * value:.1f}"
            if key == "accuracy":
                low, high = scores["accuracy_interval"]
                cell += f" [{100 * low:.1f}, {100 * high:.1f}]"
            cells.append(cell)
        cells += [f"{scores['reflections']:.2f}", f"{scores['inserted']:.2f}"]
        parts = scores["attention"]["parts"]
        for key in ("visual", "ratio"):
            there = [f"{parts[part][key]:.2f}" if part in parts else "-" for part in ("before", "in", "after")]
            cells.append(", ".join(there))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
