"""Sampling: k answers to each question, in batches, into a log that a killed run resumes.

Sample g of question i is drawn with the key (seed, 0, 256 i + g): it depends on the settings, i and g alone, not on the
batch's size, on k, or on where a run was interrupted. Batches begin at multiples of their size also after a restart,
so that even the shapes that were compiled, and with them the last bits of floating point, are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.record import Record
from qwenla_jax.data.sources.factory import image_files
from qwenla_jax.distill.distill_options import MAX_SAMPLES, DistillOptions
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sample_batches import sample_batches
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.jsonl_store import Row


def sample_numbers(first: int, rows: int, samples: int) -> np.ndarray:
    """uint32 [rows * samples]: the numbers of a batch's samples, whose first question is number `first`."""
    numbers_QxG = np.arange(first, first + rows)[:, None] * MAX_SAMPLES + np.arange(samples)
    return numbers_QxG.reshape(-1).astype(np.uint32)


def done_questions(workdir: Path, options: DistillOptions, source: RecordSource) -> int:
    """Mends the log after a kill and cuts it back to whole batches.

    Returns:
      the questions that need no sampling any more.

    Raises:
      StoreError: the log holds another question than the source does.
    """
    path, k, rows = workdir / jsonl_store.SAMPLES, options.sampling.samples, options.data.batch_size
    jsonl_store.mend(path)
    last = None
    done = 0
    for group in jsonl_store.groups(path, k):
        last, done = group[0], done + 1
    if done > len(source):
        raise jsonl_store.StoreError(f"{path}: holds {done} questions, but the source has {len(source)} now")
    if last is not None:
        record = source[done - 1]
        if (record.id, record.question, record.answer) != (last["id"], last["question"], last["answer"]):
            raise jsonl_store.StoreError(
                f"{path}: question {done - 1} is {last['id']!r} there, but {record.id!r} in the source, or it or its "
                "answer was changed; sample a changed source into another workdir"
            )
    whole = done if done == len(source) else done // rows * rows
    if path.is_file():
        jsonl_store.keep_rows(path, whole * k)
    return whole


def image_namer(source: RecordSource, workdir: Path) -> Callable[[Record], str]:
    """Where a record's image is, relative to the run's folder; drawn images, and those inside of other files, are
    written there. Images in files of their own stay where they are.

    Raises (when called):
      ValueError: a record with no image or with several.
    """
    paths = {
        name: Path(os.path.relpath(path.absolute(), workdir.absolute())).as_posix()
        for name, path in image_files(source).items()
    }

    def place(record: Record) -> str:
        if len(record.images) != 1:
            raise ValueError(f"record {record.id!r} has {len(record.images)} images, expected 1")
        if record.id in paths:
            return paths[record.id]
        image = jsonl_store.image_name(record.id)
        if not (workdir / image).is_file():
            jsonl_store.write_image(workdir / image, record.images[0])
        return image

    return place


def sample_row(index: int, sample: int, record: Record, image: str, text: str, tokens: int, **more: Any) -> Row:
    """A line of the log of samples: sample number `sample` of question number `index`, `tokens` long."""
    question = {name: getattr(record, name) for name in ("id", "kind", "question", "answer")}
    options: Row = {"options": list(record.options)} if record.options else {}
    options |= {"columns": dict(record.columns)} if record.columns else {}
    options |= {} if record.system is None else {"system": record.system}
    numbers = {"index": index, "sample": sample}
    return numbers | question | {"image": image, "text": text, "tokens": tokens} | more | options


def generate(
    runtime: Runtime,
    params: Params,
    source: RecordSource,
    options: DistillOptions,
    workdir: Path,
    done: int,
    tell: Callable[[int], None],
) -> None:
    """Samples what is not in the log yet.

    Args:
      runtime, params: the model.
      source: the questions.
      options: the run's settings.
      workdir: the run's folder.
      done: questions to leave out, from `done_questions`.
      tell: called after each batch with the questions done.
    """
    drawing, rows = options.sampling, options.data.batch_size
    sampler = Sampler(runtime, runtime.sample_options(drawing.samples, drawing.temperature, drawing.top_p), rows)
    to_example = runtime.example(with_response=False)
    place = image_namer(source, workdir)
    starts = range(done, len(source), rows)
    batches = (
        (
            [to_example(source[i]) for i in range(first, min(first + rows, len(source)))],
            sample_numbers(first, rows, drawing.samples),
        )
        for first in starts
    )
    for first, batch in zip(starts, sample_batches(runtime, params, batches, sampler), strict=True):
        length_B, stopped_B = batch.rollout.length_B, batch.rollout.stopped_B
        lines = []
        jsonl_store.check_there(workdir)
        for number, record in enumerate(batch.records):
            image = place(record)
            for sample in range(drawing.samples):
                row = number * drawing.samples + sample
                text, tokens, stopped = batch.texts[row], int(length_B[row]), bool(stopped_B[row])
                lines.append(sample_row(first + number, sample, record, image, text, tokens, stopped=stopped))
        jsonl_store.append(workdir / jsonl_store.SAMPLES, lines)
        tell(first + len(batch.records))
