"""Where on the image a model looks while it writes a word: attention by visual token (paper, figure 5)."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES
from qwenla_jax.evals.benchmarks.rendered_scenes import message
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sample_batches import answer
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.reattention.splice import embed_with_sources, splice
from qwenla_jax.sampling.prefill import encode_prompts, text_positions
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import PromptBatch, VisionBatch

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
    mass = jax.jit(lambda *args: _cells(runtime, *args))
    example, result = runtime.example(with_response=False), []
    for batch in answer(runtime, params, source, size, sampler):
        r = batch.rollout
        for record in batch.records:
            if len(record.images) != 1:
                raise ValueError(f"record {record.id!r} has {len(record.images)} images; expected one to draw on")
        with runtime.context():
            maps = jax.device_get(mass(params, batch.vision, batch.prompts, r.ids_BxR, r.length_B, r.selected_BxExX))
        for row, (record, text) in enumerate(zip(batch.records, batch.texts, strict=False)):
            ids = r.ids_BxR[row, : r.length_B[row]].tolist()
            frame = example(record).frames[0]
            grid = frame.rows, frame.cols
            words = []
            for key in key_words(text):
                token = token_at(ids, key.start, runtime.tokenizer)
                if token == 0:
                    continue  # the prompt's last token writes it, which is no token of the response
                line = {"part": key.part, "word": key.word, "token": token}
                for name, values_BxRxM in zip(("original", "inserted"), maps, strict=True):
                    cells = values_BxRxM[row, token - 1, : grid[0] * grid[1]].reshape(grid)
                    line[name] = np.round(cells.astype(np.float64), 6).tolist()
                words.append(line)
            result.append({"id": record.id, "response": text, "words": words})
    return result


def _cells(
    runtime: Runtime,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    length_B: jax.Array,
    selected_BxExX: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attention of response tokens on visual tokens by their place in the image: (original, inserted), both
    float32 [B, R, M], the mean over layers and heads; see `inference.attention_mass.attention_mass`, which sums over
    them.
    """
    model, reattention = runtime.model, runtime.reattention()
    B, R = ids_BxR.shape
    G = B // len(prompts.length_Q)
    M = vision.gather_IxM.shape[1]
    variables = {"params": params}
    _, prefix, prompt_QxPxD = encode_prompts(model, params, vision, prompts, reattention.content)
    one_hot = lambda index: jax.nn.one_hot(jnp.where(index >= 0, index % M, -1), M)  # noqa: E731
    visual_BxP = jnp.repeat(prompts.visual_QxP, G, axis=0)
    if reattention.inserts:
        tokens = splice(reattention, prompts, ids_BxR, length_B, selected_BxExX)
        pos, bias, slot_BxR = tokens.pos_BxTx3, tokens.bias_BxT, tokens.slot_BxR
        x = embed_with_sources(model, params, tokens.ids_BxT, tokens.source_BxT, prompt_QxPxD)
        # A token that is put in repeats a slot of the prompt, which says what part of the image it is.
        visual_BxT = jnp.take_along_axis(visual_BxP, jnp.maximum(tokens.source_BxT, 0), axis=1)
        cells_BxTxM = one_hot(visual_BxT) * tokens.shown_BxExT.any(1)[..., None]
    else:
        x, bias = model.apply(variables, ids_BxR, None, None, method="embed"), None
        pos = text_positions(jnp.repeat(prompts.next_pos_Q, G), R)
        slot_BxR = jnp.broadcast_to(jnp.arange(R), (B, R))
        cells_BxTxM = jnp.zeros((B, R, M))
    received = model.apply(variables, x, pos, prefix, None, bias, ("prefix", "new"), method="decode").received
    at_response = lambda x: jnp.take_along_axis(x, slot_BxR[..., None], axis=1)  # noqa: E731
    original = jnp.einsum("brp,bpm->brm", at_response(received["prefix"]), one_hot(visual_BxP))
    return original, jnp.einsum("brt,btm->brm", at_response(received["new"]), cells_BxTxM)
