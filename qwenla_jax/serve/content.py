"""What of an answer's text is content, and what is the reasoning before it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwenla_jax.text.answers.match import extract_conclusion
from qwenla_jax.text.special_tokens import TAGS
from qwenla_jax.text.token_text import TokenText
from qwenla_jax.text.tokenizer import Tokenizer

_OPENED, _CLOSED = "<CONCLUSION>", "</CONCLUSION>"
_OPENING = tuple(tag for tag in TAGS if not tag.startswith("</"))


class AnswerText:
    """The text of an answer as its tokens come.

    Attributes:
      ids: all tokens so far, the stop token included.
      text: what they say, up to the stop string; while the answer goes on, without what may become a part of one, and
        without a character that is cut in two.
      stopped: whether there was a stop string.
    """

    def __init__(self, tok: Tokenizer, stop: Sequence[str]) -> None:
        self._tok, self._stop = tok, stop
        self._tokens = TokenText(tok.token_bytes, tok.ids.stop())
        self._said = ""  # with what may become a part of a stop string
        self._longest = max(map(len, stop), default=0)
        self.ids: list[int] = []
        self.text, self.stopped = "", False

    def add(self, ids: Sequence[int], ended: bool) -> None:
        """Adds tokens."""
        self.ids += ids
        if self.stopped:
            return
        start = max(len(self._said) - self._longest, 0)
        self._said += self._tokens.add(ids, ended)
        ends = [at for at in (self._said.find(stop, start) for stop in self._stop) if at >= 0]
        self.stopped = bool(ends)
        if ends:
            self.text = self._said[: min(ends)]
        else:
            self.text = self._said if ended else _held(self._said, self._stop)

    def raw(self) -> str:
        """The text with whatever ended it."""
        return self._tok.decode(self.ids)


def whole_answer(text: str, form: str) -> tuple[str, str]:
    """(reasoning, content) of an answer that is complete.

    Args:
      text: the answer.
      form: see `ServeOptions.answer`.

    Returns:
      for "conclusion" the last complete conclusion as content, the same that rewards and scores take, and what stands
      before the first as reasoning; without one all of the text is content.
    """
    conclusion = extract_conclusion(text) if form != "sections" else None
    if not conclusion:
        return "", text
    return _formed(text.partition(_OPENED)[0].strip(), conclusion, form)


def answer_so_far(text: str, form: str, ended: bool) -> tuple[str, str]:
    """(reasoning, content) of an answer that is streamed: both only ever grow at their end.

    A text that does not begin with a section is content from its start. Else content is the first conclusion as it
    comes, or all of the text where the answer ends without one.

    Args:
      text: the answer so far.
      form: see `ServeOptions.answer`.
      ended: whether this is all of it.
    """
    start = text.lstrip()
    if form == "sections":
        return "", text
    if not start.startswith(_OPENING):
        undecided = not ended and any(tag.startswith(start) for tag in _OPENING)
        return "", "" if undecided else text
    before, opened, rest = text.partition(_OPENED)
    said, closed, _ = rest.partition(_CLOSED)
    if not ended and not opened:
        before = _held(before, (_OPENED,))
    if not ended and not closed:
        said = _held(said, (_CLOSED,))
    content = said.strip()
    if ended and not content:
        content = text
    return _formed(before.strip(), content, form)


def _formed(reasoning: str, content: str, form: str) -> tuple[str, str]:
    if form != "think" or not reasoning:
        return reasoning, content
    return "", f"<think>\n{reasoning}" + (f"\n</think>\n\n{content}" if content else "")


def _held(text: str, marks: Collection[str]) -> str:
    """The text without an end that could be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=0)
    for size in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return text[:-size]
    return text
