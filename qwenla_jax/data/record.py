"""Records: what a source returns for an index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

Split = Literal["cold_start", "train", "held_out"]


@dataclass(frozen=True)
class Clip:
    """A video of a record.

    Attributes:
      frames: uint8 [F, H, W, 3], or images of one size.
      fps: frames a second, of these frames.
      total_pixels: bound on all steps together, see `video_to_patches`; None for none.
    """

    frames: np.ndarray | tuple[Image.Image, ...]
    fps: float
    total_pixels: int | None = None


@dataclass(frozen=True)
class Record:
    """One question about images.

    Attributes:
      id: unique within its source.
      images: the images, RGB, of any size.
      question: the user's text, without any placeholder of an image.
      answer: the right answer, without markup.
      response: a response in the paper's answer format for supervised training; None where there is none.
      kind: type of the question, for accuracy by type.
      videos: the videos, after the images and before the question.
      options: the texts of options A, B, C, ... where the question has them; the question's text holds them too.
      system: text of the system turn, in place of the run's; None for the run's.
      complete: whether the response is whole; of one that breaks off no end is learned.
      columns: what else its line has in a JSONL file, as JSON values, for users' rewards.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    response: str | None
    kind: str
    videos: tuple[Clip, ...] = ()
    options: tuple[str, ...] = ()
    system: str | None = None
    complete: bool = True
    columns: Mapping[str, Any] = field(default_factory=dict)


def stable_hash(text: str) -> int:
    """The same number in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
