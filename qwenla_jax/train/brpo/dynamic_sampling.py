"""Dynamic sampling: zero-std groups, whose rewards are all equal, are replaced by further questions (DAPO).

The further questions are a function of (seed, step, round), and the number of rounds one of the responses, so a
resumed run samples the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwenla_jax.data.batching.loader import RecordSource, batch_indices
from qwenla_jax.data.record import Record
from qwenla_jax.train.brpo.score import ScoredRollout
from qwenla_jax.types import Rollout

STREAM = 2**31  # added to the seed: these questions come in another order than the training's


@dataclasses.dataclass(frozen=True)
class SampledGroups:
    """Questions of one sampling with their responses: records, rollouts of all rows, scored rollout."""

    records: list[Record]
    rollout: Rollout
    scored: ScoredRollout


def further_records(source: RecordSource, seed: int, step: int, turn: int, rounds: int, number: int) -> list[Record]:
    """The questions of round `turn` (from 0) of a step that may take `rounds`."""
    return [source[int(i)] for i in batch_indices(seed + STREAM, step * rounds + turn, number, len(source))]


def fill(first: SampledGroups, draw: Callable[[int], SampledGroups], rounds: int) -> tuple[SampledGroups, int]:
    """Samples further questions until enough groups have rewards that differ, or the rounds are spent.

    Args:
      first: the step's own questions.
      draw: samples and scores those of a round.
      rounds: most further rounds.

    Returns:
      as many questions as at first: in the order of sampling those whose rewards differ, then, where they are too few,
      zero-std groups, which count in nothing; and the rounds taken.
    """
    groups = [first]
    wanted = len(first.records)
    useful = int((~first.scored.zero_std_Q).sum())
    while useful < wanted and len(groups) <= rounds:
        groups.append(draw(len(groups) - 1))
        useful += int((~groups[-1].scored.zero_std_Q).sum())
    if len(groups) == 1:
        return first, 0
    zero_std = np.concatenate([d.scored.zero_std_Q for d in groups])
    chosen_Q = np.argsort(zero_std, kind="stable")[:wanted]
    group = len(first.scored.texts) // wanted
    rows = (chosen_Q[:, None] * group + np.arange(group)).reshape(-1)
    records = [record for d in groups for record in d.records]
    return (
        SampledGroups(
            [records[i] for i in chosen_Q],
            jax.tree.map(lambda x: x[rows], join([d.rollout for d in groups])),
            _join_scored([d.scored for d in groups], chosen_Q, rows),
        ),
        len(groups) - 1,
    )


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts concatenated by row; X is padded to the widest."""
    widest = max(r.selected_BxExX.shape[2] for r in rollouts)
    padded = [dataclasses.replace(r, selected_BxExX=fit(r.selected_BxExX, widest)) for r in rollouts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *padded)


def fit(selected_BxExX: np.ndarray, slots: int) -> np.ndarray:
    """Cut or padded to `slots` slots X; slots that are cut off are padding."""
    selected_BxExX = np.asarray(selected_BxExX)[:, :, :slots]
    return np.pad(selected_BxExX, ((0, 0), (0, 0), (0, slots - selected_BxExX.shape[2])))


def _join_scored(scored: Sequence[ScoredRollout], chosen_Q: np.ndarray, rows: np.ndarray) -> ScoredRollout:
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(ScoredRollout):
        values = [getattr(v, field.name) for v in scored]
        if isinstance(values[0], list):
            whole = [item for value in values for item in value]
            joined[field.name] = [whole[row] for row in rows]
        else:
            joined[field.name] = np.concatenate(values)[chosen_Q if field.name == "zero_std_Q" else rows]
    return ScoredRollout(**joined)
