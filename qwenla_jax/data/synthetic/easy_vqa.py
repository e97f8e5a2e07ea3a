"""easy-VQA: a source over the PyPI package, with responses written from its own answers."""

from __future__ import annotations

import collections

from qwenla_jax.data.images.decode import open_image
from qwenla_jax.data.record import Record, Split, stable_hash


class EasyVqaSource:
    """The PyPI package easy-vqa: 64x64 images of one coloured shape, with the package's questions.

    Responses for the cold start are written from the package's answers, the only facts about an image; images whose
    questions do not give both colour and shape (9%) are left out there. The package's training part is the splits
    "cold_start" and "train", its test part "held_out".

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
        # The package lists all questions of an image together; the first `size` should be of many images.
        if split == "cold_start":
            rows = [row for row in rows if len(self._facts[row[2]]) == 2]
        rows.sort(key=lambda row: stable_hash(f"{seed} {row[2]} {row[0]}"))
        self._rows = rows[:size]
        self._share, self._split = reflection_share, split

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        question, answer, number = self._rows[index]
        image = open_image(self._paths[number])
        name = f"easy-vqa-{self._split}-{number}-{question}"
        facts = self._facts[number]
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


EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")


EASY_VQA_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def _easy_vqa_kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in EASY_VQA_SHAPES else "color"


def _easy_vqa_facts(questions: tuple[list[str], list[str], list[int]]) -> dict[int, tuple[str, ...]]:
    """Colour and shape of every image, from its questions with their answers."""
    facts: dict[int, dict[str, str]] = collections.defaultdict(dict)
    for question, answer, image in zip(*questions, strict=True):
        words = set(question.rstrip("?").split())
        named = words if answer == "yes" and not words & {"no", "not"} else {answer}
        named |= words if answer == "no" and words & {"no", "not"} else set()
        named |= words if answer not in ("yes", "no") else set()  # "what color is the circle?" implies a circle
        for word in named:
            if word in EASY_VQA_COLORS:
                facts[image]["color"] = word
            elif word in EASY_VQA_SHAPES:
                facts[image]["shape"] = word
    names = ("color", "shape")
    return {image: tuple(facts[image][name] for name in names if name in facts[image]) for image in set(questions[2])}
