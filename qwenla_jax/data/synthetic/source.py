"""Sources of rendered scenes with a question each."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from qwenla_jax.data.record import Record, Split
from qwenla_jax.data.synthetic import length_questions, marked_questions
from qwenla_jax.data.synthetic.length_options import LengthOptions
from qwenla_jax.data.synthetic.marked_scenes import make_marked_scene
from qwenla_jax.data.synthetic.scene_questions import SceneQuestion, ask, caption_of
from qwenla_jax.data.synthetic.scenes import Scene, make_scene

_SPLIT_NUMBER: dict[str, int] = {"cold_start": 0, "held_out": 1, "train": 2}


SCENES = 1_000_000  # scenes of one split; they are drawn on access


_CACHED = 1024  # scenes, of about 20 kB each; evaluations read the same ones repeatedly


class SceneSource:
    """Rendered scenes with a question each, a pure function of (seed, split, index).

    The three splits share no scene: BRPO trains on other scenes than the cold start did, and neither sees the held-out.
    """

    _name = "scene"
    _make = staticmethod(functools.lru_cache(_CACHED)(make_scene))
    _ask = staticmethod(ask)
    _structured = "structured"  # how a response in the paper's format is written

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
        style = self._structured if style == "structured" else style
        self._written = reflection_share, correction_share, style

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        return self._record(
            index, scene, self._ask(scene, self._seed, _SPLIT_NUMBER[self._split], index, *self._written)
        )

    def _record(self, index: int, scene: Scene, asked: SceneQuestion) -> Record:
        name = f"{self._name}-{self._seed}-{self._split}-{index}"
        return Record(name, (scene.image,), asked.question, asked.answer, asked.response, asked.kind)

    def scene(self, index: int) -> Scene:
        """The scene of a record's image."""
        return self._make(self._seed, _SPLIT_NUMBER[self._split], index)

    def caption(self, index: int) -> str:
        """The objects of a record's image, as its response's caption has them."""
        return caption_of(self.scene(index))

    def details(self, index: int) -> tuple[str, ...]:
        """The details of a record's image beyond the caption: each object's name with its mark."""
        return tuple(f"{thing} {thing.mark}" for thing in self.scene(index).objects if thing.mark)


class MarkedSceneSource(SceneSource):
    """Rendered scenes whose objects bear marks that no caption names; otherwise as `SceneSource`."""

    _name = "marked-scene"
    _make = staticmethod(functools.lru_cache(_CACHED)(make_marked_scene))
    _ask = staticmethod(marked_questions.ask)


class BriefSceneSource(SceneSource):
    """As `SceneSource`, with brief responses: only a reflection describes the objects."""

    _name = "brief-scene"
    _structured = "brief"


class LengthSceneSource(SceneSource):
    """Scenes with marks and questions whose reasoning has a chosen length, see `length_questions`."""

    _name = "length-scene"
    _make = staticmethod(functools.lru_cache(_CACHED)(make_marked_scene))

    def __init__(
        self, seed: int, split: Split, size: int | None, options: LengthOptions, style: str = "structured"
    ) -> None:
        super().__init__(seed, split, size)
        self._length_options, self._style = options, style

    def __getitem__(self, index: int) -> Record:
        scene, split = self.scene(index), _SPLIT_NUMBER[self._split]
        asked = length_questions.ask(scene, self._seed, split, index, self._length_options, self._style)
        return dataclasses.replace(self._record(index, scene, asked), complete=not self._length_options.cut)


SCENE_SOURCES: dict[str, type[SceneSource]] = {
    "scenes": SceneSource,
    "brief_scenes": BriefSceneSource,
    "marked_scenes": MarkedSceneSource,
}


def scene_source(name: str, seed: int, split: Split, size: int | None = None, *written: Any) -> SceneSource:
    """The scenes of a name out of SCENE_SOURCES.

    Args:
      name: which.
      seed, split, size: as of the sources.
      written: reflection_share, correction_share and style, as far as they are given.

    Raises:
      ValueError: another name.
    """
    if name not in SCENE_SOURCES:
        raise ValueError(f"{name!r}: expected {' or '.join(SCENE_SOURCES)}")
    return SCENE_SOURCES[name](seed, split, size, *written)
