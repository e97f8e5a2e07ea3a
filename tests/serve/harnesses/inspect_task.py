"""Tasks of inspect-ai over the files of data.py: `inspect eval inspect_task.py@pope -T data=OUT ...`."""

import base64
import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig
from inspect_ai.scorer import choice, match
from inspect_ai.solver import generate, multiple_choice


def _user(row: dict, text: str) -> list:
    kind = "jpeg" if base64.b64decode(row["image"])[:2] == b"\xff\xd8" else "png"
    image = ContentImage(image=f"data:image/{kind};base64,{row['image']}")
    return [ChatMessageUser(content=[image, ContentText(text=text)])]


def _rows(data: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(data) / "gold" / f"{name}.jsonl").read_text().splitlines()]


@task
def pope(data: str) -> Task:
    """Yes or no, greedy."""
    samples = [
        Sample(id=row["question_id"], input=_user(row, row["text"]), target=row["label"]) for row in _rows(data, "pope")
    ]
    config = GenerateConfig(temperature=0, max_tokens=128, seed=3)
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match(), config=config)


@task
def mathvision(data: str) -> Task:
    """Free answers and letters, sampled."""
    samples = []
    for row in _rows(data, "mathvision"):
        lines = [f"({letter}) {text}" for letter, text in zip("ABCDE", row["options"], strict=False)]
        text = "\n".join([row["question"].replace("<image1>", "").strip(), *lines])
        samples.append(Sample(id=row["id"], input=_user(row, text), target=row["answer"]))
    config = GenerateConfig(temperature=0.7, top_p=0.9, max_tokens=128, seed=3, stop_seqs=["\n\n\n"])
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match(), config=config)


@task
def mmstar(data: str) -> Task:
    """Lettered options, greedy."""
    samples = []
    for row in _rows(data, "mmstar"):
        options = [row[letter] for letter in "ABCD" if row.get(letter)]
        user = _user(row, row["question"])
        samples.append(Sample(id=row["index"], input=user, choices=options, target=row["answer"]))
    config = GenerateConfig(temperature=0, max_tokens=128, seed=3)
    return Task(dataset=MemoryDataset(samples), solver=multiple_choice(cot=True), scorer=choice(), config=config)
