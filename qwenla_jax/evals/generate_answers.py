"""Answers of a model to a benchmark's questions, in a folder that a killed run resumes.

Batches are made of questions of similar size, the largest first, so that few shapes are compiled and what does not fit
into memory fails at once. They go to a log in that order; when all are there, the predictions are written in the
order of the questions. Batches are the same after a restart, and with them the last bits of floating point.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwenla_jax.config.schema import differences, to_dict
from qwenla_jax.data.batching.collate import Buckets, make_buckets
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.images.preprocess import smart_resize
from qwenla_jax.evals.generate_options import GenerateOptions, flags_of
from qwenla_jax.evals.prompts import prompt_of
from qwenla_jax.evals.registry import questions_of
from qwenla_jax.evals.table_files import some
from qwenla_jax.evals.task import Item, Questions, Settings
from qwenla_jax.inference.runtime import Runtime, build
from qwenla_jax.inference.sample_batches import sample_batches
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.text.conversation import build_prompt
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.compile_counter import CompileCounter
from qwenla_jax.utils.json_files import read_object

LOG = "answers.jsonl"
PREDICTIONS = "predictions.jsonl"
UNUSABLE = "unusable.jsonl"
SUMMARY = "generation.json"
_FREE = ("missing",)  # no answer depends on it
_WITH_IMAGES = ("chair", "pope", "mme", "mmhal")  # benchmarks whose every question is about an image


@dataclasses.dataclass(frozen=True)
class Measured:
    """A question that can be used.

    Attributes:
      index: its place among the questions.
      images: number of images.
      slots, visual: of the largest of them, in patch slots and visual tokens; 0 without one.
      prompt: tokens of the prompt.
    """

    index: int
    images: int
    slots: int
    visual: int
    prompt: int


Batch = tuple[Measured, ...]


def generate(
    options: GenerateOptions,
    gold: Sequence[Path],
    workdir: Path,
    settings: Settings | None = None,
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Answers what is not answered yet and writes `predictions.jsonl`.

    Args:
      options: of `make_options`, with the digests of `gold`.
      gold: the benchmark's files.
      workdir: the run's folder.
      settings: how questions are read.
      note: told what a person at the console should know.

    Returns:
      the counts of `generation.json`; they do not depend on interruptions.

    Raises:
      StoreError: the folder belongs to other settings or is in use, or its files were changed.
      FileNotFoundError, ValueError: files, settings or questions that cannot be used.
    """
    with jsonl_store.locked(workdir):
        saved = jsonl_store.read_settings(workdir)
        if saved is not None and (result := differences(saved, options, _FREE)):
            message = "\n".join(flags_of(line) for line in result)
            raise jsonl_store.StoreError(f"{workdir} belongs to other settings; take another workdir:\n{message}")
        if saved is None and any((workdir / name).exists() for name in (LOG, PREDICTIONS)):
            raise jsonl_store.StoreError(
                f"{workdir}: {jsonl_store.SETTINGS} is missing, so nobody knows what is answered there"
            )
        if saved is not None and all((workdir / name).is_file() for name in (PREDICTIONS, SUMMARY)):
            note(f"all questions are answered in {workdir}")
            return read_object(workdir / SUMMARY)
        items = asked_items(options, gold, settings)
        runtime, params = build(options.inference)
        usable, unusable = measure(runtime, options, items)
        for row in unusable[:20]:
            note(f"cannot be used: {row['id']}: {row['message']}")
        if unusable and options.missing == "refuse":
            raise ValueError(
                f"{len(unusable)} of {len(items)} questions cannot be used, such as {some(r['id'] for r in unusable)}: "
                f"{unusable[0]['message']}; missing=wrong counts them as wrong, missing=leave_out scores the others "
                "alone"
            )
        if not usable:
            raise ValueError("no question can be used; there is nothing to answer")
        buckets = buckets_of(runtime, options, usable)
        batches = make_batches(usable, buckets, options.batch_size)
        shapes = {shape_of(batch, buckets, options.batch_size) for batch in batches}
        jsonl_store.write_json(workdir / jsonl_store.SETTINGS, to_dict(options))
        done = done_batches(workdir / LOG, batches, items)
        note(
            f"{len(usable)} questions in {len(batches)} batches of {options.batch_size} and {len(shapes)} shapes"
            + (f", continuing after batch {done}" if done else "")
        )
        with CompileCounter() as compiled:
            _answer(runtime, params, options, items, batches, buckets, workdir / LOG, done, note)
        note(f"compiled {compiled.count} programs, {compiled.hits} of them from the cache, in {compiled.seconds:.1f} s")
        return _finish(workdir, items, usable, unusable, len(batches), len(shapes))


def asked_items(options: GenerateOptions, gold: Sequence[Path], settings: Settings | None = None) -> list[Item]:
    """The questions as they are asked. Raises as `registry.questions_of` does."""
    images = None if options.images is None else Path(options.images)
    items = questions_of(options.task, gold, settings, images).items[: options.size]
    return [dataclasses.replace(item, question=prompt_of(options.task, item, options.prompt)) for item in items]


def measure(
    runtime: Runtime, options: GenerateOptions, items: Sequence[Item]
) -> tuple[list[Measured], list[dict[str, str]]]:
    """Opens everything once: the size of each question, and {id, reason, message} of those that cannot be used."""
    source = Questions(items)
    usable, unusable = [], []
    for index, item in enumerate(items):
        try:
            if not item.question:
                raise _Unusable("empty_question", "it has no text; the questions' file lacks it")
            if not item.images and options.task in _WITH_IMAGES:
                raise _Unusable("no_image", "it has no image, and is about one; --images=FOLDER says where they are")
            usable.append(_measured(runtime, options, index, source))
        except ValueError as error:
            reason = getattr(error, "reason", "size")
            unusable.append({"id": item.id, "reason": str(reason), "message": str(error)})
    return usable, unusable


class _Unusable(ValueError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _measured(runtime: Runtime, options: GenerateOptions, index: int, source: Questions) -> Measured:
    record, own, layout = source[index], runtime.processor, runtime.layout
    grids = []
    for image in record.images:
        sides = smart_resize(image.height, image.width, layout.token_pixels, own.min_pixels, own.max_pixels)
        grids.append((sides[0] // layout.token_pixels, sides[1] // layout.token_pixels))
    counts = [rows * cols for rows, cols in grids]
    prompt = len(build_prompt(record.question, counts, runtime.tokenizer, options.system))
    if prompt > options.max_prompt_tokens:
        raise _Unusable(
            "too_long",
            f"the prompt has {prompt} tokens, {sum(counts)} of them visual; at most {options.max_prompt_tokens} may be "
            "(--max_prompt_tokens, or smaller images by --max_pixels)",
        )
    slots = max((layout.frame_slots(rows, cols) for rows, cols in grids), default=0)
    return Measured(index, len(grids), slots, max(counts, default=0), prompt)


def buckets_of(runtime: Runtime, options: GenerateOptions, usable: Sequence[Measured]) -> Buckets:
    """The shapes that batches may have: as in training, with room for as many images as a question has."""
    return make_buckets(
        runtime.layout,
        options.batch_size,
        runtime.processor.min_pixels,
        runtime.processor.max_pixels,
        options.max_prompt_tokens,
        options.max_prompt_tokens + options.max_response_tokens,
        max_images=max(1, *(one.images for one in usable)),
        shards=runtime.row_shards,
    )


def shape_of(batch: Sequence[Measured], buckets: Buckets, rows: int) -> tuple[int, int, int, int, bool]:
    """The buckets of frames, slots, visual tokens and prompt, and whether a row has several images."""
    return (
        buckets.fit_frames([one.images for one in batch], rows, "a batch"),
        buckets.fit("slots", max(one.slots for one in batch), "an image"),
        buckets.fit("visual", max(one.visual for one in batch), "an image"),
        buckets.fit("prompts", max(one.prompt for one in batch), "a prompt"),
        any(one.images > 1 for one in batch),
    )


def make_batches(usable: Sequence[Measured], buckets: Buckets, rows: int) -> list[Batch]:
    """Questions of similar size together, the largest first; the last batch may have fewer than `rows`."""

    def size(one: Measured) -> tuple[int, ...]:
        frames, slots, visual, prompt, several = shape_of((one,) * rows, buckets, rows)
        return -several, -frames, -visual, -slots, -prompt, one.index

    ordered = sorted(usable, key=size)
    return [tuple(ordered[first : first + rows]) for first in range(0, len(ordered), rows)]


def done_batches(path: Path, batches: Sequence[Batch], items: Sequence[Item]) -> int:
    """Mends the log after a kill, cuts it back to whole batches and returns how many these are.

    Raises:
      StoreError: the log holds another question than belongs there.
    """
    jsonl_store.mend(path)
    ids = [items[one.index].id for batch in batches for one in batch]
    lines = 0
    for number, row in jsonl_store.read_rows(path):
        if number > len(ids) or row.get("id") != ids[number - 1]:
            wanted = repr(ids[number - 1]) if number <= len(ids) else "no more lines"
            raise jsonl_store.StoreError(
                f"{path}:{number}: answers {row.get('id')!r}, expected {wanted}; the log or an image was changed"
            )
        lines = number
    done = whole = 0
    for batch in batches:
        if whole + len(batch) > lines:
            break
        done, whole = done + 1, whole + len(batch)
    if path.is_file():
        jsonl_store.keep_rows(path, whole)
    return done


def _answer(
    runtime: Runtime,
    params: Any,
    options: GenerateOptions,
    items: Sequence[Item],
    batches: Sequence[Batch],
    buckets: Buckets,
    log: Path,
    done: int,
    note: Callable[[str], None],
) -> None:
    rows, source = options.batch_size, Questions(items)
    sampler = Sampler(runtime, runtime.sample_options(1, options.temperature, options.top_p), rows, buckets)
    to_example = runtime.example(with_response=False)

    def inputs(batch: Batch) -> tuple[list[Example], np.ndarray]:
        # A sample's key goes by its question, so that neighbours do not matter.
        keys_B = np.zeros(rows, np.uint32)
        keys_B[: len(batch)] = [one.index for one in batch]
        return [to_example(source[one.index]) for one in batch], keys_B

    answered = sample_batches(runtime, params, map(inputs, batches[done:]), sampler)
    pairs = zip(batches[done:], answered, strict=True)
    bar = tqdm(pairs, total=len(batches), initial=done, unit="batch", leave=False, disable=None)  # on a terminal only
    for number, (batch, (_, _, _, rollout, texts)) in enumerate(bar, done):
        counted = (rollout.length_B, rollout.stopped_B, rollout.inserted_B, rollout.skipped_B)
        columns = zip(*(np.asarray(column).tolist() for column in counted), strict=True)
        lines = []
        for one, text, (tokens, stopped, inserted, skipped) in zip(batch, texts, columns, strict=False):
            item = items[one.index]
            line = {"id": item.id, "prediction": text, "tokens": tokens, "stopped": stopped}
            lines.append(line | {"inserted": inserted, "skipped": skipped, "kind": item.kind})
        jsonl_store.append(log, lines)
        if bar.disable and ((number + 1) % max(1, len(batches) // 20) == 0 or number + 1 == len(batches)):
            note(f"batch {number + 1} of {len(batches)}")


def _finish(
    workdir: Path,
    items: Sequence[Item],
    usable: Sequence[Measured],
    unusable: Sequence[dict[str, str]],
    batches: int,
    shapes: int,
) -> dict[str, Any]:
    """Writes predictions in the questions' order, and what was counted."""
    by_id = {row["id"]: row for _, row in jsonl_store.read_rows(workdir / LOG)}
    answered = [by_id[item.id] for item in items if item.id in by_id]
    summary = {
        "questions": len(items),
        "answered": len(answered),
        "unusable": len(unusable),
        **{f"unusable/{reason}": count for reason, count in sorted(Counter(r["reason"] for r in unusable).items())},
        "without_an_image": sum(not one.images for one in usable),
        "with_several_images": sum(one.images > 1 for one in usable),
        "cut_off_at_the_longest_length": sum(not row["stopped"] for row in answered),
        "tokens": sum(row["tokens"] for row in answered),
        "insertions": sum(row["inserted"] for row in answered),
        "reflections_without_insertion": sum(row["skipped"] for row in answered),
        "batches": batches,
        "shapes": shapes,
    }
    for name, rows in ((UNUSABLE, unusable), (PREDICTIONS, answered)):
        with jsonl_store.rewriting(workdir / name) as (file,):
            file.writelines(map(jsonl_store.line_of, rows))
    jsonl_store.write_json(workdir / SUMMARY, summary)
    return summary
