"""Sources of records: Grain random-access sources, index -> Record."""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from qwenla_jax.data import marked_questions
from qwenla_jax.data.marked_scenes import MarkedObject, make_marked_scene
from qwenla_jax.data.pictures import open_picture
from qwenla_jax.data.scene_questions import ask, caption_of
from qwenla_jax.data.scenes import Scene, make_scene

Split = Literal["cold_start", "train", "held_out"]
_SPLIT_NUMBER: dict[str, int] = {"cold_start": 0, "held_out": 1, "train": 2}
SCENES = 1_000_000  # scenes of one split; they are drawn when asked for
_KEPT = 1024  # scenes, of about 20 kB; evaluations read the same ones again and again


@dataclass(frozen=True)
class Clip:
    """A video of a record.

    Attributes:
      frames: uint8 [F, H, W, 3], or pictures of one size.
      fps: frames a second, of these frames.
      total_pixels: bound on all steps together, see `video_to_patches`; None for none.
    """

    frames: np.ndarray | tuple[Image.Image, ...]
    fps: float
    total_pixels: int | None = None


@dataclass(frozen=True)
class Record:
    """One question about pictures.

    Attributes:
      id: unique within its source.
      images: the pictures, RGB, of any size.
      question: the user's text, without any placeholder of a picture.
      answer: the right answer, bare.
      response: a response in the paper's answer format for supervised training; None where there is none.
      kind: type of the question, for accuracy by type.
      videos: the videos, after the pictures and before the question.
      options: the texts of options A, B, C, ... where the question has them; the question's text holds them too.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    response: str | None
    kind: str
    videos: tuple[Clip, ...] = ()
    options: tuple[str, ...] = ()


class SceneSource:
    """Rendered scenes with a question each, a pure function of (seed, split, index).

    The three splits share no scene: BRPO trains on other scenes than the cold start did, and neither sees the held-out.
    """

    _name = "scene"
    _make = staticmethod(functools.lru_cache(_KEPT)(make_scene))
    _ask = staticmethod(ask)

    def __init__(
        self,
        seed: int,
        split: Split,
        size: int | None = None,
        reflection_share: float = 0.5,
        correction_share: float = 0.3,
        style: str = "structured",
    ) -> None:
        self._seed, self._split, self._size = seed, split, size or SCENES
        self._written = reflection_share, correction_share, style

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        asked = self._ask(scene, self._seed, _SPLIT_NUMBER[self._split], index, *self._written)
        name = f"{self._name}-{self._seed}-{self._split}-{index}"
        return Record(name, (scene.image,), asked.question, asked.answer, asked.response, asked.kind)

    def scene(self, index: int) -> Scene:
        """What the picture of a record shows."""
        return self._make(self._seed, _SPLIT_NUMBER[self._split], index)

    def caption(self, index: int) -> str:
        """The objects of a record's picture, as its response's caption has them."""
        return caption_of(self.scene(index))

    def details(self, index: int) -> tuple[str, ...]:
        """What is to be seen in a record's picture beyond the caption: an object's name and its mark."""
        return tuple(f"{thing} {thing.mark}" for thing in self.scene(index).objects if isinstance(thing, MarkedObject))


class MarkedSceneSource(SceneSource):
    """Rendered scenes whose objects bear marks that no caption names; otherwise as `SceneSource`."""

    _name = "marked-scene"
    _make = staticmethod(functools.lru_cache(_KEPT)(make_marked_scene))
    _ask = staticmethod(marked_questions.ask)


_SCENE_SOURCES: dict[str, type[SceneSource]] = {"scenes": SceneSource, "marked_scenes": MarkedSceneSource}


def scene_source(name: str, seed: int, split: Split, size: int | None = None, *written: Any) -> SceneSource:
    """The scenes of a name, "scenes" or "marked_scenes".

    Args:
      name: which.
      seed, split, size: as of the sources.
      written: reflection_share, correction_share and style, as far as they are given.

    Raises:
      ValueError: a name that is none of the two.
    """
    if name not in _SCENE_SOURCES:
        raise ValueError(f"{name!r}: expected {' or '.join(_SCENE_SOURCES)}")
    return _SCENE_SOURCES[name](seed, split, size, *written)


class EasyVqaSource:
    """The PyPI package easy-vqa: 64x64 pictures of one coloured shape, and questions that nobody here wrote.

    Responses for the cold start are written from the package's own answers: what is true of a picture is what its
    questions say; pictures whose questions do not tell both colour and shape (9%) are left out there. The package's
    training part serves "cold_start" and "train", its test part "held_out".

    Raises:
      ModuleNotFoundError: the package is not installed.
    """

    def __init__(self, split: Split, size: int | None = None, seed: int = 0, reflection_share: float = 0.5) -> None:
        try:
            import easy_vqa
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("data.source easy_vqa needs a package: pip install easy-vqa") from error
        test = split == "held_out"
        self._paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
        questions = easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
        self._facts = _easy_vqa_facts(questions)
        rows = list(zip(*questions, strict=True))
        # The package lists all questions of a picture together; the first `size` should be of many pictures.
        if split == "cold_start":
            rows = [row for row in rows if len(self._facts[row[2]]) == 2]
        rows.sort(key=lambda row: stable_hash(f"{seed} {row[2]} {row[0]}"))
        self._rows = rows[:size]
        self._share, self._split = reflection_share, split

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        question, answer, picture = self._rows[index]
        image = open_picture(self._paths[picture])
        name = f"easy-vqa-{self._split}-{picture}-{question}"
        facts = self._facts[picture]
        caption = " ".join(facts)
        reflects = stable_hash(f"reflect {name}") % 1000 < 1000 * self._share
        sections = [
            ("SUMMARY", "look at the shape"),
            ("CAPTION", caption),
            ("REASONING", f"{caption}: {answer}"),
            *([("REFLECTION", f"look again: {caption}: {answer}")] if reflects else []),
            ("CONCLUSION", answer),
        ]
        response = "".join(f"<{tag}>{text}</{tag}>" for tag, text in sections) if len(facts) == 2 else None
        return Record(name, (image,), question, answer, response, _easy_vqa_kind(answer))


_EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")
_EASY_VQA_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def _easy_vqa_kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in _EASY_VQA_SHAPES else "color"


def _easy_vqa_facts(questions: tuple[list[str], list[str], list[int]]) -> dict[int, tuple[str, ...]]:
    """Colour and shape of every picture, as far as its questions with their answers tell."""
    facts: dict[int, dict[str, str]] = collections.defaultdict(dict)
    for question, answer, picture in zip(*questions, strict=True):
        words = set(question.rstrip("?").split())
        told = words if answer == "yes" and not words & {"no", "not"} else {answer}
        told |= words if answer == "no" and words & {"no", "not"} else set()
        told |= words if answer not in ("yes", "no") else set()  # "what color is the circle?" tells of a circle
        for word in told:
            if word in _EASY_VQA_COLORS:
                facts[picture]["color"] = word
            elif word in _EASY_VQA_SHAPES:
                facts[picture]["shape"] = word
    names = ("color", "shape")
    return {
        picture: tuple(facts[picture][name] for name in names if name in facts[picture])
        for picture in set(questions[2])
    }


def tokenizer_texts(scenes: int = 2000) -> Iterator[str]:
    """Texts from which the embedded default's tokenizer learns its words: scenes, and easy-VQA's few words."""
    for index in range(scenes):
        record = SceneSource(0, "cold_start")[index]
        yield record.question
        yield record.response or ""
    for word in (*_EASY_VQA_COLORS, *_EASY_VQA_SHAPES):
        for text in (f"is there a {word} shape?", f"what is the {word}?", f"does the image contain a {word} shape?"):
            yield from [text] * 20


def stable_hash(text: str) -> int:
    """The same number in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
