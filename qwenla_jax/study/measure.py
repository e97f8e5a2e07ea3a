"""One system's answers to fresh scenes: judged, counted and timed, a line an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.evals.benchmarks.rendered_scenes import judge_answer, said_details, said_objects, summarise
from qwenla_jax.inference.responses import responses_of
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sample_batches import answer
from qwenla_jax.inference.sampler import Asked, Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.study.attention_maps import token_at
from qwenla_jax.text.token_counts import reflection_tokens
from qwenla_jax.utils.intervals import wilson

TIMED = 8  # batches of a system


def batch_seconds(params: Params, sampler: Sampler, asked: Sequence[Asked]) -> list[float]:
    """How long each of some batches takes, compilation left out.

    The first is sampled once for nothing, then each twice, and the shorter time counts: what else a machine does only
    ever adds.
    """
    sampler(params, *asked[0][:4])
    seconds = []
    for batch in asked:
        took = []
        for _ in range(2):
            begin = time.perf_counter()
            sampler(params, *batch[:4])
            took.append(time.perf_counter() - begin)
        seconds.append(min(took))
    return seconds


def score(
    runtime: Runtime, params: Params, source: SceneSource, sampler: Sampler
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy answers to all of a source's questions, judged.

    Args:
      runtime, params: the system.
      source: held-out scenes.
      sampler: a greedy one with one response a question.

    Returns:
      scores as `rendered_scenes.summarise` has them, with `accuracy_interval` (Wilson, 95%), `inserted` and `skipped`,
      means a response, and `timing`: `rows` of a batch, `batch_s`, the wall time of each full one among the first
      `TIMED`; and a line an answer: question and response, `right`, `tokens` (of the response with its stop token),
      `reflection_tokens` (tags excluded), `inserted_tokens` (slots that insertions put in: visual tokens and their
      delimiters), `named`, `invented` and `missed` objects, and `objects`, [token, right] for each that is named: the
      place in the response of the token that ends it, from 0, and whether it is there, `details` and `wrong_details`
      (`said_details`).
    """
    judged, lines = [], []
    timed: list[Asked] = []
    tok, rows = runtime.tokenizer, runtime.config.batch_size
    for batch in answer(runtime, params, source, len(source), sampler):
        r = batch.rollout
        if len(batch.records) == rows and len(timed) < TIMED:
            timed.append(Asked(batch.vision, batch.prompts, 0, np.arange(rows, dtype=np.uint32)))
        inserted_tokens_B = np.asarray(r.selected_BxExX).sum((1, 2)).tolist()
        for row, (record, said_ids) in enumerate(zip(batch.records, responses_of(r), strict=False)):
            text = batch.texts[row]
            caption = source.caption(len(lines))
            one = judge_answer(text, record.answer, record.kind, caption)
            ids = r.ids_BxR[row, : r.length_B[row]].tolist()
            said = said_objects(text, caption)
            details, wrong_details = said_details(text, source.details(len(lines)))
            judged.append(one)
            lines.append(
                {"id": record.id, "question": record.question, "answer": record.answer, "response": text}
                | {"kind": record.kind, "right": one.right, "well_formed": one.well_formed}
                | {"inserted": int(r.inserted_B[row]), "skipped": int(r.skipped_B[row])}
                | {"tokens": len(ids), "inserted_tokens": inserted_tokens_B[row], "reflections": one.reflections}
                | {"reflection_tokens": sum(reflection_tokens(said_ids, tok))}
                | {"named": one.named, "invented": one.invented, "missed": one.missed}
                | {"details": details, "wrong_details": wrong_details}
                | {"objects": [[token_at(ids, thing.end - 1, tok), thing.right] for thing in said]}
            )
    scores: dict[str, Any] = summarise(judged)
    right = sum(one.right for one in judged)
    scores["accuracy_interval"] = list(wilson(right, len(judged))[1:])
    scores["inserted"] = sum(line["inserted"] for line in lines) / len(lines)
    scores["skipped"] = sum(line["skipped"] for line in lines) / len(lines)
    scores["timing"] = {"rows": rows, "batch_s": batch_seconds(params, sampler, timed) if timed else []}
    return scores, lines
