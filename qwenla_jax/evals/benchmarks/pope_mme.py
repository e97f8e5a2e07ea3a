"""POPE and MME: questions that are answered with yes or no.

Paper, evaluation: the mean F1 of POPE's three splits, and MME's total score. The rules are the official ones.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from qwenla_jax.evals.result import Figure, Result, ratio_figure
from qwenla_jax.evals.table_files import Row
from qwenla_jax.evals.task import Answer, Item, Settings

SPLITS = ("random", "popular", "adversarial")
PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_SPLIT = re.compile("|".join(SPLITS))


def pope_answer(text: str) -> str:
    """POPE's reading of an answer: "no" where the first sentence holds the word No, no or not, else "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """MME's reading of an answer: "yes", "no" or "other"; of a longer text only the first four characters count."""
    said = text.lower().strip().replace(".", "")
    if said in ("yes", "no"):
        return said
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    start = said[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope_ids(row: Row) -> tuple[str, ...]:
    """ "SPLIT/number", once for each split that the row is of.

    An id tells the split where it begins with it, as ours do; else a column does, which may name several as that of
    VLMEvalKit; else the file's name.

    Raises:
      ValueError: none of them tells the split.
    """
    whole = row.text("id") or ""
    if whole.partition("/")[0] in SPLITS and "/" in whole:
        return (whole,)
    message = [_SPLIT.findall((row.text(key) or "").lower()) for key in ("category", "split")]
    message.append(_SPLIT.findall(row.source.rpartition("/")[2].lower())[:1])
    splits = next((result for result in message if result), None)
    if splits is None:
        raise ValueError(
            f"{row.where}: is of no split; expected a column category ({', '.join(SPLITS)}) or one of these in the "
            "file's name"
        )
    return tuple(f"{split}/{row.need('index', 'question_id', 'id')}" for split in dict.fromkeys(splits))


def pope_item(row: Row, name: str) -> Item:
    """A question of POPE.

    Raises:
      ValueError: the row lacks something, or its label is neither yes nor no.
    """
    answer = _yes_or_no(row, row.need("label", "answer"))
    return Item(name, row.text("question", "text") or "", answer, kind=name.partition("/")[0], images=row.images)


def _yes_or_no(row: Row, answer: str) -> str:
    if answer.strip().lower() not in ("yes", "no"):
        raise ValueError(f"{row.where}: the right answer is {answer!r}; expected yes or no")
    return answer.strip().lower()


def score_pope(answers: Sequence[Answer], settings: Settings) -> Result:
    """F1 of "yes" in percent of each split and their mean, with accuracy, precision, recall and the share of yes.

    A question without a prediction counts as the wrong answer, and as neither yes nor no in the share of yes.
    """
    figures: dict[str, Figure] = {}
    counts, rows = {}, []
    by_split = defaultdict(list)
    for one in answers:
        wrong = "no" if one.item.answer == "yes" else "yes"
        said = pope_answer(one.text) if one.given else wrong
        by_split[one.item.kind].append((said, one.item.answer, one.given))
        rows.append({"id": one.item.id, "read": said, "answer": one.item.answer, "right": said == one.item.answer})
    for split in sorted(by_split, key=lambda name: (name not in SPLITS, SPLITS.index(name) if name in SPLITS else 0)):
        pairs = by_split[split]
        f1 = [(2.0 * (said == right == "yes"), (said == "yes") + (right == "yes")) for said, right, _ in pairs]
        yes = [right for said, right, _ in pairs if said == "yes"]
        true = [said for said, right, _ in pairs if right == "yes"]
        figures[f"F1/{split}"] = ratio_figure(f1)
        figures[f"accuracy/{split}"] = Figure.of_counts(sum(said == right for said, right, _ in pairs), len(pairs))
        figures[f"precision/{split}"] = Figure.of_counts(yes.count("yes"), len(yes))
        figures[f"recall/{split}"] = Figure.of_counts(true.count("yes"), len(true))
        said_yes = sum(said == "yes" and given for said, _, given in pairs)
        figures[f"yes/{split}"] = Figure.of_counts(said_yes, len(pairs))
        counts[f"questions/{split}"] = len(pairs)
    means = [figure.value for name, figure in figures.items() if name.startswith("F1/")]
    result = {"F1": Figure(sum(means) / len(means))} | figures
    lacking = [split for split in SPLITS if split not in by_split]
    notes = {"F1": f"mean of {len(means)} splits" + (f"; without {', '.join(lacking)}" if lacking else "")}
    return Result("pope", result, counts, notes, tuple(rows))


def mme_ids(row: Row) -> tuple[str, ...]:
    """The row's own id or index; else task, image and question, because two questions share an image."""
    if (own := row.text("id", "index")) is not None:
        return (own,)
    image = row.need("question_id", "image_path", "image", "image_id")
    return (f"{row.need('category')}/{image}/{row.need('question')}",)


def mme_item(row: Row, name: str) -> Item:
    """A question of MME.

    Raises:
      ValueError: the row lacks something, its task is none of the 14, or its answer is neither yes nor no.
    """
    kind = row.need("category", "task")
    if kind not in PERCEPTION + COGNITION:
        raise ValueError(f"{row.where}: the task {kind!r} is none of MME's: {', '.join(PERCEPTION + COGNITION)}")
    image = row.need("image_path", "question_id", "image_id", "image")
    answer = _yes_or_no(row, row.need("answer", "gt_answer"))
    return Item(name, row.need("question"), answer, kind=kind, details={"image": image}, images=row.images)


def score_mme(answers: Sequence[Answer], settings: Settings) -> Result:
    """100 accuracy + 100 accuracy+ of each task, and their sums over perception and cognition.

    Accuracy+ counts images of which both questions are answered right.

    Raises:
      ValueError: an image has another number of questions than two.
    """
    by_image: dict[tuple[str, str], list[bool]] = defaultdict(list)
    rows = []
    for one in answers:
        said = mme_answer(one.text) if one.given else "other"
        by_image[one.item.kind, one.item.details["image"]].append(said == one.item.answer)
        rows.append({"id": one.item.id, "read": said, "answer": one.item.answer, "right": said == one.item.answer})
    odd = [f"{kind}/{image}" for (kind, image), right in by_image.items() if len(right) != 2]
    if odd:
        raise ValueError(f"mme: {odd[0]!r} and {len(odd) - 1} others have not two questions; accuracy+ needs both")
    figures: dict[str, Figure] = {}
    scores = {}
    for kind in PERCEPTION + COGNITION:
        if pairs := [right for (task, _), right in by_image.items() if task == kind]:
            single = Figure.of_counts(sum(map(sum, pairs)), 2 * len(pairs))
            both = Figure.of_counts(sum(map(all, pairs)), len(pairs))
            scores[kind] = single.value + both.value
            figures |= {kind: Figure(scores[kind]), f"{kind}/accuracy": single, f"{kind}/accuracy+": both}
    parts = (("perception", PERCEPTION), ("cognition", COGNITION))
    totals = {name: Figure(math.fsum(scores.get(kind, 0.0) for kind in kinds)) for name, kinds in parts}
    lacking = [kind for kind in PERCEPTION + COGNITION if kind not in scores]
    without = f"; without {', '.join(lacking)}, which add nothing" if lacking else ""
    notes = {"tasks": f"{len(scores)} of 14{without}"}
    counts = {"images": len(by_image), "read_as_other": sum(row["read"] == "other" for row in rows)}
    total = Figure(math.fsum(figure.value for figure in totals.values()))
    return Result("mme", {"total": total} | totals | figures, counts, notes, tuple(rows))
