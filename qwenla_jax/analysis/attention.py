"""How much a model looks: attention on visual tokens through its responses, and what it says of another picture.

Everything is measured on the model's own greedy responses, run once more with the insertions they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.data.pipeline import RecordSource
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.train.logprobs import response_logprobs
from qwenla_jax.train.probe import AttentionMass, attention_mass
from qwenla_jax.train.rollout import texts_of
from qwenla_jax.train.runtime import Runtime
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch

PARTS = ("before", "in", "after")


class Answered(NamedTuple):
    """A batch with its greedy responses, on the host; rows behind the last question only fill the batch."""

    records: list[Any]
    vision: VisionBatch
    prompts: PromptBatch
    rollout: Rollout


def answer(runtime: Runtime, params: Params, source: RecordSource, size: int) -> Iterator[Answered]:
    """Greedy responses to the first `size` questions, batch by batch."""
    rows = runtime.options.eval.batch_size
    buckets, to_example = runtime.buckets(rows), runtime.example(with_response=False)
    sampler = runtime.sampler(runtime.sample_options(group_size=1, temperature=0.0))
    for start in range(0, min(size, len(source)), rows):
        records = [source[i] for i in range(start, min(start + rows, size, len(source)))]
        vision, prompts = runtime.collate_prompts([to_example(record) for record in records], buckets, rows)
        rollout = sampler(params, vision, prompts, 0, np.arange(rows, dtype=np.uint32))
        yield Answered(records, vision, prompts, jax.device_get(rollout))


def parts_of(ids_BxR: np.ndarray, length_B: np.ndarray, open_id: int, close_id: int) -> dict[str, np.ndarray]:
    """Where each response token stands: before the first reflection, in one (its tags included), or after the first.

    Returns:
      bool [B, R] for each of PARTS and for "all"; a response without a reflection is "before" throughout. The last
      token of a response is in none: it is never run.
    """
    run_BxR = np.arange(ids_BxR.shape[1]) < length_B[:, None] - 1
    opened_BxR = np.cumsum(ids_BxR == open_id, axis=1)
    closed_BxR = np.cumsum(ids_BxR == close_id, axis=1)
    inside_BxR = (opened_BxR > closed_BxR) | ((ids_BxR == close_id) & (opened_BxR >= closed_BxR) & (opened_BxR > 0))
    found = {"before": opened_BxR == 0, "in": inside_BxR, "after": (opened_BxR > 0) & ~inside_BxR}
    return {name: where & run_BxR for name, where in found.items()} | {"all": run_BxR}


def profile(mass: AttentionMass, parts: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means over the tokens of each part.

    Returns:
      part -> `tokens`, `original`, `inserted` (all insertions together), `visual` (both), `even` (what evenly spread
      attention would pay to both) and `ratio`, visual over even; a part without tokens is left out. The ratio is needed
      beside the mass: the mass also moves where the visual tokens merely become a smaller or larger share of all.
    """
    original = np.asarray(mass.original_BxR)
    inserted = np.asarray(mass.inserted_BxExR).sum(1)
    even = np.asarray(mass.even_original_BxR) + np.asarray(mass.even_inserted_BxExR).sum(1)
    found = {}
    for name, where in parts.items():
        if not where.any():
            continue
        mean = lambda x, where=where: float(x[where].mean())  # noqa: E731
        row = {"tokens": float(where.sum()), "original": mean(original), "inserted": mean(inserted), "even": mean(even)}
        row["visual"] = row["original"] + row["inserted"]
        found[name] = row | {"ratio": row["visual"] / row["even"]}
    return found


def compiled_mass(runtime: Runtime) -> Callable[..., AttentionMass]:
    """(params, vision, prompts, ids, lengths, kept) -> AttentionMass, compiled."""
    look = runtime.look()

    @jax.jit
    def run(params: Params, vision: Any, prompts: Any, ids: Any, lengths: Any, kept: Any) -> AttentionMass:
        return attention_mass(runtime.model, params, vision, prompts, ids, lengths, look, kept)

    def call(*args: Any) -> AttentionMass:
        with runtime.context():
            return jax.device_get(run(*args))

    return call


def look_profile(runtime: Runtime, params: Params, source: RecordSource, size: int, bins: int = 8) -> dict[str, Any]:
    """Attention on visual tokens in greedy responses (paper, figures 2 and 9).

    Args:
      runtime: the model with its way to look again.
      params: parameters.
      source: questions.
      size: how many.
      bins: equal bins of response positions, up to the longest response that may be.

    Returns:
      `parts`: see `profile`; `positions`: one such row a bin, with `first` and `last` position.
    """
    ids, run = runtime.tokenizer.ids, compiled_mass(runtime)
    masses, responses, lengths = [], [], []
    for batch in answer(runtime, params, source, size):
        r = batch.rollout
        masses.append(run(params, batch.vision, batch.prompts, r.ids_BxR, r.length_B, r.kept_BxExX))
        responses.append(r.ids_BxR)
        counted = np.arange(len(r.length_B)) < len(batch.records)
        lengths.append(np.where(counted, r.length_B, 0))
    whole = jax.tree.map(lambda *x: np.concatenate(x), *(m.replace(image_BxRxP=None) for m in masses))
    ids_BxR, length_B = np.concatenate(responses), np.concatenate(lengths)
    parts = parts_of(ids_BxR, length_B, ids.reflection_open, ids.reflection_close)
    edges = np.linspace(0, ids_BxR.shape[1], bins + 1).astype(int)
    rows = []
    for first, end in zip(edges, edges[1:], strict=False):
        here = np.zeros_like(parts["all"])
        here[:, first:end] = parts["all"][:, first:end]
        for row in profile(whole, {"here": here}).values():
            rows.append({"first": int(first), "last": int(end) - 1} | row)
    return {"parts": profile(whole, parts), "positions": rows}


def blind_probe(runtime: Runtime, params: Params, source: RecordSource, size: int) -> dict[str, float]:
    """What becomes of the model's answers when each question gets the picture of another.

    Returns:
      `logp_drop`: fall of the mean log-probability a token of its own greedy responses, in nats; `accuracy` and
      `accuracy_swapped`: of greedy answers with the right and with the wrong picture.

    Raises:
      ValueError: questions without a picture or with several.
    """
    rows = runtime.options.eval.batch_size
    look = runtime.look()

    @jax.jit
    def logprobs(params: Params, vision: Any, prompts: Any, ids: Any, lengths: Any, kept: Any) -> jax.Array:
        logp, _ = response_logprobs(
            runtime.model, params, vision, prompts, ids, runtime.bias_V, 1.0, look, lengths, kept
        )
        return jnp.where(jnp.arange(ids.shape[1]) < lengths[:, None], logp, 0.0)

    sampler = runtime.sampler(runtime.sample_options(group_size=1, temperature=0.0))
    drop, tokens, right, wrong, count = 0.0, 0, 0, 0, 0
    for batch in answer(runtime, params, source, size):
        n = len(batch.records)
        if len(batch.vision.patches_IxSxC) != rows:
            raise ValueError("pictures can be swapped only where every question has exactly one")
        shift = np.r_[np.roll(np.arange(n), 1), np.arange(n, rows)] if n > 1 else np.arange(rows)
        swapped = jax.tree.map(lambda x, shift=shift: np.asarray(x)[shift], batch.vision)
        r = batch.rollout
        with runtime.context():
            said = (batch.prompts, r.ids_BxR, r.length_B, r.kept_BxExX)
            own_BxR, other_BxR = (logprobs(params, vision, *said) for vision in (batch.vision, swapped))
            drop += float(np.asarray(own_BxR - other_BxR)[:n].sum())
        blind = jax.device_get(sampler(params, swapped, batch.prompts, 0, np.arange(rows, dtype=np.uint32)))
        tokens, count = tokens + int(r.length_B[:n].sum()), count + n
        for record, a, b in zip(
            batch.records, texts_of(r, runtime.tokenizer), texts_of(blind, runtime.tokenizer), strict=False
        ):
            right += accuracy_reward(a, record.answer) == 1.0
            wrong += accuracy_reward(b, record.answer) == 1.0
    return {"logp_drop": drop / tokens, "accuracy": right / count, "accuracy_swapped": wrong / count}
