"""Small local benchmark files for the four harnesses, from rendered scenes and, if given, a folder of MathVision.

    python tests/serve/harnesses/data.py OUT --size=16 [--mathvision=FOLDER]

The scenes are held-out ones of the kind that the embedded checkpoint was trained for: some of its answers are right.
FOLDER has MathVision's test.jsonl and the images that it names. Written are, of the same questions:

    OUT/gold/BENCHMARK.jsonl               for `qwenla evaluate`, images in base64
    OUT/parquet/lmms-lab-encoder/POPE/...  under the names of the Hub, which `datasets` takes for local folders when it
    OUT/parquet/MathLLMs/MathVision/...    is started in OUT/parquet (lmms-eval, lm-eval)
    OUT/lmu/BENCHMARK_local.tsv            for VLMEvalKit
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from qwenla_jax.data.synthetic.scene_questions import SceneQuestion, ask
from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES, SIZES, Scene, make_scene

SEED, SPLIT = 0, 1  # held-out scenes
LETTERS = "ABCDE"
WORDS = (COLORS, SHAPES, SIZES)


def scenes(kinds: tuple[str, ...], size: int) -> Iterator[tuple[Scene, SceneQuestion]]:
    """The first questions of some kinds."""
    index = 0
    while size:
        scene, asked = make_scene(SEED, SPLIT, index), ask(make_scene(SEED, SPLIT, index), SEED, SPLIT, index)
        index += 1
        if asked.kind in kinds:
            size -= 1
            yield scene, asked


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """An image's file in base64."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def pope_rows(size: int) -> list[dict[str, Any]]:
    """Is there a COLOR SHAPE? Half of the answers are yes."""
    asked = scenes(("existence",), size)
    return [
        {"question_id": n, "text": q.question, "label": q.answer, "category": "random", "image": encoded(scene.image)}
        for n, (scene, q) in enumerate(asked)
    ]


def options_of(answer: str, number: int) -> list[str]:
    """Four options, the right one at a place that the question's number gives."""
    pool = next((list(words) for words in WORDS if answer in words), [str(n) for n in range(6)])
    wrong = [word for word in pool if word != answer][:3]
    wrong.insert(number % (len(wrong) + 1), answer)
    return wrong


def mmstar_rows(size: int) -> list[dict[str, Any]]:
    """Questions with four options in columns."""
    rows = []
    for n, (scene, q) in enumerate(scenes(("attribute", "count"), size)):
        options = options_of(q.answer, n)
        letters = dict(zip(LETTERS, options, strict=False))
        rows.append(
            {"index": n, "question": q.question, "answer": LETTERS[options.index(q.answer)], **letters}
            | {"category": q.kind, "l2_category": q.kind, "image": encoded(scene.image)}
        )
    return rows


def mmmu_rows(size: int) -> list[dict[str, Any]]:
    """Questions with the image in two places of the text."""
    return [
        row
        | {"index": f"validation_Scenes_{row['index']}", "split": "validation", "image": [row["image"]] * 2}
        | {"question": f"<image 1> and once more <image 2> {row['question']}"}
        for row in mmstar_rows(size)
    ]


def mathvision_rows(size: int, folder: Path | None) -> list[dict[str, Any]]:
    """Scenes with a number or a word as the answer, and as many questions of MathVision."""
    rows = [
        {"id": str(n), "question": f"{q.question}\n<image1>", "options": [], "answer": q.answer, "level": 1}
        | {"subject": q.kind, "image": encoded(scene.image)}
        for n, (scene, q) in enumerate(scenes(("count", "subtract", "attribute"), size))
    ]
    if folder is not None:
        lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines[:size]):
            image = encoded(Image.open(folder / row["image"]), "JPEG")
            keys = ("question", "options", "answer", "level", "subject")
            rows.append({"id": str(len(rows)), **{key: row[key] for key in keys}, "image": image})
    return rows


def write_gold(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(folder: Path, rows: list[dict[str, Any]], image: str) -> None:
    """Rows with their image as the Hub stores it."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = lambda row: Image.open(io.BytesIO(base64.b64decode(row["image"])))  # noqa: E731
    stored = [{key: row[key] for key in row if key != "image"} | {image: opened(row)} for row in rows]
    datasets.Dataset.from_list(stored).to_parquet(folder / "test-00000-of-00001.parquet")


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table of VLMEvalKit; lists as the text of a Python list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as lines:
        table = csv.DictWriter(lines, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(
            {key: str(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        )


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=16, help="questions of each benchmark")
    parser.add_argument("--mathvision", type=Path, help="folder with test.jsonl and images/")
    args = parser.parse_args()
    pope, mmstar, mmmu = pope_rows(args.size), mmstar_rows(args.size), mmmu_rows(args.size)
    mathvision = mathvision_rows(args.size, args.mathvision)
    for name, rows in {"pope": pope, "mmstar": mmstar, "mmmu": mmmu, "mathvision": mathvision}.items():
        write_gold(args.out / "gold" / f"{name}.jsonl", rows)
    hub = args.out / "parquet"
    theirs = [
        {"id": str(row["question_id"]), "question_id": str(row["question_id"]), "question": row["text"]}
        | {"answer": row["label"], "image_source": "scene", "category": row["category"], "image": row["image"]}
        for row in pope
    ]
    write_parquet(hub / "lmms-lab-encoder/POPE/data", theirs, "image")
    write_parquet(hub / "MathLLMs/MathVision/data", mathvision, "decoded_image")
    lmu = args.out / "lmu"
    write_tsv(
        lmu / "POPE_local.tsv",
        [
            {"index": row["question_id"], "question": row["text"], "answer": row["label"].capitalize()}
            | {"category": row["category"], "image": row["image"]}
            for row in pope
        ],
    )
    write_tsv(lmu / "MMStar_local.tsv", mmstar)
    places = [{"image_path": [f"{row['index']}_1.jpg", f"{row['index']}_2.jpg"]} for row in mmmu]
    write_tsv(lmu / "MMMU_local.tsv", [row | place for row, place in zip(mmmu, places, strict=True)])
    write_tsv(
        lmu / "MathVision_local.tsv",
        [
            {"index": row["id"], "question": row["question"], "answer": row["answer"], "category": row["subject"]}
            | {"choices": row["options"], "image": row["image"]}
            for row in mathvision
        ],
    )


if __name__ == "__main__":
    main()
