"""How much a model looks: attention on visual tokens through its responses, and what it says of another image.

Everything is measured on the model's own greedy responses, run once more with the insertions they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.inference.attention_mass import PARTS, AttentionMass, compiled_mass, parts_of, profile
from qwenla_jax.inference.responses import texts_of
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sample_batches import Answered, answer
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.train.logprobs import response_logprobs


def attention_profile(
    runtime: Runtime, params: Params, source: RecordSource, size: int, bins: int = 8
) -> dict[str, Any]:
    """Attention on visual tokens in greedy responses to `size` questions (paper, figures 2 and 9).

    `bins` are equal bins of response positions, up to the longest response that may be.

    Returns:
      `parts`: see `profile`; `positions`: one such row a bin, with `first` and `last` position.
    """
    return attention_sums(runtime, params, source, size, bins)[0]


def attention_sums(
    runtime: Runtime,
    params: Params,
    source: RecordSource,
    size: int,
    bins: int = 8,
    sampler: Sampler | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`attention_profile`, and what it is made of by question, for intervals.

    `sampler` is a compiled greedy one with one response a question; None compiles it.

    Returns:
      the profile; and `ids` of the questions, `edges` of the bins, and for `positions` (a row a question, a column a
      bin) and `parts` (PARTS in the columns) the sums over a question's tokens under `tokens` (their number),
      `original`, `inserted` and `even`, all lists.
    """
    ids, run = runtime.tokenizer.ids, compiled_mass(runtime, runtime.reattention())
    masses, responses, lengths, names = [], [], [], []
    for batch in answer(runtime, params, source, size, sampler):
        r = batch.rollout
        masses.append(run(params, batch.vision, batch.prompts, r.ids_BxR, r.length_B, r.selected_BxExX))
        responses.append(r.ids_BxR)
        counted = np.arange(len(r.length_B)) < len(batch.records)
        lengths.append(np.where(counted, r.length_B, 0))
        names += [record.id for record in batch.records]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *masses)
    ids_BxR, length_B = np.concatenate(responses), np.concatenate(lengths)
    parts = parts_of(ids_BxR, length_B, ids.reflection_open, ids.reflection_close)
    edges = np.linspace(0, ids_BxR.shape[1], bins + 1).astype(int)
    rows, here = [], []
    for first, end in zip(edges, edges[1:], strict=False):
        here.append(np.zeros_like(parts["all"]))
        here[-1][:, first:end] = parts["all"][:, first:end]
        for row in profile(whole, {"here": here[-1]}).values():
            rows.append({"first": int(first), "last": int(end) - 1} | row)
    by_question = {
        "ids": names,
        "edges": edges.tolist(),
        "positions": _sums(whole, here, length_B > 0),
        "parts": _sums(whole, [parts[name] for name in PARTS], length_B > 0),
    }
    return {"parts": profile(whole, parts), "positions": rows}, by_question


def _sums(mass: AttentionMass, where: Sequence[np.ndarray], asked_B: np.ndarray) -> dict[str, list[list[float]]]:
    """Sums over the tokens of each mask [B, R], a row for each row that answers a question."""
    values = {
        "tokens": np.ones_like(mass.original_BxR),
        "original": mass.original_BxR,
        "inserted": mass.inserted_BxExR.sum(1),
        "even": mass.even_original_BxR + mass.even_inserted_BxExR.sum(1),
    }
    sums = {name: np.stack([(x * w).sum(1) for w in where], axis=1)[asked_B] for name, x in values.items()}
    return {name: np.round(x.astype(np.float64), 6).tolist() for name, x in sums.items()}


def image_swap_probe(runtime: Runtime, params: Params, source: RecordSource, size: int) -> dict[str, float]:
    """What becomes of the model's answers when each question gets the image of another.

    Returns:
      `logp_drop`: fall of the mean log-probability a token of its own greedy responses, in nats; `accuracy` and
      `accuracy_swapped`: of greedy answers with the right and with the wrong image.

    Raises:
      ValueError: questions without an image, with several, or with images of different sizes.
    """
    rows = runtime.config.batch_size
    logprobs = _compiled_logprobs(runtime)
    sampler = Sampler(runtime, runtime.sample_options(group_size=1, temperature=0.0))
    blinded = Sampler(runtime, runtime.sample_options(group_size=1, temperature=0.0))
    drop, tokens, right, wrong, count = 0.0, 0, 0, 0, 0
    for batch in answer(runtime, params, source, size, sampler):
        n = len(batch.records)
        _require_one_image(batch)
        if n < 2:
            continue  # nothing to swap with
        swapped = jax.tree.map(lambda x, n=n: _rolled(x, n, 1), batch.vision)
        r = batch.rollout
        said = (batch.prompts, r.ids_BxR, r.length_B, r.selected_BxExX)
        own_BxR, other_BxR = (logprobs(params, vision, *said)[0] for vision in (batch.vision, swapped))
        counted_BxR = np.arange(own_BxR.shape[1]) < r.length_B[:n, None]
        drop += float(((own_BxR - other_BxR)[:n] * counted_BxR).sum())
        blind = blinded(params, swapped, batch.prompts, 0, np.arange(rows, dtype=np.uint32))
        tokens, count = tokens + int(r.length_B[:n].sum()), count + n
        for record, a, b in zip(batch.records, batch.texts, texts_of(blind, runtime.tokenizer), strict=False):
            right += accuracy_reward(a, record.answer, record.options) == 1.0
            wrong += accuracy_reward(b, record.answer, record.options) == 1.0
    return {"logp_drop": drop / tokens, "accuracy": right / count, "accuracy_swapped": wrong / count}


def theorem_numbers(
    runtime: Runtime, params: Params, source: RecordSource, size: int, swaps: int = 4, bins: int = 8
) -> dict[str, Any]:
    """The two sides of theorem 3.1 and the two ratios of theorem 3.2, on the model's own responses.

    Theorem 3.1 bounds I(y; c | x), what a response says of its image, by about r H(y | x, c), r = L_c / (L_x + L_c +
    L_y). Here by token: the information is log p(y_t | x, c, y_<t) less the logarithm of the mean of p(y_t | x, c',
    y_<t) over the own and `swaps` other images c' (an estimate, with responses sampled at temperature 1, and from
    above at log(1 + swaps)); the entropy is that of the distribution at t with the own image. Theorem 3.2 says that k
    more visual tokens make r' = (L_c + k) / (L_total + k) larger than r: r before and after each insertion.

    Args:
      swaps: other images that the mean runs over, at least 1 and below the batch size.
      bins: equal bins of response positions.

    Returns:
      `positions`: rows with `first`, `last`, `tokens`, `r`, `information`, `entropy`, `bound` = r x entropy, all means;
      `insertions`: `count`, `r_before`, `r_after`, `rose`; None where there was none.

    Raises:
      ValueError: `swaps` out of range, or questions whose images cannot be swapped for one another.
    """
    rows = runtime.config.batch_size
    if not 1 <= swaps < rows:
        raise ValueError(f"swaps: got {swaps}, expected 1 to {rows - 1} (the batch size less 1)")
    reattention, ids = runtime.reattention(), runtime.tokenizer.ids
    sampler = Sampler(runtime, runtime.sample_options(group_size=1, temperature=1.0))
    mass = compiled_mass(runtime, reattention)
    logprobs = _compiled_logprobs(runtime)
    sums: dict[str, list[np.ndarray]] = {"r": [], "information": [], "entropy": [], "bound": [], "counted": []}
    jumps: list[tuple[float, float]] = []
    for batch in answer(runtime, params, source, size, sampler):
        _require_one_image(batch)
        n, r = len(batch.records), batch.rollout
        if n <= swaps:
            continue  # too few to swap with
        said = (batch.prompts, r.ids_BxR, r.length_B, r.selected_BxExX)
        logp_BxR, entropy_BxR = logprobs(params, batch.vision, *said)
        likelihoods = [np.exp(logp_BxR)]
        for shift in range(1, swaps + 1):
            other = jax.tree.map(lambda x, n=n, shift=shift: _rolled(x, n, shift), batch.vision)
            likelihoods.append(np.exp(logprobs(params, other, *said)[0]))
        information_BxR = logp_BxR - np.log(np.mean(likelihoods, axis=0))
        seen = mass(params, batch.vision, *said)
        # What predicts token t is the token before it, so the share of visual tokens is the one seen from there.
        r_BxR = np.asarray(seen.even_original_BxR) + np.asarray(seen.even_inserted_BxExR).sum(1)
        counted_BxR = (np.arange(r_BxR.shape[1]) < r.length_B[:, None]) & (np.arange(rows) < n)[:, None]
        counted_BxR[:, 0] = False
        before_BxR = np.pad(r_BxR[:, :-1], [(0, 0), (1, 0)])
        values = (before_BxR, information_BxR, entropy_BxR, before_BxR * entropy_BxR, counted_BxR)
        for name, value in zip(sums, values, strict=True):
            sums[name].append(value)
        for row in range(n):
            tags = np.flatnonzero(r.ids_BxR[row] == ids.reflection_open)[: int(r.inserted_B[row])]
            jumps += [(float(r_BxR[row, t - 1]), float(r_BxR[row, t])) for t in tags if t]
    whole = {name: np.concatenate(value) for name, value in sums.items()}
    edges = np.linspace(0, whole["counted"].shape[1], bins + 1).astype(int)
    positions = []
    for first, end in zip(edges, edges[1:], strict=False):
        where = whole["counted"][:, first:end]
        if where.any():
            means = {name: float(whole[name][:, first:end][where].mean()) for name in sums if name != "counted"}
            positions.append({"first": int(first), "last": int(end) - 1, "tokens": float(where.sum())} | means)
    pairs = np.array(jumps)
    insertions = None
    if jumps:
        insertions = {
            "count": float(len(jumps)),
            "r_before": float(pairs[:, 0].mean()),
            "r_after": float(pairs[:, 1].mean()),
            "rose": float((pairs[:, 1] > pairs[:, 0]).sum()),
        }
    return {"positions": positions, "insertions": insertions}


def _compiled_logprobs(runtime: Runtime) -> Any:
    """(params, vision, prompts, ids, lengths, kept) -> log-probabilities and entropies [B, R] on the host."""
    reattention = runtime.reattention()

    @jax.jit
    def run(params: Params, vision: Any, prompts: Any, ids: Any, lengths: Any, kept: Any) -> Any:
        scored = vision, prompts, ids, runtime.logit_bias_V, 1.0, reattention, lengths, kept
        return response_logprobs(runtime.model, params, *scored)

    def call(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        with runtime.context():
            return jax.device_get(run(*args))

    return call


def _require_one_image(batch: Answered) -> None:
    for record in batch.records:
        if len(record.images) != 1:
            raise ValueError(f"record {record.id!r} has {len(record.images)} images; only one for one can be swapped")
    tokens = batch.prompts.visual_QxP[: len(batch.records)] >= 0
    if len(set(tokens.sum(1).tolist())) > 1:
        raise ValueError("the questions' images differ in visual tokens; only equal ones can be swapped")


def _rolled(x: np.ndarray, count: int, shift: int) -> np.ndarray:
    """The first `count` rows moved on by `shift`, the others as they are."""
    return np.asarray(x)[np.r_[np.roll(np.arange(count), shift), np.arange(count, len(x))]]
