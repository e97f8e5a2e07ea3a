"""Runs the length study: base models, stage 4 of every arm, and what each arm's model answers; resumable.

Every training has a folder and every result a file; what is there and was made with the same settings is kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import to_dict
from qwenla_jax.data.batching.loader import batch_indices
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.sources.mixture import Mixture
from qwenla_jax.data.sources.spec import parse
from qwenla_jax.data.synthetic.length_options import WORKINGS, LengthOptions
from qwenla_jax.data.synthetic.length_questions import LENGTH_KINDS
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.inference.runtime import build
from qwenla_jax.run.workdir import SETTINGS_FILE
from qwenla_jax.study.arms import Stage
from qwenla_jax.study.length_arms import (
    AFTER,
    ARMS,
    FRESH_SEED,
    QUESTION,
    REST,
    ROWS,
    Arm,
    Base,
    Condition,
    Size,
    base_options,
    stage_options,
)
from qwenla_jax.study.length_measures import Measured, answer_sampler, forced_programs, generated, teacher_forced
from qwenla_jax.study.length_results import CONTINUED, FORCED, FREE, encode, read_result, write_result
from qwenla_jax.study.pipeline import DONE, run_stage, saved
from qwenla_jax.train.loop import run as train
from qwenla_jax.train.train_runtime import make_run_source
from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import write_text

IMAGES_FILE = "images.json"  # digests of the images that a model was trained on


def run_length(
    size: Size,
    trainings: Sequence[RunOptions],
    workdir: Path,
    results: Path,
    note: Callable[[str], None],
    seed: int | None = None,
) -> list[Path]:
    """Runs whatever is not there yet.

    Args:
      size: what is run.
      trainings: of base models, see `base_options`.
      workdir: holds a folder for every training.
      results: gets a file for every arm of every base model, seed and condition.
      note: gets a line of progress.
      seed: the only one that is run, once the base models are there several processes may run one each; None: all.

    Returns:
      the results' files.

    Raises:
      train.loop.RunRefused: a folder was made from what is no longer there.
    """
    files = []
    for place, base in enumerate(size.bases):
        made = _made(base, place, trainings, workdir, note)
        for number in range(size.seeds) if seed is None else [seed]:
            for condition in size.conditions:
                for name in size.arms:
                    arm = ARMS[name]
                    parts = base.name, condition.name, str(number)
                    stage_name = "_".join([*parts, _slug(arm.model or name)])
                    if arm.trained:
                        options = stage_options(arm, condition, size, str(workdir / made[-1] / "hf"), number)
                        stage = Stage(stage_name, options, _trained, (made[-1],))
                        run_stage(stage, workdir.joinpath, note)
                    file = results / "_".join([*parts[:2], f"seed{number}", f"{_slug(name)}.json"])
                    places = [workdir / training for training in (*made, stage_name)]
                    _measured(arm, condition, size, number, base.name, places, file, note)
                    files.append(file)
    return files


def _made(
    base: Base, number: int, trainings: Sequence[RunOptions], workdir: Path, note: Callable[[str], None]
) -> list[str]:
    """The folders of a base model's trainings, the last of which is the base model; run where they are not there."""
    names = [f"base_{base.name}_first", f"base_{base.name}"]
    for at, options in enumerate(base_options(base, number, trainings, str(workdir / names[0] / "hf"))):
        run_stage(Stage(names[at], options, _trained, tuple(names[:at])), workdir.joinpath, note)
    return names


def _slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def _trained(options: RunOptions, folder: Path) -> None:
    """A training, and the digests of the images that it saw."""
    train(options, folder)
    write_text(folder / IMAGES_FILE, json.dumps(sorted(trained_images(options))))


def trained_images(options: RunOptions) -> set[str]:
    """Digests of the images of a training on scenes, from its settings: what its batches are made of."""
    source = make_run_source(options, "cold_start")
    data = options.data
    # Batches share out their questions by length within groups, of which the last one may be used in part.
    steps = -(-options.steps // data.length_group) * data.length_group
    rows = data.batch_size * steps
    assert isinstance(source, Mixture)
    seen = (source.place(int(i)) for i in batch_indices(options.seed, 0, rows, len(source)))
    # The scenes alone: a record is twice the work, and told scenes are drawn too.
    scenes = {name: one for name, one in source.sources.items() if isinstance(one, SceneSource)}
    return {_digest(scenes[name].scene(index).image) for name, index in seen}


def _digest(image: Image.Image) -> str:
    return hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest()


def _measured(
    arm: Arm,
    condition: Condition,
    size: Size,
    seed: int,
    base: str,
    places: Sequence[Path],
    file: Path,
    note: Callable[[str], None],
) -> None:
    """One arm's result, unless it is there; `places`: of the base model's trainings, and of the arm's model."""
    *_, base_folder, folder = places
    label = f"{base} {condition.name} seed {seed}: {arm.name}"
    model = saved(folder / DONE, "stamp", "seconds")
    of = {"stamp": model["stamp"], "tokens": list(size.tokens), "scenes": size.scenes, "profiled": size.profiled}
    if file.is_file() and saved(file, "of", "version")["of"] == of and read_result(file).arm == arm.name:
        note(f"{label}: measured already")
        return
    note(f"{label}: is measured")
    begin = time.perf_counter()
    cells, answers, questions, tokens = measure(arm, condition, size, seed, folder / "hf")
    tested = {_digest(source.scene(i).image) for source in [_source(arm, condition, size, seed, *cells_of(size)[0])]
              for i in range(len(source))}  # fmt: skip
    trained = {digest for place in places for digest in json_files.read_json(place / IMAGES_FILE)}
    content = {
        "of": of,
        "base": base,
        "base_stamp": saved(base_folder / DONE, "stamp")["stamp"],
        "seed": seed,
        "condition": condition.name,
        "arm": arm.name,
        "used": {
            "reattention": to_dict(arm.reattention),
            "squeezed": arm.squeezed,
            "words": arm.words,
            "order": condition.order,
            "scenes_seed": seed + FRESH_SEED,
            "visual_tokens": tokens,
        },
        "model": _model(folder),
        "images": {"tested": len(tested), "trained": len(trained), "shared": len(tested & trained)},
        "questions": questions,
        "cells": cells,
        "seconds": {"training": model["seconds"], "measuring": time.perf_counter() - begin},
        "answers": answers,
    }
    write_result(file, content)


def _model(folder: Path) -> dict[str, Any]:
    """What a model was trained with, as the training itself has written it."""
    options = saved(folder / SETTINGS_FILE, "data", "seed", "steps", "reattention")
    part, *_ = parse(options["data"]["source"])  # the others have told scenes and cut responses
    lengths = LengthOptions.of(part.keys)
    return {
        "reattention": options["reattention"],
        "words": lengths.words,
        "order": "|".join(lengths.orders),
        "tokens": [lengths.low, lengths.high],
        "seed": options["seed"],
        "steps": options["steps"],
    }


def cells_of(size: Size) -> list[tuple[str, int]]:
    """(working, N) of what is measured."""
    return [(working, tokens) for working in WORKINGS for tokens in size.tokens]


def _source(arm: Arm, condition: Condition, size: Size, seed: int, working: str, tokens: int) -> SceneSource:
    lengths = LengthOptions(tokens, tokens, (working,), (condition.order,), arm.words)
    source = make_source(lengths.setting(), "held_out", seed=seed + FRESH_SEED, size=size.scenes)
    assert isinstance(source, SceneSource)
    return source


def measure(
    arm: Arm, condition: Condition, size: Size, seed: int, model: Path
) -> tuple[dict[str, Any], dict[str, Any], str, int]:
    """Everything that is measured of one arm's model.

    Returns:
      cells as a result's file has them; the first answers by cell; a digest of the questions; and the visual tokens of
      an image.
    """
    config = InferenceConfig(
        init_from=str(model),
        batch_size=ROWS,
        max_prompt_tokens=QUESTION,
        max_response_tokens=max(size.tokens) + REST,
        reattention=arm.reattention,
    )
    runtime, params = build(config)
    programs, continuing = forced_programs(runtime, arm.squeezed), answer_sampler(runtime, AFTER, given=True)
    cells, answers, asked, visual = {}, {}, hashlib.blake2b(digest_size=8), 0
    for working, tokens in cells_of(size):
        source = _source(arm, condition, size, seed, working, tokens)
        records = [source[i] for i in range(len(source))]
        asked.update("\n".join(f"{r.id} {r.question} {r.answer}" for r in records).encode())
        visual = runtime.example(with_response=False)(records[0]).frames[0].num_visual_tokens
        kinds = {"kind": np.array([LENGTH_KINDS.index(r.kind) for r in records], float)}
        ways: dict[str, Measured] = {}
        ways[FORCED] = teacher_forced(runtime, params, source, programs, size.profiled)
        if not arm.squeezed:
            ways[CONTINUED] = generated(runtime, params, source, continuing, True, programs[0])
            if working == "chain":  # words between numbers are no task
                sampler = answer_sampler(runtime, tokens + REST, given=False)
                ways[FREE] = generated(runtime, params, source, sampler, False)
        name = f"{working}/{tokens}"
        cells[name] = {way: encode(kinds | one.numbers) for way, one in ways.items()}
        answers[name] = {way: list(one.answers) for way, one in ways.items() if one.answers}
    jax.clear_caches()
    return cells, answers, asked.hexdigest(), visual
