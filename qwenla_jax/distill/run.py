"""A distillation run from its questions to its summary; a folder that holds part of one is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from qwenla_jax.config.schema import differences, to_dict
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.sources.factory import make_source, readable
from qwenla_jax.distill.distill_options import FREE_KEYS, DistillOptions
from qwenla_jax.distill.endpoint import read_key
from qwenla_jax.distill.judges import JudgeLog, Judges
from qwenla_jax.distill.results import assess_group, summary_text, write_results
from qwenla_jax.distill.sample_answers import done_questions, generate
from qwenla_jax.distill.teacher import INSTRUCTION, source_rows, write_samples
from qwenla_jax.distill.verify import source_problem
from qwenla_jax.inference.runtime import build
from qwenla_jax.train.loop import RunRefused
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.progress import Progress
from qwenla_jax.weights.hub import pinned

T = TypeVar("T")


def run(options: DistillOptions, workdir: Path) -> dict[str, Any]:
    """Samples or asks the teacher, verifies and writes the results, as far as they are not there yet.

    Args:
      options: checked settings.
      workdir: the run's folder.

    Returns:
      the summary, as in `summary.json`.

    Raises:
      Refused: the folder belongs to other settings or is in use, or settings, files or records cannot be used.
    """
    try:
        with jsonl_store.locked(workdir):
            return _run(options, workdir)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise RunRefused(f"{type(error).__name__}: {error}") from error


def _run(options: DistillOptions, workdir: Path) -> dict[str, Any]:
    options = dataclasses.replace(options, init_from=pinned(options.init_from))
    saved = jsonl_store.read_settings(workdir)
    if saved is not None and (result := differences(saved, options, FREE_KEYS)):
        raise jsonl_store.StoreError(
            f"{workdir} belongs to other settings; take another workdir:\n" + "\n".join(result)
        )
    if saved is None and (workdir / jsonl_store.SAMPLES).is_file():
        raise jsonl_store.StoreError(
            f"{workdir}: {jsonl_store.SETTINGS} is missing, so nobody knows what {jsonl_store.SAMPLES} is of"
        )
    # All of a file: nothing is held out from what is answered. The splits of rendered scenes share no scene.
    data, cold_start = options.data, options.make == "cold_start"
    source = make_source(
        data.source or "",
        "cold_start" if cold_start else "train",
        seed=options.seed,
        size=data.size,
        reflection_share=float(cold_start and not options.teacher.models),
        whole=True,
        max_invalid=data.max_invalid,
        once=True,
    )
    if data.max_invalid:
        source = readable(source, data.max_invalid)
    done = 0 if cold_start else done_questions(workdir, options, source)
    if saved is not None:
        sampled = "" if cold_start else f" with {done} of {len(source)} questions sampled"
        print(f"{workdir} holds a run{sampled}: it is resumed (for a new run: another --workdir)")
    jsonl_store.mend(workdir / jsonl_store.CORRECTIONS)
    jsonl_store.write_json(workdir / jsonl_store.SETTINGS, to_dict(options))
    stopped = []
    if cold_start:
        stopped.append(_teach(options, workdir, source))
    elif done < len(source):
        _sample(options, workdir, done, source)
    log = JudgeLog(workdir / jsonl_store.JUDGEMENTS)
    if "judges" in options.verify.verifiers:
        stopped.append(_judge(options, workdir, log, len(source)))
    summary = write_results(workdir, options, log)
    print(summary_text(summary))
    for reason in filter(None, stopped):
        print(f"asking stopped: {reason}. The same command continues from here.")
    print(f"results in {workdir}")
    return summary


def _sample(options: DistillOptions, workdir: Path, done: int, source: Any) -> None:
    runtime, params = build(options.inference)
    rows, k = options.data.batch_size, options.sampling.samples
    total = -(-len(source) // rows)
    progress = Progress(total, done // rows)
    resumed = f", continuing after question {done}" if done else ""
    progress.note(f"distill: {len(source)} questions of {options.data.source}, {k} answers each{resumed}; {workdir}")
    generate(runtime, params, source, options, workdir, done, lambda count: _tell(progress, -(-count // rows), total))
    progress.close()


def _tell(progress: Progress, done: int, total: int) -> None:
    """Shows about twenty of the steps."""
    if done % max(1, total // 20) == 0 or done == total:
        progress.show(done, {})
    else:
        progress.tick(done)


def _teach(options: DistillOptions, workdir: Path, source: RecordSource) -> str | None:
    """Asks the teachers and writes the samples; why asking ended early, None where it did not."""
    log, stopped = JudgeLog(workdir / jsonl_store.REPLIES), None
    if options.teacher.models:
        key = read_key(options.teacher.api_key_env)
        teacher = Judges(options.teacher, log, workdir, key, instruction=INSTRUCTION, name="teacher")
        rows = (row for row in source_rows(source, workdir) if source_problem(row, options) is None)
        note = f"reflections by {', '.join(options.teacher.models)}"
        stopped = _ask(teacher, note, rows, teacher.votes, len(source))
    write_samples(source, options, workdir, log)
    return stopped


def _judge(options: DistillOptions, workdir: Path, log: JudgeLog, questions: int) -> str | None:
    """Asks the judges; why that ended early, None where it did not."""
    judges = Judges(options.judges, log, workdir, read_key(options.judges.api_key_env))
    groups = jsonl_store.groups(workdir / jsonl_store.SAMPLES, options.answers_each)
    note = f"judging by {', '.join(options.judges.models)}"
    return _ask(judges, note, groups, lambda rows: assess_group(rows, options, log, judges), questions)


def _ask(judges: Judges, note: str, items: Iterable[T], ask: Callable[[T], object], questions: int) -> str | None:
    progress = Progress(questions)
    progress.note(note)
    with contextlib.closing(progress), judges:
        for done in judges.each(items, ask):
            _tell(progress, done, questions)
    return None if judges.stopped == "interrupted" else judges.stopped
