"""Greedy answers to held-out questions, counted with intervals."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.inference.attention_mass import compiled_mass, parts_of, profile
from qwenla_jax.inference.sample_batches import answer
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.train.train_runtime import TrainRuntime
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch
from qwenla_jax.utils import json_files
from qwenla_jax.utils.atomic_files import write_text
from qwenla_jax.utils.intervals import Interval, wilson


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers to the first questions of a source, in its order.

    Attributes:
      ids, kinds: of the questions.
      right: whether the conclusion was the right answer.
      well_formed: whether the response is in the answer format.
      lengths: tokens of the responses, stop token included.
      responses: the texts.
      inserted, skipped: insertions of each response, and skipped ones (`types.Rollout`).
      attention: metrics of an `AttentionProbe`; empty without one.
    """

    ids: list[str]
    kinds: list[str]
    right: list[bool]
    well_formed: list[bool]
    lengths: list[int]
    responses: list[str] = dataclasses.field(default_factory=list)
    inserted: list[int] = dataclasses.field(default_factory=list)
    skipped: list[int] = dataclasses.field(default_factory=list)
    attention: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> Interval:
        """Share of right answers with its 95% interval."""
        return wilson(sum(self.right), len(self.right))

    def by_kind(self) -> dict[str, Interval]:
        """The same by question type, types in alphabetical order."""
        groups = collections.defaultdict(list)
        for kind, right in zip(self.kinds, self.right, strict=True):
            groups[kind].append(right)
        return {kind: wilson(sum(groups[kind]), len(groups[kind])) for kind in sorted(groups)}

    def metrics(self) -> dict[str, float]:
        """Metrics under `eval/`: accuracy with its interval's ends, by question type, format, mean length."""
        whole = self.accuracy
        by_kind = {f"eval/accuracy/{kind}": part.share for kind, part in self.by_kind().items()}
        return {
            "eval/accuracy": whole.share,
            "eval/accuracy_low": whole.low,
            "eval/accuracy_high": whole.high,
            "eval/format": float(np.mean(self.well_formed)),
            "eval/completions/mean_length": float(np.mean(self.lengths)),
            "eval/size": float(len(self.right)),
            "eval/reattention/inserted_mean": float(np.mean(self.inserted)),
            **by_kind,
            **{f"eval/{name}": value for name, value in self.attention.items()},
        }

    def write(self, path: Path) -> None:
        """Saves it as JSON, whole or not at all. Raises OSError where the run's folder is gone."""
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """The evaluation that `write` saved.

        Raises:
          ValueError: `write` did not write this file.
          OSError: it cannot be read.
        """
        content = json_files.read_object(path)
        kinds = {"ids": str, "kinds": str, "right": bool, "well_formed": bool, "lengths": int, "responses": str}
        kinds |= {"inserted": int, "skipped": int}
        names = {field.name for field in dataclasses.fields(cls)}
        lists = [content.get(name, []) for name in kinds]
        typed = all(
            isinstance(values, list) and all(type(value) is kind for value in values)
            for values, kind in zip(lists, kinds.values(), strict=True)
        )
        # Fields that later versions added may be absent.
        if not typed or not set(content) <= names or len({len(values) for values in lists if values}) > 1:
            raise ValueError(f"{path}: not an evaluation that a run has written")
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path}: not an evaluation that a run has written: {error}") from error


class AttentionProbe:
    """Attention on visual tokens in the responses of one batch, the same batch at every evaluation."""

    def __init__(self, runtime: TrainRuntime) -> None:
        self._mass = compiled_mass(runtime, runtime.reattention())
        self._ids = runtime.tokenizer.ids

    def __call__(
        self, params: Params, vision: VisionBatch, prompts: PromptBatch, rollout: Rollout, counted: int
    ) -> dict[str, float]:
        """Mass and its ratio to evenly spread attention, by part of the response (`attention_mass.profile`).

        Args:
          params, vision, prompts, rollout: a batch with one response a question.
          counted: the first so many rows; the others only fill the batch.
        """
        mass = self._mass(params, vision, prompts, rollout.ids_BxR, rollout.length_B, rollout.selected_BxExX)
        ids_BxR, length_B = np.asarray(rollout.ids_BxR), np.array(rollout.length_B)
        length_B[counted:] = 0
        parts = parts_of(ids_BxR, length_B, self._ids.reflection_open, self._ids.reflection_close)
        metrics = {}
        for part, row in profile(mass, parts).items():
            metrics |= {f"visual/attn_mass/{part}": row["visual"], f"visual/attn_ratio/{part}": row["ratio"]}
        return metrics


def evaluate(
    runtime: TrainRuntime,
    sampler: Sampler,
    params: Params,
    source: RecordSource,
    size: int,
    probe: AttentionProbe | None = None,
    check_stop: Callable[[str], None] = lambda doing: None,
) -> Evaluation:
    """Answers the first `size` questions of a source (all, where it has fewer).

    Args:
      runtime: the run.
      sampler: a greedy one with one response a question.
      params: parameters.
      source: held-out questions.
      size: how many.
      probe: measures attention on the first batch, where given.
      check_stop: called after every batch; may raise to end the evaluation.
    """
    out = Evaluation([], [], [], [], [])
    match = runtime.options.rewards.match  # without algebra, which only the rewards' processes can end
    for batch in answer(runtime, params, source, size, sampler):
        records, rollout = batch.records, batch.rollout
        if probe is not None and not out.ids:
            out.attention.update(probe(params, batch.vision, batch.prompts, rollout, len(records)))
        counts = np.stack([rollout.length_B, rollout.inserted_B, rollout.skipped_B], axis=1).tolist()
        # Rows after the last record only fill the batch.
        for record, text, (length, inserted, skipped) in zip(records, batch.texts, counts, strict=False):
            out.ids.append(record.id)
            out.kinds.append(record.kind)
            out.right.append(accuracy_reward(text, record.answer, record.options, match=match) == 1.0)
            out.well_formed.append(format_reward(text) == 1.0)
            out.lengths.append(length)
            out.responses.append(text)
            out.inserted.append(inserted)
            out.skipped.append(skipped)
        check_stop("evaluation")
    return out
