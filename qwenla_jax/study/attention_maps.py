"""Where on the image a model looks while it writes a word: attention by visual token (paper, figure 5)."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES
from qwenla_jax.evals.benchmarks.rendered_scenes import message
from qwenla_jax.inference.attention_mass import compiled_mass
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sample_batches import answer
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.tokenizer import Tokenizer

_NAMING = re.compile(rf"\b(?:{'|'.join((*COLORS, *SHAPES))})s?\b")
_BOX = re.compile(r"\\boxed\{")


@dataclasses.dataclass(frozen=True)
class KeyWord:
    """A word of a response at which one looks.

    Attributes:
      part: "caption", its first object's colour or shape; "last look", the last such word before the answer, or of
        all where there is none; "answer", the answer itself.
      start: index of its first character in the response.
      word: the text.
    """

    part: str
    start: int
    word: str


def key_words(response: str) -> tuple[KeyWord, ...]:
    """The key words of a response, in their order; those that it has.

    Paper silent on which tokens are key: here those that say what is seen, and what is concluded. A response without
    sections has its answer in a box, as `configs/base.py` teaches it.
    """
    sections = parse(response).sections
    caption = next((start for start, _ in message(response)), 0)
    conclusion = next((s.start + len("<CONCLUSION>") for s in sections if s.name == "CONCLUSION"), None)
    box = _BOX.search(response, conclusion or 0)
    conclusion = conclusion if box is None else box.end()
    result = []
    first = _NAMING.search(response, caption)
    if first:
        result.append(KeyWord("caption", first.start(), first[0]))
    last = list(_NAMING.finditer(response, caption, len(response) if conclusion is None else conclusion))
    if len(last) > 1:
        result.append(KeyWord("last look", last[-1].start(), last[-1][0]))
    if conclusion is not None:
        said = re.compile(r"[\w.\-]+").match(response, conclusion)
        if said:
            result.append(KeyWord("answer", conclusion, said[0]))
    return tuple(result)


def token_at(ids: Sequence[int], offset: int, tokenizer: Tokenizer) -> int:
    """Index of the token that writes the character at `offset` of the response's text."""
    length = lambda index: len(tokenizer.decode(list(ids[: index + 1])))  # noqa: E731
    return bisect.bisect_right(range(len(ids) - 1), offset, key=length)


def heat_maps(
    runtime: Runtime, params: Params, source: RecordSource, size: int, sampler: Sampler | None = None
) -> list[dict[str, Any]]:
    """Greedy answers to the first questions, with the attention on their images at their key words.

    The attention is that of the step that writes a word (the token before it is the query), the mean over layers and
    heads, on a visual token wherever it stands: in the prompt and in all insertions so far.

    `sampler` is a compiled greedy one with one response a question; None compiles it.

    Returns:
      by question `id`, `response`, `words`: `part`, `word`, `token` (its place in the response), `original` and
      `inserted`: rows x cols shares of the attention.

    Raises:
      ValueError: a question without an image, or with several.
    """
    mass = compiled_mass(runtime, runtime.reattention(), by_slot=True)
    example, result = runtime.example(with_response=False), []
    for batch in answer(runtime, params, source, size, sampler):
        r = batch.rollout
        for record in batch.records:
            if len(record.images) != 1:
                raise ValueError(f"record {record.id!r} has {len(record.images)} images; expected one to draw on")
        found = mass(params, batch.vision, batch.prompts, r.ids_BxR, r.length_B, r.selected_BxExX)
        for row, (record, text) in enumerate(zip(batch.records, batch.texts, strict=False)):
            ids = r.ids_BxR[row, : r.length_B[row]].tolist()
            frame = example(record).frames[0]
            image_P = batch.prompts.visual_QxP[row] >= 0
            words = []
            for key in key_words(text):
                token = token_at(ids, key.start, runtime.tokenizer)
                if token == 0:
                    continue  # the prompt's last token writes it, which is no token of the response
                line = {"part": key.part, "word": key.word, "token": token}
                for name, values_BxRxP in (("original", found.image_BxRxP), ("inserted", found.again_BxRxP)):
                    cells = values_BxRxP[row, token - 1, image_P].reshape(frame.rows, frame.cols)
                    line[name] = np.round(cells.astype(np.float64), 6).tolist()
                words.append(line)
            result.append({"id": record.id, "response": text, "words": words})
    return result
