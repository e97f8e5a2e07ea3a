"""CHAIR's files: captions by image, and what the images hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qwenla_jax.evals.benchmarks.chair import chair, count, read_synonyms, true_objects
from qwenla_jax.evals.result import Result
from qwenla_jax.evals.table_files import Row
from qwenla_jax.evals.task import Answer, Item, Settings

_QUESTION = "Please describe this image in detail."


def chair_ids(row: Row) -> tuple[str, ...]:
    """The image's id in COCO."""
    return (row.need("image_id", "id"),)


def chair_item(row: Row, name: str) -> Item:
    """An image with the list of its objects.

    Raises:
      ValueError: the row has no list of objects.
    """
    objects = row.values.get("objects", row.values.get("object"))
    if not isinstance(objects, list):
        raise ValueError(
            f"{row.where}: holds no objects; expected {{image id: [objects]}}, or COCO's instances and captions files"
        )
    return Item(name, _QUESTION, details={"objects": frozenset(map(str, objects))}, images=row.images)


def read_images(rows: Sequence[Row], settings: Settings) -> list[Item]:
    """Images of rows with their objects, or of COCO's annotation files (instances and captions, several of each).

    Raises:
      ValueError: a row holds no objects; COCO's files are not both there, or lack something.
    """
    coco = [row for row in rows if "annotations" in row.values]
    if not coco:
        return [chair_item(row, name) for row in rows for name in chair_ids(row)]
    categories: dict[str, set[str]] = defaultdict(set)
    captions: dict[str, list[str]] = defaultdict(list)
    kinds = set()
    for row in coco:
        try:
            names = {one["id"]: str(one["name"]) for one in row.values.get("categories", ())}
            for one in row.values["annotations"]:
                if "caption" in one:
                    captions[str(one["image_id"])].append(str(one["caption"]))
                    kinds.add("captions")
                else:
                    categories[str(one["image_id"])].add(names[one["category_id"]])
                    kinds.add("instances")
            for one in row.values.get("images", ()):
                categories[str(one["id"])] |= set()
        except KeyError as error:
            raise ValueError(f"{row.where}: not COCO's annotations: lacks {error}") from error
        except TypeError as error:  # a list or a number where an object should be
            raise ValueError(f"{row.where}: not COCO's annotations: {error}") from error
    if kinds != {"captions", "instances"}:
        raise ValueError(
            f"chair: COCO's files are {' and '.join(sorted(kinds)) or 'empty'} alone; expected instances and captions"
        )
    synonyms = read_synonyms(settings.synonyms)
    result = []
    for name in dict.fromkeys([*categories, *captions]):
        objects = true_objects(sorted(categories[name]), captions[name], synonyms)
        result.append(Item(name, _QUESTION, details={"objects": objects}))
    return result


def score_chair(answers: Sequence[Answer], settings: Settings) -> Result:
    """CHAIR_i, CHAIR_s and Recall; an empty caption names nothing.

    Raises:
      ValueError: the synonyms cannot be read, or nltk is not installed.
    """
    synonyms = read_synonyms(settings.synonyms)
    counted = [count(one.text, one.item.details["objects"], synonyms) for one in answers]
    figures, counts = chair(counted)
    rows = [
        {"id": one.item.id, "mentions": each.mentions, "hallucinated": each.hallucinated}
        for one, each in zip(answers, counted, strict=True)
    ]
    notes = {"synonyms": synonyms.name}
    if settings.synonyms is None:
        notes["synonyms"] += ", so not comparable with published figures; --synonyms=FILE takes the official ones"
    return Result("chair", figures, counts, notes, tuple(rows))
