"""Scores of answers to questions about rendered scenes: accuracy, format, reflections, hallucinated objects."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence

from qwenla_jax.data.synthetic.marked_scenes import MARKS
from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES, SIZES
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.text.answers.match import matches
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.special_tokens import REFLECTION_NAME, TAGS


@dataclasses.dataclass(frozen=True)
class SceneAnswer:
    """One answer, judged.

    Attributes:
      kind: type of the question.
      right: whether the answer is right. A response without any tag, as a base model gives it, is its own answer.
      well_formed: whether the response keeps the paper's format.
      reflections: `<REFLECTION>` sections.
      named, invented, missed: objects that the caption names, those among them that are not in the scene, and objects
        of the scene that it does not name; an object is its size, colour and shape, and counts once (as in CHAIR).
    """

    kind: str
    right: bool
    well_formed: bool
    reflections: int
    named: int
    invented: int
    missed: int


def judge_answer(response: str, answer: str, kind: str, caption: str) -> SceneAnswer:
    """Judges one response, without control tokens.

    Args:
      response, answer, kind: of a question.
      caption: the scene's objects, as `scene_questions.caption_of` writes them.
    """
    plain = _plain(response)
    sections = parse(response).sections
    there = {words for words, _ in _objects(caption)}
    named = {words for start, text in message(response) for words, _ in _objects(text)}
    return SceneAnswer(
        kind=kind,
        right=matches(response, answer) if plain else accuracy_reward(response, answer) == 1.0,
        well_formed=format_reward(response) == 1.0,
        reflections=sum(section.name == REFLECTION_NAME for section in sections),
        named=len(named),
        invented=len(named - there),
        missed=len(there - named),
    )


@dataclasses.dataclass(frozen=True)
class SaidObject:
    """An object that a caption names, where it does so for the first time.

    Attributes:
      end: index in the response of the first character behind it.
      right: whether it is in the scene.
    """

    end: int
    right: bool


def said_objects(response: str, caption: str) -> tuple[SaidObject, ...]:
    """The objects that `judge_answer` counts as named, in their order, each once."""
    there = {words for words, _ in _objects(caption)}
    result: dict[tuple[str, str, str], SaidObject] = {}
    for start, text in message(response):
        for words, end in _objects(text):
            result.setdefault(words, SaidObject(start + end, words in there))
    return tuple(result.values())


def said_details(response: str, details: Collection[str]) -> tuple[int, int]:
    """Marks of objects that a response tells, the question's own words and bare verdicts left out.

    Args:
      response: the text without control tokens.
      details: `SceneSource.details` of its scene.

    Returns:
      different objects named in full with a mark behind it, anywhere in the response; those among them that are wrong:
      the scene has no such object, or it bears another mark.
    """
    words = re.findall(r"[a-z]+|[^\sa-z]+", response)
    four = zip(words, words[1:], words[2:], words[3:], strict=False)
    kinds = (SIZES, COLORS, SHAPES, MARKS)
    said = {" ".join(each) for each in four if all(word in kind for word, kind in zip(each, kinds, strict=True))}
    return len(said), len(said - set(details))


def _plain(response: str) -> bool:
    return not any(tag in response for tag in TAGS)


def message(response: str) -> list[tuple[int, str]]:
    """Where a response tells what is in the image: (index of the first character, text).

    Those are its captions. Without any tag, as `configs/base.py` teaches it, a response tells that in all its lines but
    the first, which sums up the question, or in its only one.
    """
    if _plain(response):
        start = response.find("\n") + 1
        return [(start, response[start:])]
    captions = [section for section in parse(response).sections if section.name == "CAPTION"]
    return [(section.start + len("<CAPTION>"), section.text) for section in captions]


def _objects(text: str) -> Iterator[tuple[tuple[str, str, str], int]]:
    """The objects that a text names, a size, a colour and a shape side by side, with the index behind each."""
    words = list(re.finditer(r"[^\s,]+|,", text))
    for a, b, c in zip(words, words[1:], words[2:], strict=False):
        if a[0] in SIZES and b[0] in COLORS and c[0] in SHAPES:
            yield (a[0], b[0], c[0]), c.end()


def summarise(answers: Sequence[SceneAnswer]) -> dict[str, float]:
    """Means over answers.

    Returns:
      `accuracy`, `accuracy/KIND`, `format`, `reflections`; `chair_i`, the share of the named objects that are invented,
      `chair_s`, the share of the answers that invent one, and `recall`, the share of the scenes' objects that are
      named (paper, table 2, after CHAIR; over all answers, and left out where none names an object).
    """
    if not answers:
        raise ValueError("there are no answers to summarise")
    share = lambda values: sum(values) / len(values)  # noqa: E731
    by_kind = collections.defaultdict(list)
    for one in answers:
        by_kind[one.kind].append(one.right)
    result = {"accuracy": share([one.right for one in answers])}
    result |= {f"accuracy/{kind}": share(by_kind[kind]) for kind in sorted(by_kind)}
    result["format"] = share([one.well_formed for one in answers])
    result["reflections"] = share([one.reflections for one in answers])
    named, invented = sum(one.named for one in answers), sum(one.invented for one in answers)
    if named:
        there = sum(one.named - one.invented + one.missed for one in answers)
        result |= {"chair_i": invented / named, "chair_s": share([one.invented > 0 for one in answers])}
        result["recall"] = (named - invented) / there
    return result
