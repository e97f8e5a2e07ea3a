"""Attention of an answer on its images: `/v1/reattention/attention`."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenla_jax.data.batching.collate import collate_prompts
from qwenla_jax.data.batching.example import Example
from qwenla_jax.inference.response_attention import insertions_of, selected_slots
from qwenla_jax.serve.chat_prompt import to_example
from qwenla_jax.serve.engine_loop import Served, block_of, run_again
from qwenla_jax.serve.protocol import invalid, parse_body
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.text.token_text import TokenText
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """The body of a request, checked as far as it can be without the model.

    Attributes:
      model: the name that it asked for.
      messages: of the question, not checked yet.
      token_ids: the answer's.
      cells: for each insertion the cells that it shows of each image, a set of (row, column).
    """

    model: str
    messages: list[Any]
    token_ids: list[int]
    cells: list[list[set[tuple[int, int]]]]


def parse_attention(data: bytes, options: ServeOptions) -> AttentionRequest:
    """Checks a body. Raises ApiError: 404 for an unknown model, else 400; it names the field."""
    body, model, messages = parse_body(data, options)
    ids, insertions = body.get("token_ids"), body.get("insertions", [])
    if not isinstance(ids, list) or not ids or not all(_whole(i) for i in ids):
        raise invalid("token_ids", "expected the tokens of the answer, as return_token_ids gives them")
    if not isinstance(insertions, list) or len(insertions) > options.max_insertions:
        raise invalid("insertions", f"expected a list of at most {options.max_insertions}")
    return AttentionRequest(model, messages, ids, [_cells(one, f"insertions[{n}]") for n, one in enumerate(insertions)])


def _cells(insertion: Any, where: str) -> list[set[tuple[int, int]]]:
    images = insertion.get("images") if isinstance(insertion, dict) else None
    selected = [one.get("selected") if isinstance(one, dict) else None for one in images or ()]
    pair = lambda cell: isinstance(cell, list) and len(cell) == 2 and all(map(_whole, cell))  # noqa: E731
    if not isinstance(images, list) or not all(isinstance(cells, list) and all(map(pair, cells)) for cells in selected):
        message = 'expected {"images": [{"selected": [[row, column], ...]}, ...]}, as return_selection gives it'
        raise invalid(where, message)
    return [{(row, col) for row, col in cells} for cells in selected if cells is not None]


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def attention_answer(request: AttentionRequest, served: Served, max_images: int) -> dict[str, Any]:
    """Runs the answer once more.

    Args:
      request: see there.
      served: the model.
      max_images: of a request.

    Returns:
      the body of the answer; see docs/serving.md.

    Raises:
      ApiError: 400; it names the field.
    """
    tok, ids = served.tok, request.token_ids
    most = served.buckets.prompts[-1]
    example = to_example(request.messages, tok, served.processor, served.layout, max_images, most)
    length = len(example.ids_T) + len(ids)
    if length > most:
        message = f"prompt and answer have {length} tokens, at most {most}"
        raise invalid("token_ids", message, "context_length_exceeded")
    if max(ids) >= tok.vocab_size:
        raise invalid("token_ids", f"{max(ids)} is no token of the model; expected numbers below {tok.vocab_size}")
    tags = ids[:-1].count(tok.ids.reflection_open)
    if len(request.cells) > tags:
        message = f"{len(request.cells)} insertions, but only {tags} <REFLECTION> with a token after it"
        raise invalid("insertions", message)
    for number, cells in enumerate(request.cells):
        _check_cells(cells, example, f"insertions[{number}]")
    try:
        vision, prompts = collate_prompts([example], served.buckets, 1, block_of(served))
    except ValueError as error:
        raise invalid("messages", str(error)) from error
    selected = [selected_slots(cells, vision, prompts, example) for cells in request.cells]
    one = np.ones(1, np.int32)
    rollout = Rollout(
        ids_BxR=np.array([ids], np.int32),
        logp_BxR=np.zeros((1, len(ids)), np.float32),
        length_B=one * len(ids),
        stopped_B=one > 0,
        inserted_B=one * len(selected),
        skipped_B=one * 0,
        selected_BxExX=np.array([selected], bool),
    )
    attention = run_again(served, vision, prompts, rollout)
    insertions = insertions_of(attention, tok, vision, prompts, rollout, example)
    image_P = prompts.visual_QxP[0] >= 0
    ends = np.cumsum([frame.num_visual_tokens for frame in example.frames])
    by_image = lambda values_RxP: np.split(values_RxP[:, image_P], ends[:-1], axis=1)  # noqa: E731
    original, inserted = by_image(attention.original_RxP), by_image(attention.inserted_RxP)
    return {
        "object": "reattention.attention",
        "model": request.model,
        "tokens": token_texts(ids, tok),
        "original": _rounded(attention.original_R),
        "inserted": _rounded(attention.inserted_R),
        "even_original": _rounded(attention.even_original_R),
        "even_inserted": _rounded(attention.even_inserted_R),
        "images": [
            {
                "image": number,
                "rows": frame.rows,
                "cols": frame.cols,
                "original": _packed(original[number]),
                "inserted": _packed(inserted[number]),
            }
            for number, frame in enumerate(example.frames)
        ],
        "insertions": [insertion.to_dict() for insertion in insertions],
    }


def _check_cells(cells: Sequence[set[tuple[int, int]]], example: Example, where: str) -> None:
    if len(cells) != len(example.frames):
        raise invalid(f"{where}.images", f"{len(cells)} images, but the messages have {len(example.frames)}")
    for number, (image_cells, frame) in enumerate(zip(cells, example.frames, strict=True)):
        for row, col in image_cells:
            if row >= frame.rows or col >= frame.cols:
                message = f"[{row}, {col}] is outside of the {frame.rows} x {frame.cols} visual tokens"
                raise invalid(f"{where}.images[{number}].selected", message)


def token_texts(ids: Sequence[int], tok: Tokenizer) -> list[str]:
    """The text of each token; joined they are the answer's text.

    Stop tokens have none. A character that several tokens make is the last one's.
    """
    text = TokenText(tok.token_bytes, tok.ids.stop())
    return [text.add([token], ended=at == len(ids)) for at, token in enumerate(ids, 1)]


def _rounded(values_R: np.ndarray) -> list[float]:
    return np.round(values_R.astype(np.float64), 6).tolist()


def _packed(values_RxM: np.ndarray) -> str:
    """Base64 of little-endian float32, row by row, as OpenAI packs embeddings: numbers in JSON take twice as much."""
    return base64.b64encode(np.ascontiguousarray(values_RxM, "<f4").tobytes()).decode("ascii")
