"""Runs the paper's five stages one after the other, and makes the table of what came out, on rendered scenes.

Every stage works in its own folder and is skipped when its result is there, made with the same settings.
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

from qwenla_jax.config.schema import to_dict
from qwenla_jax.data.synthetic.source import scene_source
from qwenla_jax.inference.runtime import build
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.study.arms import Settings, Stage, System, stages_of, systems_of
from qwenla_jax.study.attention_maps import heat_maps
from qwenla_jax.study.attention_profile import attention_sums
from qwenla_jax.study.collect import FINISHED, SAVED
from qwenla_jax.study.measure import score
from qwenla_jax.train.loop import RunRefused
from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import write_text

DONE = "done.json"
BEGUN = "made_from.json"  # the stamps of what a stage is made from, written before it begins
FRESH_SEED = 7_000  # added to the seed: the evaluation's scenes are nobody's training or tuning scenes


def run_pipeline(
    settings: Settings, workdir: Path, note: Callable[[str], None], base_in: Path | None = None
) -> dict[str, Any]:
    """Runs whatever is not there yet and writes `table.json` and `table.md`.

    Args:
      settings: of all stages.
      workdir: holds a folder for every stage.
      note: gets a line of progress.
      base_in: holds the folder of the base model instead, so that runs of several seeds share it.

    Returns:
      `systems`: name -> scores; `seconds`: stage -> wall time of the run that made it; `evaluate_seconds`: name -> the
      same of each evaluation.

    Raises:
      train.loop.RunRefused: a stage's folder belongs to other settings, or was made from what is no longer there.
    """

    def folder(stage: str) -> Path:
        return (base_in if base_in is not None and stage == "base" else workdir) / stage

    seconds = {stage.name: run_stage(stage, folder, note) for stage in stages_of(settings, folder)}
    output, took = {}, {}
    for system in systems_of(settings):
        output[system.name], took[system.name] = _evaluated(system, settings, folder, note)
    result = {"systems": output, "seconds": seconds, "evaluate_seconds": took}
    result |= {"seed": settings.seed, "questions": settings.questions}
    (workdir / "table.md").write_text(table(output), encoding="utf-8")
    _write(workdir / FINISHED, result)
    return result


def run_stage(stage: Stage, folder: Callable[[str], Path], note: Callable[[str], None]) -> float:
    """Runs one stage unless it is done; the seconds that it took. Its stamp, and those of what it needs, are kept.

    Raises:
      train.loop.RunRefused: its folder was made from what is no longer there, or what it needs is not.
    """
    name, own = stage.name, folder(stage.name)
    path, wanted = own / DONE, to_dict(stage.options)
    made_from = {need: saved(folder(need) / DONE, "stamp")["stamp"] for need in stage.needs}
    begun = own / BEGUN
    if own.is_dir() and any(own.iterdir()):
        if not begun.is_file() or saved(begun) != made_from:
            raise RunRefused(f"{own} was made from another {' or '.join(stage.needs)}; delete it, and it is made anew")
    if path.is_file():
        done = saved(path, "options", "seconds")
        if done["options"] == wanted:
            note(f"{name}: done already in {own}")
            return done["seconds"]
    note(f"{name}: in {own}")
    begin = time.perf_counter()
    own.mkdir(parents=True, exist_ok=True)
    _write(begun, made_from)
    path.unlink(missing_ok=True)  # until the end it is not done
    stage.work(stage.options, own)
    jax.clear_caches()  # the programs of one stage serve no other
    seconds = time.perf_counter() - begin
    _write(path, {"options": wanted, "seconds": seconds, "stamp": uuid.uuid4().hex})
    return seconds


def saved(path: Path, *keys: str) -> dict[str, Any]:
    """What an earlier run wrote, with these keys in it."""
    try:
        content = json_files.read_object(path)
    except (OSError, ValueError) as error:
        raise RunRefused(f"{error}; delete {path.parent}, and it is made anew") from error
    if lacking := [key for key in keys if key not in content]:
        raise RunRefused(f"{path}: lacks {', '.join(lacking)}; delete {path.parent}, and it is made anew")
    return content


def _write(path: Path, content: Any) -> None:
    """As JSON, whole or not at all."""
    write_text(path, json.dumps(content))


def _evaluated(
    system: System, settings: Settings, folder: Callable[[str], Path], note: Callable[[str], None]
) -> tuple[dict[str, Any], float]:
    """Scores of one system, from disk where they are there, and the seconds that it took to find them."""
    own = folder("evaluate") / system.name.replace(" ", "_")
    options = dataclasses.replace(
        settings.brpo,
        init_from=str(folder(system.stage) / "hf"),
        reattention=system.reattention,
        seed=settings.seed,
    )
    wanted = {
        "options": to_dict(options),
        "stamp": saved(folder(system.stage) / DONE, "stamp")["stamp"],
        "source": settings.source,
        "questions": settings.questions,
        "profiled": settings.profiled,
        "drawn": settings.drawn,
        "saved": SAVED,
    }
    path = own / "scores.json"
    if path.is_file():
        found = saved(path, "of", "scores", "seconds")
        if found["of"] == wanted:
            note(f"evaluate {system.name}: done already")
            return found["scores"], found["seconds"]
    note(f"evaluate {system.name}")
    begin = time.perf_counter()
    runtime, params = build(options.inference)
    seed = settings.seed + FRESH_SEED
    source = scene_source(settings.source, seed, "held_out", settings.questions)
    sampler = Sampler(runtime, runtime.sample_options(group_size=1, temperature=0.0))
    scores, lines = score(runtime, params, source, sampler)
    scores["attention"], by_question = attention_sums(runtime, params, source, settings.profiled, sampler=sampler)
    heat = heat_maps(runtime, params, source, settings.drawn, sampler)
    jax.clear_caches()
    own.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # until all of it is there, the system is not evaluated
    (own / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _write(own / "attention.json", by_question)
    _write(own / "heat.json", heat)
    seconds = time.perf_counter() - begin
    _write(path, {"of": wanted, "name": system.name, "scenes_seed": seed, "scores": scores, "seconds": seconds})
    return scores, seconds


HEADS = ("accuracy", "format", "CHAIR_i", "CHAIR_s", "recall")  # the columns of shares; question types follow accuracy


def table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown: shares in percent, accuracy with its 95% interval (Wilson), attention before, in and after
    reflections as mass on visual tokens and its ratio to evenly spread attention.
    """
    kinds = sorted({key for scores in systems.values() for key in scores if key.startswith("accuracy/")})
    columns = [(head, head.lower()) for head in HEADS]
    columns[1:1] = [(key.removeprefix("accuracy/"), key) for key in kinds]
    heads = [head for head, _ in columns] + ["reflections", "insertions", "mass: before, in, after", "ratio: the same"]
    rows = ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, scores in systems.items():
        cells = []
        for _, key in columns:
            value = scores.get(key)
            cell = "-" if value is None else f"{100 * value:.1f}"
            if key == "accuracy":
                low, high = scores["accuracy_interval"]
                cell += f" [{100 * low:.1f}, {100 * high:.1f}]"
            cells.append(cell)
        cells += [f"{scores['reflections']:.2f}", f"{scores['inserted']:.2f}"]
        parts = scores["attention"]["parts"]
        for key in ("visual", "ratio"):
            each = (f"{parts[part][key]:.2f}" if part in parts else "-" for part in ("before", "in", "after"))
            cells.append(", ".join(each))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
