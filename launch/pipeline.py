"""All five stages on the embedded default: python launch/pipeline.py --workdir=DIR

What is found in DIR is gone on with: a stage whose result is there, made with the same settings, is skipped. At the end
DIR/table.md and DIR/table.json tell accuracy by question type, format, reflections, hallucinated objects and attention
on visual tokens for the base model, the cold start, Qwen-Zero, and text-only, COPY, ROUTE and vision-only reflection.

--report trains nothing: it writes DIR/report.html, one page with every figure, table and verdict, from what is there.
Where DIR holds folders seed_0, seed_1, ..., each a finished run, the page is about all of them. It needs the extra
`report` (matplotlib).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_WORKDIR = flags.DEFINE_string("workdir", "runs/pipeline", "folder of the run, with a folder for every stage")
_SEED = flags.DEFINE_integer("seed", 0, "seed of all stages", lower_bound=0)
_QUESTIONS = flags.DEFINE_integer("questions", 1000, "fresh scenes of the evaluation", lower_bound=1)
_SHORT = flags.DEFINE_integer("divide_steps", 1, "make every stage so many times shorter, for a trial", lower_bound=1)
_REPORT = flags.DEFINE_bool("report", False, "write DIR/report.html from what is there, and train nothing")


def config(name: str) -> Any:
    """The tiny settings of `configs/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def report(workdir: Path) -> None:
    """Writes the page about a run, or about the runs in `seed_*` folders; ends the process where something is amiss."""
    from qwenla_jax.analysis.figures import NoMatplotlib
    from qwenla_jax.analysis.report import write_report
    from qwenla_jax.analysis.study import StudyError, collect, runs_in

    try:
        study = collect(*runs_in(workdir))
        write_report(study, workdir / "report.html")
    except (StudyError, NoMatplotlib, OSError) as error:
        sys.exit(str(error))
    for line in study.left_out:
        print(f"left out: {line}")
    print(f"{workdir / 'report.html'}: {len(study.seeds)} seed(s), {study.questions} questions each")


def main(argv: list[str]) -> None:
    """Reads the config files and runs what is missing."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _REPORT.value:
        return report(Path(_WORKDIR.value).absolute())
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from qwenla_jax.analysis.pipeline import Settings, run_pipeline, table
    from qwenla_jax.distill.options import DistillOptions
    from qwenla_jax.train.checkpoint import SaveError
    from qwenla_jax.train.guard import Failed
    from qwenla_jax.train.interrupt import Stopped
    from qwenla_jax.train.loop import Refused
    from qwenla_jax.train.options import RunOptions
    from qwenla_jax.train.schema import build

    def shorter(options: RunOptions) -> RunOptions:
        return dataclasses.replace(options, steps=max(1, options.steps // _SHORT.value))

    runs = {
        name: shorter(build(RunOptions, config(name).to_dict()))
        for name in ("base", "cold_start", "brpo", "sft_copy", "sft_route")
    }
    # From a base model that reads pictures the format is learned in a fraction of the steps from random parameters.
    runs["cold_start"] = dataclasses.replace(runs["cold_start"], steps=max(1, runs["cold_start"].steps // 5))
    distill = build(DistillOptions, config("distill").to_dict())
    size = max(64, (distill.data.size or 0) // _SHORT.value)
    distill = dataclasses.replace(distill, data=dataclasses.replace(distill.data, size=size))
    settings = Settings(**runs, distill=distill, seed=_SEED.value, questions=_QUESTIONS.value)
    try:
        result = run_pipeline(settings, Path(_WORKDIR.value).absolute(), lambda line: print(line, flush=True))
    except (Refused, Failed, SaveError) as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
    print(table(result["systems"]))
    print(f"wall time of the stages: {took}; all together {sum(result['seconds'].values()) / 60:.1f} min")


if __name__ == "__main__":
    app.run(main)
