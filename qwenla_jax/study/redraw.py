"""The scenes that a study's questions are about, drawn anew."""

from __future__ import annotations

from PIL import Image

from qwenla_jax.data.synthetic.source import scene_source
from qwenla_jax.study.collect import Measured, StudyError


def make_image(one: Measured, index: int) -> Image.Image:
    """The image of a question, a pure function of its scene's seed and number.

    Raises:
      StudyError: the scene drawn now has another question, so the answers were made by another version.
    """
    record = scene_source(one.source, one.scenes_seed, "held_out", len(one.texts))[index]
    text = one.texts[index]
    if (record.id, record.question, record.answer) != (text["id"], text["question"], text["answer"]):
        raise StudyError(
            f"question {text['id']}: {text['question']!r} was asked, but that scene's is {record.question!r} "
            f"({record.id}); the answers belong to another version of the scenes"
        )
    image = record.images[0]
    assert isinstance(image, Image.Image)
    return image
