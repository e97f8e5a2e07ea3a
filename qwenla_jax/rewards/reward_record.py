"""The input of a reward: the documented record that users' own rewards are called with."""

import json
from dataclasses import dataclass, fields
from typing import Any

from qwenla_jax.utils import json_files


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

    def to_json(self) -> str:
        """The record as one line of JSON.

        Every string comes back as it was. A lone surrogate is not escaped, because two adjacent escaped ones would
        come back as one character; so encode the line with `errors="surrogatepass"`.
        """
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "RewardRecord":
        """The record that `to_json` wrote.

        Raises:
          ValueError: the line is not such a record; the message names the field.
        """
        values = json_files.loads(line, "reward record")
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"reward record: got {got}; want an object of {', '.join(names)}")
        for name in ("id", "question", "answer", "kind", "response"):
            _check(name, values[name], str)
        _check("num_tokens", values["num_tokens"], int)
        _check("finished", values["finished"], bool)
        _check("reflection_tokens", values["reflection_tokens"], list)
        for count in values["reflection_tokens"]:
            _check("reflection_tokens", count, int)
        _check("options", values["options"], list)
        for text in values["options"]:
            _check("options", text, str)
        lists = {name: tuple(values[name]) for name in ("reflection_tokens", "options")}
        return cls(**{**values, **lists})


def _check(name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"reward record, {name}: got {type(value).__name__}; want {kind.__name__}")
