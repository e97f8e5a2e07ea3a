"""Greedy answers to held-out questions, counted with intervals."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np

from qwenla_jax.data.pipeline import RecordSource
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.train.intervals import Interval, wilson
from qwenla_jax.train.rollout import texts_of
from qwenla_jax.train.runtime import Runtime, Sampler


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers to the first questions of a source, in its order.

    Attributes:
      ids, kinds: of the questions.
      right: whether the conclusion was the right answer.
      well_formed: whether the response kept the format.
      lengths: tokens of the responses, stop token included.
      responses: the texts.
      inserted, refused: times that a response looked at its pictures again, and that it would have but for the cap.
    """

    ids: list[str]
    kinds: list[str]
    right: list[bool]
    well_formed: list[bool]
    lengths: list[int]
    responses: list[str]
    inserted: list[int]
    refused: list[int]

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
        """Under `eval/`: accuracy with its interval's ends, by question type, format, mean length."""
        whole = self.accuracy
        found = {f"eval/accuracy/{kind}": part.share for kind, part in self.by_kind().items()}
        return {
            "eval/accuracy": whole.share,
            "eval/accuracy_low": whole.low,
            "eval/accuracy_high": whole.high,
            "eval/format": float(np.mean(self.well_formed)),
            "eval/completions/mean_length": float(np.mean(self.lengths)),
            "eval/size": float(len(self.right)),
            "eval/reattention/inserted_mean": float(np.mean(self.inserted)),
            **found,
        }

    def write(self, path: Path) -> None:
        """Saves it as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """What `write` saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def evaluate(runtime: Runtime, sampler: Sampler, params: Params, source: RecordSource, size: int) -> Evaluation:
    """Answers the first `size` questions of a source (all, where it has fewer).

    Args:
      runtime: the run.
      sampler: a greedy one with one response a question.
      params: parameters.
      source: held-out questions.
      size: how many.
    """
    rows = runtime.options.eval.batch_size
    buckets = runtime.buckets(rows)
    to_example = runtime.example(with_response=False)
    total = min(size, len(source))
    out = Evaluation([], [], [], [], [], [], [], [])
    for start in range(0, total, rows):
        examples = [to_example(source[i]) for i in range(start, min(start + rows, total))]
        vision, prompts = runtime.collate_prompts(examples, buckets, rows)
        rollout = sampler(params, vision, prompts, 0, np.arange(rows, dtype=np.uint32))
        counts = np.stack([rollout.length_B, rollout.inserted_B, rollout.refused_B], axis=1).tolist()
        # Rows behind the last example only fill the batch.
        for example, text, (length, inserted, refused) in zip(
            examples, texts_of(rollout, runtime.tokenizer), counts, strict=False
        ):
            out.ids.append(example.record.id)
            out.kinds.append(example.record.kind)
            out.right.append(accuracy_reward(text, example.record.answer) == 1.0)
            out.well_formed.append(format_reward(text) == 1.0)
            out.lengths.append(length)
            out.responses.append(text)
            out.inserted.append(inserted)
            out.refused.append(refused)
    return out
