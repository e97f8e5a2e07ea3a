"""The input of a reward: the documented record that users' own rewards are called with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RewardRecord:
    """One response with everything that a reward may use: text and numbers, never the model.

    A user's reward is a function `def reward(record: RewardRecord) -> float`.

    Attributes:
      id: the question's id in its source.
      question: the question as the source has it, without the chat template.
      answer: the right answer.
      kind: the question's type as its source names it, "" where it has none.
      response: the generated text without the stop token that ended it; any string. Control tokens inside it are text.
      reflection_tokens: number of generated tokens in each reflection, its tags excluded, in the order of
        `text.response_format.parse(response).reflections`. Encoding the text again may give another number.
      num_tokens: number of tokens in the response, the stop token included.
      finished: True where a stop token ended the response, False where it was cut off at the limit.
      options: the texts of options A, B, C, ... where the question has them.
      columns: what else the question's line has in its file, as JSON values; see `data.record.Record`.
    """

    id: str
    question: str
    answer: str
    kind: str
    response: str
    reflection_tokens: tuple[int, ...]
    num_tokens: int
    finished: bool
    options: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
