"""The answers of a request in the form of chat completions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from qwenla_jax.sampling.recent_logprobs import TokenLogprob
from qwenla_jax.serve.content import AnswerText, answer_so_far, whole_answer
from qwenla_jax.serve.engine_loop import Part, Question, Served, insertion_summary, insertions_in_full
from qwenla_jax.serve.protocol import ChatRequest
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import Rollout

_CONCLUSION = "<CONCLUSION>"


class _Choice:
    """One of the answers."""

    def __init__(self, served: Served, chat: ChatRequest) -> None:
        self.text = AnswerText(served.tok, chat.stop)
        self.rollout: Rollout | None = None
        self.extras: dict[str, Any] = {}
        self.logprobs: list[dict[str, Any]] = []  # of the tokens before the stop token
        self.reported = 0  # of those, in parts of a stream
        self.sent: tuple[str, str] = ("", "")  # reasoning and content

    @property
    def reason(self) -> str | None:
        """finish_reason."""
        if self.rollout is None:
            return None
        return "stop" if self.text.stopped or self.rollout.stopped_B[0] else "length"


class ChatAnswer:
    """The answers of a request as they come.

    Args:
      chat: the request.
      served: the model.
      question: its answers on their way.
      form: see `ServeOptions.answer`.
    """

    def __init__(self, chat: ChatRequest, served: Served, question: Question, form: str) -> None:
        self.chat, self.question = chat, question
        self._served, self._form = served, form if chat.separate_reasoning else "sections"
        self._choices = [_Choice(served, chat) for _ in range(chat.n)]

    @property
    def ended(self) -> bool:
        """Whether all answers are complete."""
        return all(choice.rollout is not None for choice in self._choices)

    def measure(self, part: Part) -> None:
        """Finds the insertions of an answer that has ended in full; it takes a pass over the answer."""
        found = insertions_in_full(self._served, self.question, part)
        choice = self._choices[part.choice]
        choice.extras["reattention"] = {"insertions": [insertion.to_dict() for insertion in found]}

    def add(self, part: Part) -> None:
        """Adds what an answer got."""
        choice = self._choices[part.choice]
        choice.text.add(part.ids, part.rollout is not None)
        if part.logprobs is not None:
            choice.logprobs += self._logprobs(part.ids, part.logprobs)
        choice.rollout = part.rollout
        if part.rollout is None:
            return
        text = choice.text.text
        if "reattention" in choice.extras:
            choice.extras["reattention"] |= {"text": text, "skipped": int(part.rollout.skipped_B[0])}
        choice.extras["sections"] = [dataclasses.asdict(section) for section in parse(text).sections]
        choice.extras["insertions"] = insertion_summary(self._served, self.question, part, self.chat.return_selection)

    def choices(self) -> list[dict[str, Any]]:
        """All answers, complete."""
        result = []
        for number, choice in enumerate(self._choices):
            reasoning, content = whole_answer(choice.text.text, self._form)
            message = {"role": "assistant", "content": content or choice.text.raw(), "refusal": None}
            message |= _reasoning(reasoning or None) | choice.extras
            logprobs = _content(choice.logprobs) if self.chat.logprobs else None
            answer = {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}
            result.append(answer | self._tokens(choice))
        return result

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for number in range(self.chat.n):
            yield _chunk(number, {"role": "assistant", "content": ""})

    def chunks(self, number: int) -> Iterator[dict[str, Any]]:
        """What is new of one answer. The first has the log-probabilities of all tokens since those before."""
        choice = self._choices[number]
        ended = choice.rollout is not None
        now = answer_so_far(choice.text.text, self._form, ended)
        if ended and not now[1]:
            now = now[0], choice.text.raw()
        reasoning, content = (new[len(old) :] for new, old in zip(now, choice.sent, strict=True))
        choice.sent = now
        chunks = []
        if reasoning:
            chunks.append(_chunk(number, _reasoning(reasoning)))
        if content:
            chunks.append(_chunk(number, {"content": content}))
        if ended:
            chunks.append(_chunk(number, choice.extras, choice.reason) | self._tokens(choice))
        if chunks and choice.reported < len(choice.logprobs):
            chunks[0]["logprobs"] = _content(choice.logprobs[choice.reported :])
            choice.reported = len(choice.logprobs)
        yield from chunks

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt and of all answers; inserted tokens do not count."""
        prompt, answered = len(self.question.example.ids_T), sum(self.lengths())
        tag = self._served.tok.ids.tags[_CONCLUSION]
        reasoning = 0
        for choice in self._choices:
            ids = choice.text.ids
            if self._form != "sections" and tag in ids and whole_answer(choice.text.text, "conclusion")[0]:
                reasoning += ids.index(tag)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def lengths(self) -> list[int]:
        """Tokens of each answer, the stop token included."""
        return [len(choice.text.ids) for choice in self._choices]

    def reasons(self) -> list[str]:
        """The finish_reason of each answer that has ended."""
        return [choice.reason for choice in self._choices if choice.reason is not None]

    def insertions(self) -> tuple[int, int]:
        """Insertions and skipped insertions of all answers that have ended."""
        ended = [choice.rollout for choice in self._choices if choice.rollout is not None]
        return sum(int(one.inserted_B[0]) for one in ended), sum(int(one.skipped_B[0]) for one in ended)

    def _tokens(self, choice: _Choice) -> dict[str, Any]:
        # vLLM's name and place. Its streams give them by parts, whose concatenation is the same.
        return {"token_ids": list(choice.text.ids)} if self.chat.return_token_ids else {}

    def _logprobs(self, ids: list[int], logprobs: list[TokenLogprob]) -> Iterator[dict[str, Any]]:
        """Of tokens up to a stop token, which has none."""
        tok = self._served.tok
        for i, token in zip(ids, logprobs, strict=True):
            if i in tok.ids.stop():
                return
            top = [_token(tok, other, logprob) for other, logprob in token.top]
            yield _token(tok, i, token.logprob) | {"top_logprobs": top}


def _token(tok: Tokenizer, index: int, logprob: float) -> dict[str, Any]:
    text, data = _texts(tok, index)
    return {"token": text, "logprob": logprob, "bytes": list(data)}


@functools.lru_cache(maxsize=2**18)  # every token of the vocabulary comes again and again
def _texts(tok: Tokenizer, index: int) -> tuple[str, bytes]:
    return tok.decode([index]), tok.token_bytes(index)


def _content(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": logprobs, "refusal": None}


def _reasoning(text: str | None) -> dict[str, Any]:
    """Under both names that clients know: vLLM's and SGLang's."""
    return {"reasoning": text, "reasoning_content": text}


def _chunk(number: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
