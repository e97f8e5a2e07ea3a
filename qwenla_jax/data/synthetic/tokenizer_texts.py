"""Texts that the embedded default's tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from qwenla_jax.data.synthetic.easy_vqa import EASY_VQA_COLORS, EASY_VQA_SHAPES
from qwenla_jax.data.synthetic.source import SceneSource


def tokenizer_texts(scenes: int = 2000) -> Iterator[str]:
    """Texts from which the embedded default's tokenizer learns its words: scenes, and easy-VQA's few words."""
    for index in range(scenes):
        record = SceneSource(0, "cold_start")[index]
        yield record.question
        yield record.response or ""
    for word in (*EASY_VQA_COLORS, *EASY_VQA_SHAPES):
        for text in (f"is there a {word} shape?", f"what is the {word}?", f"does the image contain a {word} shape?"):
            yield from [text] * 20
