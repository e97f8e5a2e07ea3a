"""A distillation run from its questions to its summary; a folder that holds part of one is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from qwenla_jax.config.schema import differences, to_dict
from qwenla_jax.data.sources.factory import make_source, readable
from qwenla_jax.distill.distill_options import FREE_KEYS, DistillOptions
from qwenla_jax.distill.endpoint import read_key
from qwenla_jax.distill.judges import JudgeLog, Judges
from qwenla_jax.distill.results import ask_judges, summary_text, write_results
from qwenla_jax.distill.sample_answers import done_questions, generate
from qwenla_jax.inference.runtime import build
from qwenla_jax.train.loop import RunRefused
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.progress import Progress
from qwenla_jax.weights.hub import pinned


def run(options: DistillOptions, workdir: Path) -> dict[str, Any]:
    """Samples, verifies and writes the results, as far as they are not there yet.

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
    # All of a file: nothing is held out from what is answered.
    data = options.data
    source = make_source(
        data.source or "",
        "train",
        seed=options.seed,
        size=data.size,
        whole=True,
        max_invalid=data.max_invalid,
        once=True,
    )
    if data.max_invalid:
        source = readable(source, data.max_invalid)
    done = done_questions(workdir, options, source)
    if saved is not None:
        print(
            f"{workdir} holds a run with {done} of {len(source)} questions sampled: it is resumed (for a new run: "
            "another --workdir)"
        )
    jsonl_store.mend(workdir / jsonl_store.CORRECTIONS)
    jsonl_store.write_json(workdir / jsonl_store.SETTINGS, to_dict(options))
    if done < len(source):
        _sample(options, workdir, done, source)
    log = JudgeLog(workdir / jsonl_store.JUDGEMENTS)
    stopped = None
    if "judges" in options.verify.verifiers:
        stopped = _judge(options, workdir, log, len(source))
    summary = write_results(workdir, options, log)
    print(summary_text(summary))
    if stopped is not None:
        print(f"judging stopped: {stopped}. The same command continues from here.")
    print(f"results in {workdir}")
    return summary


def _sample(options: DistillOptions, workdir: Path, done: int, source: Any) -> None:
    runtime, params = build(options.inference)
    rows, k = options.data.batch_size, options.sampling.samples
    total = -(-len(source) // rows)
    progress = Progress(total, done // rows)
    resumed = f", continuing after question {done}" if done else ""
    progress.note(f"distill: {len(source)} questions of {options.data.source}, {k} answers each{resumed}; {workdir}")

    def tell(count: int) -> None:
        batch = -(-count // rows)
        if batch % max(1, total // 20) == 0 or batch == total:
            progress.show(batch, {})
        else:
            progress.tick(batch)

    generate(runtime, params, source, options, workdir, done, tell)
    progress.close()


def _judge(options: DistillOptions, workdir: Path, log: JudgeLog, questions: int) -> str | None:
    """Asks the judges; why that ended early, None where it did not."""
    progress = Progress(questions)
    progress.note(f"judging by {', '.join(options.judges.models)}")
    with (
        contextlib.closing(progress),
        Judges(options.judges, log, workdir, read_key(options.judges.api_key_env)) as judges,
    ):
        for done in ask_judges(workdir, options, log, judges):
            if done % max(1, questions // 20) == 0:
                progress.show(done, {})
            else:
                progress.tick(done)
    return None if judges.stopped == "interrupted" else judges.stopped
