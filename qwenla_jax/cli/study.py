"""All five stages on the embedded default: qwenla study --workdir=DIR

A run in DIR is resumed: a stage whose result is there, made with the same settings, is skipped. At the end
DIR/table.md and DIR/table.json tell accuracy by question type, format, reflections, hallucinated objects and attention
on visual tokens for the base model, the cold start, Qwen-Zero, and text-only, COPY, ROUTE and vision-only reflection.

--study runs what the paper's tables and figures need, in DIR/seed_0, DIR/seed_1, ...: several seeds over one base model
(DIR/base), on scenes whose objects bear marks that no caption names, with ROUTE at several m and COPY and ROUTE without
BRPO besides; then it writes the report.

--report trains nothing: it writes DIR/report.html, one page with every figure, table and verdict, from what is there.
Where DIR holds folders seed_0, seed_1, ..., each a finished run, the page is about all of them. It needs the extra
`report` (matplotlib), and so does --study.

--protocol=length runs another study, of whether looking again pays where an answer is long (docs/study-protocol.md):
--size=quick or --size=full. Every training is in DIR, every arm's result a small file in DIR/results (or --results),
and DIR/report.md, report.html and report.pdf are made of these files alone; what is there is kept, so a run that was
stopped is resumed by the same command. With --report it trains nothing. With --seed it runs that seed alone, so that
several processes with the same DIR may run one each, once the base models are there.

--protocol=released asks the same of a released model, without training: --model and --source name the model and the
questions, each with one image. Its reasoning is made as long as --lengths says; then it looks again, or not, or at a
blank or another image, and answers. --plan prints what that costs on two machines, and runs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu

if TYPE_CHECKING:
    from qwenla_jax.study.arms import Settings
    from qwenla_jax.study.released_run import Released

SEEDS = 3
SCENES = 1000  # of the evaluation

# A response about a marked scene has at most 110 tokens, a plain one 67, a reflection in the mean 13.
STUDY_TOKENS, STUDY_PLAIN_TOKENS, STUDY_REFLECTION = 112, 96, 13.0
# Steps of a study's stages. From a base model that reads images the format is learned in a fraction of the steps that
# it takes from random parameters.
STUDY_STEPS = {"base": 4500, "cold_start": 300, "brpo": 160, "sft_copy": 160, "sft_route": 160}
STUDY_QUESTIONS = 2000  # of the distillation
STUDY_BRPO_RATE = 5e-5  # learning rate
LENGTH_TRAININGS = "working", "long"  # presets of cold_start: of the base models of the length study


def settings(args: flags.FlagValues) -> Settings:
    """What the flags and the recipes ask for, with the first seed."""
    from qwenla_jax.config.run_options import RunOptions
    from qwenla_jax.config.schema import build
    from qwenla_jax.distill.distill_options import DistillOptions
    from qwenla_jax.recipes.by_name import get_config
    from qwenla_jax.study.arms import Settings

    change = dataclasses.replace
    runs = {name: build(RunOptions, get_config(name).to_dict()) for name in STUDY_STEPS}
    distill = build(DistillOptions, get_config("distill").to_dict())
    if args.study:
        runs = {name: longer(change(run, steps=STUDY_STEPS[name])) for name, run in runs.items()}
        runs["base"] = longer(runs["base"], STUDY_PLAIN_TOKENS)
        brpo = runs["brpo"]
        rewards = change(brpo.rewards, target_length=STUDY_REFLECTION)
        runs["brpo"] = change(brpo, rewards=rewards, optim=change(brpo.optim, learning_rate=STUDY_BRPO_RATE))
        distill = longer(distill)
        distill = change(distill, data=change(distill.data, size=STUDY_QUESTIONS))
    else:
        runs["cold_start"] = change(runs["cold_start"], steps=runs["cold_start"].steps // 5)
    runs = {name: change(run, steps=max(1, run.steps // args.divide_steps)) for name, run in runs.items()}
    size = max(64, (distill.data.size or 0) // args.divide_steps)
    arms: dict[str, Any] = {**runs, "base": change(runs["base"], seed=args.seed or 0)}
    return Settings(
        **arms,
        distill=change(distill, data=change(distill.data, size=size)),
        seed=args.seed or 0,
        source="marked_scenes" if args.study else "scenes",
        every_arm=args.study,
        questions=int(args.size or SCENES),
    )


def longer(options: Any, tokens: int = STUDY_TOKENS) -> Any:
    """The same with room for a response about a marked scene."""
    return dataclasses.replace(options, data=dataclasses.replace(options.data, max_response_tokens=tokens))


def report(workdir: Path) -> None:
    """Writes the page about a run, or about the runs in `seed_*` folders; ends the process where something is amiss."""
    from qwenla_jax.study.collect import StudyError, collect, runs_in
    from qwenla_jax.study.figures import NoMatplotlib
    from qwenla_jax.study.report_page import write_report

    try:
        study = collect(*runs_in(workdir))
        write_report(study, workdir / "report.html")
    except (StudyError, NoMatplotlib, OSError) as error:
        sys.exit(str(error))
    for line in study.left_out:
        print(f"left out: {line}")
    print(f"{workdir / 'report.html'}: {len(study.seeds)} seed(s), {study.questions} questions each")


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    there: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/pipeline", "folder of the run, with a folder for every stage", **there)
    flags.DEFINE_integer("seed", None, "seed of all stages (0), the first of a study; length: the only one", 0, **there)
    flags.DEFINE_enum("protocol", "paper", ["paper", "length", "released"], "which study", **there)
    size = f"paper: fresh scenes ({SCENES}); length: quick (the default) or full; released: questions"
    flags.DEFINE_string("size", None, f"{size} ({SCENES})", **there)
    results = "length, released: folder of the results; WORKDIR/results if not given"
    flags.DEFINE_string("results", None, results, **there)
    flags.DEFINE_integer("divide_steps", 1, "make every stage so many times shorter, for a trial", 1, **there)
    flags.DEFINE_bool("study", False, "run several seeds and every arm on marked scenes, and write the report", **there)
    flags.DEFINE_integer("seeds", None, f"of a study: how many ({SEEDS} where it is not given)", 1, **there)
    flags.DEFINE_bool("report", False, "write the report from what is there, and train nothing", **there)
    flags.DEFINE_string("model", None, "released: folder of a checkpoint, or a model of the Hub", **there)
    flags.DEFINE_string("source", None, "released: the questions, such as questions.jsonl", **there)
    lengths = ["0", "256", "1024", "4096"]
    flags.DEFINE_list("lengths", lengths, "released: tokens of reasoning before the insertion", **there)
    flags.DEFINE_integer("batch_size", 8, "released: questions at once", 1, **there)
    flags.DEFINE_integer("max_pixels", 512 * 512, "released: larger images are shrunk to so many", 1, **there)
    flags.DEFINE_float("temperature", 0.7, "released: of the reasoning; answers are greedy", 0, **there)
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "released: of the model", **there)
    flags.DEFINE_integer("tensor", 1, "released: devices that split heads; the others split the batch", 1, **there)
    flags.DEFINE_bool("plan", False, "released: print what it costs, and run nothing; --model may be 3b or 7b", **there)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the command line and runs what is missing."""
    args = read_flags(argv, __doc__, define_flags)
    skip_without_tpu()
    keep_compiled_programs()
    workdir = Path(args.workdir).absolute()
    if args.seeds is not None and not args.study:
        sys.exit("--seeds is of a study; expected --study beside it")
    if args.protocol == "released":
        return run_released_study(args, workdir)
    if args.model or args.source or args.plan:
        sys.exit("--model, --source and --plan are of --protocol=released")
    if args.protocol == "length":
        if args.study:
            sys.exit("--study is of --protocol=paper; expected --size=quick or --size=full with --protocol=length")
        return run_length_study(args, workdir)
    if args.results is not None:
        sys.exit("--results is of --protocol=length and --protocol=released")
    if args.size is not None and not (args.size.isdecimal() and int(args.size)):
        sys.exit(f"--size={args.size}: expected a number of scenes above 0; quick and full are of --protocol=length")
    if args.report and args.study:
        sys.exit("--study writes the report at its end; expected only one of --report and --study")
    if args.report:
        return report(workdir)
    if args.study and importlib.util.find_spec("matplotlib") is None:
        sys.exit("the report of a study needs matplotlib; expected: pip install 'qwenla_jax[report]'")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    run(args, workdir)


def run_length_study(args: flags.FlagValues, workdir: Path) -> None:
    """Runs what a length study lacks, and writes its report; ends the process where that cannot continue."""
    from qwenla_jax.config.run_options import RunOptions
    from qwenla_jax.config.schema import build
    from qwenla_jax.recipes.by_name import get_config
    from qwenla_jax.study.collect import StudyError
    from qwenla_jax.study.length_arms import SIZES
    from qwenla_jax.study.length_report import write_length_report
    from qwenla_jax.study.length_run import run_length

    name = args.size or "quick"
    if name not in SIZES:
        sys.exit(f"--size={name}: expected {' or '.join(SIZES)} with --protocol=length")
    results = Path(args.results).absolute() if args.results else workdir / "results"
    if not args.report:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
        size = SIZES[name].divided(args.divide_steps)
        trainings = [build(RunOptions, get_config("cold_start", name).to_dict()) for name in LENGTH_TRAININGS]
        if args.seed is not None and args.seed >= size.seeds:
            sys.exit(f"--seed={args.seed}: expected a seed below {size.seeds}, as --size={name} has")
        ended(lambda: run_length(size, trainings, workdir, results, functools.partial(print, flush=True), args.seed))
    try:
        print(write_length_report(results, workdir / "report.md"))
    except (StudyError, OSError) as error:
        sys.exit(str(error))


def run_released_study(args: flags.FlagValues, workdir: Path) -> None:
    """Runs what the study of a released model lacks, and writes its report; ends the process where it cannot."""
    from qwenla_jax.study.collect import StudyError
    from qwenla_jax.study.released_report import write_released_report
    from qwenla_jax.study.released_run import Released, run_released

    if args.study:
        sys.exit("--study is of --protocol=paper")
    if not args.report and not (args.model and (args.source or args.plan)):
        sys.exit("--protocol=released: expected --model and --source, or --model and --plan, or --report")
    for name, texts in (("size", [args.size or str(SCENES)]), ("lengths", args.lengths)):
        if not all(text.isdecimal() for text in texts) or (name == "size" and not int(texts[0])):
            sys.exit(f"--{name}={','.join(texts)}: expected whole numbers, of --size above 0")
    results = Path(args.results).absolute() if args.results else workdir / "results"
    names = ("temperature", "batch_size", "max_pixels", "dtype", "tensor")
    own: dict[str, Any] = {name: getattr(args, name) for name in names} | {"seed": args.seed or 0}
    lengths = tuple(map(int, args.lengths))
    settings = Released(args.model or "", args.source or "", int(args.size or SCENES), lengths, **own)
    try:
        if args.plan:
            return print_plan(settings)
        if not args.report:
            run_released(settings, results, lambda line: print(line, flush=True))
        print(write_released_report(results, workdir / "report.md"))
    except (StudyError, ValueError, OSError) as error:
        sys.exit(str(error))


def print_plan(settings: Released) -> None:
    """What the study of a released model costs; a model may be one of the published sizes."""
    from qwenla_jax.model.config import ModelConfig
    from qwenla_jax.planner.published import published_config, published_sizes
    from qwenla_jax.study.released_plan import describe_plan
    from qwenla_jax.weights.hub import local_folder

    known = settings.model in published_sizes()
    config = published_config(settings.model) if known else ModelConfig.from_hf(local_folder(settings.model, False))
    print("\n".join(describe_plan(settings, config)))


def ended(work: Callable[[], Any]) -> Any:
    """What it returns; ends the process where a training cannot continue or is asked to stop."""
    from qwenla_jax.run.checkpoints import SaveError
    from qwenla_jax.run.signals import Stopped
    from qwenla_jax.study.collect import StudyError
    from qwenla_jax.train.health import Failed
    from qwenla_jax.train.loop import RunRefused

    try:
        return work()
    except (RunRefused, Failed, SaveError, StudyError) as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def run(args: flags.FlagValues, workdir: Path) -> None:
    """Runs the pipeline, or a study's, one seed after the other; ends the process where that cannot continue."""
    from qwenla_jax.study.pipeline import run_pipeline, table

    first, begin = settings(args), time.perf_counter()
    seeds = range(first.seed, first.seed + (args.seeds or SEEDS)) if args.study else [first.seed]
    for seed in seeds:
        own = workdir / f"seed_{seed}" if args.study else workdir
        own.mkdir(parents=True, exist_ok=True)
        one = dataclasses.replace(first, seed=seed)
        result = ended(functools.partial(run_pipeline, one, own, lambda line: print(line, flush=True), base_in=workdir))
        took = result["seconds"] | {"evaluation": sum(result["evaluate_seconds"].values())}
        print(table(result["systems"]))
        print(
            f"seed {seed}, wall time: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in took.items())}; "
            f"all together {sum(took.values()) / 60:.1f} min",
            flush=True,
        )
    if args.study:
        report(workdir)
    print(f"this command took {(time.perf_counter() - begin) / 60:.1f} min")
