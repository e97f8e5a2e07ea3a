"""What the pipeline consists of: its stages, what each is made from, and the systems that are compared at the end.

Paper: base model -> cold start -> BRPO (Qwen-Zero) -> distillation with verification -> supervised training of the base
model with COPY or ROUTE. Without BRPO (table 4) the cold-started model answers the questions of the distillation; paper
silent: which model writes those answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qwenla_jax.config.run_options import EvalOptions, RunOptions
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.distill.run import run as distill
from qwenla_jax.study import collect as names
from qwenla_jax.train.loop import run as train

DISTILL_SEED = 3_000  # the questions of stage 3 are not those of stage 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the stages are run with.

    Attributes:
      base: as its config file has it, its seed included: several seeds may share one base model.
      cold_start, brpo, sft_copy, sft_route: as the config files of these names have them; where a stage starts from
        and what it reads is filled in here.
      distill: stage 3.
      seed: of all other stages.
      source: the scenes of all stages and of the evaluation, "scenes" or "marked_scenes".
      every_arm: also ROUTE at 25% and 75%, and COPY and ROUTE without BRPO (paper, tables 5 and 4).
      questions: fresh scenes of the evaluation.
      profiled: of these, how many the attention is measured on.
      drawn: of these, on how many images the attention at key words is kept for drawing.
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
    source: str = "scenes"
    every_arm: bool = False
    questions: int = 1000
    profiled: int = 256
    drawn: int = 16
    curve_every: int = 60
    curve_size: int = 256


class Stage(NamedTuple):
    """One step of the pipeline, which `work(options, folder)` runs; `needs` names the stages that it is made from."""

    name: str
    options: Any
    work: Callable[[Any, Path], Any]
    needs: tuple[str, ...]


class System(NamedTuple):
    """One row of the table: a stage's model and how it looks again while it answers."""

    name: str
    stage: str
    reattention: ReattentionOptions


def stages_of(settings: Settings, folder: Callable[[str], Path]) -> list[Stage]:
    """The stages in the order in which they can be run; `folder` tells where a stage's results are."""
    change = dataclasses.replace
    quiet = EvalOptions(every=0, final_size=0)
    curve = quiet
    if settings.curve_every:
        size = settings.curve_size
        curve = EvalOptions(every=settings.curve_every, size=size, final_size=size, attention=False)
    model = lambda stage: str(folder(stage) / "hf")  # noqa: E731

    def trained(options: RunOptions, start: str, source: str, evaluated: EvalOptions = quiet) -> RunOptions:
        data = change(options.data, source=source, eval_source=settings.source)
        return change(options, init_from=model(start), data=data, seed=settings.seed, eval=evaluated)

    def distilled(start: str) -> DistillOptions:
        data = change(settings.distill.data, source=settings.source)
        return change(settings.distill, init_from=model(start), data=data, seed=settings.seed + DISTILL_SEED)

    def tuned(name: str, options: RunOptions, answers: str = "distill") -> Stage:
        source = str(folder(answers) / "accepted.jsonl")
        return Stage(name, trained(options, "base", source), train, ("base", answers))

    def at(share: float) -> RunOptions:
        route = settings.sft_route
        return change(route, reattention=change(route.reattention, keep_ratio=share))

    base = change(settings.base, data=change(settings.base.data, source=settings.source), eval=quiet)
    stages = [
        Stage("base", base, train, ()),
        Stage("cold_start", trained(settings.cold_start, "base", settings.source), train, ("base",)),
        Stage("brpo", trained(settings.brpo, "cold_start", settings.source, curve), train, ("cold_start",)),
        Stage("distill", distilled("brpo"), distill, ("brpo",)),
        tuned("sft_text", change(settings.sft_copy, reattention=ReattentionOptions())),
        tuned("sft_copy", settings.sft_copy),
        tuned("sft_route", settings.sft_route),
    ]
    if settings.every_arm:
        stages += [
            tuned("sft_route_25", at(0.25)),
            tuned("sft_route_75", at(0.75)),
            Stage("distill_raw", distilled("cold_start"), distill, ("cold_start",)),
            tuned("sft_raw_copy", settings.sft_copy, "distill_raw"),
            tuned("sft_raw_route", settings.sft_route, "distill_raw"),
        ]
    return stages


def systems_of(settings: Settings) -> list[System]:
    """The systems that the stages make, in the order of the table."""
    change = dataclasses.replace
    none, copy, route = ReattentionOptions(), settings.sft_copy.reattention, settings.sft_route.reattention
    systems = [
        System(names.BASE, "base", none),
        System(names.COLD, "cold_start", none),
        System(names.ZERO, "brpo", none),
        System(names.TEXT, "sft_text", none),
        System(names.COPY, "sft_copy", copy),
        System(names.ROUTE, "sft_route", route),
        System(names.VISION, "sft_copy", change(copy, mode="vision_only")),
        System(names.COPY_BLANK, "sft_copy", change(copy, content="blank")),
        System(names.COPY_OTHER, "sft_copy", change(copy, content="other")),
    ]
    if settings.every_arm:
        systems += [
            System(names.ROUTE_25, "sft_route_25", change(route, keep_ratio=0.25)),
            System(names.ROUTE_75, "sft_route_75", change(route, keep_ratio=0.75)),
            System(names.RAW_COPY, "sft_raw_copy", copy),
            System(names.RAW_ROUTE, "sft_raw_route", route),
        ]
    return systems
