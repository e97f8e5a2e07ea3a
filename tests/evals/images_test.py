"""Images of rows: files, base64, another row's. Oracle: the images that were written."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.evals.prompts import prompt_of
from qwenla_jax.evals.registry import questions_of
from qwenla_jax.evals.task import Item

RED, BLUE, GREEN = (np.full((4, 5, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0)))
NOISE = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def base(pixels):
    return base64.b64encode(encoded(pixels)).decode()


def arrays(record):
    return [np.asarray(image) for image in record.images]


def same(result, wanted):
    return len(result) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(result, wanted, strict=True))


@pytest.fixture
def table(tmp_path):
    def make(cells, task="mmstar"):
        lines = ["index\tquestion\tA\tB\tanswer\timage"]
        lines += [f'{index}\tq\tx\ty\tA\t"{cell}"' for index, cell in cells]
        path = tmp_path / "t.tsv"
        path.write_text("\n".join(lines) + "\n")
        return questions_of(task, [path])

    return make


@pytest.mark.parametrize("task", ["mmstar", "mmbench", "mmmu", "mathvision"])
def test_base64_lists_and_indexes(table, task):
    two = f"['{base(RED)}', '{base(NOISE)}']"
    result = table([(0, base(NOISE)), (1, two), (2, "0"), (1000000, "1"), (4, "1000000"), (5, "['0', '2']")], task)
    wanted = [[NOISE], [RED, NOISE], [NOISE], [RED, NOISE], [RED, NOISE], [NOISE, NOISE]]
    assert all(same(arrays(result[n]), pixels) for n, pixels in enumerate(wanted))


def test_what_is_no_image_is_reported_when_it_is_asked_for(table):
    result = table([(0, "1"), (1, "0"), (2, "77"), (3, "!" * 80), (4, "no.png"), (5, "../a.png"), (6, "6")])
    message = [
        "none of its own",
        "none of its own",
        "there is none",
        "neither base64",
        "cannot be read",
        "expected one",
    ]
    for number, text in enumerate([*message, "none of its own"]):
        with pytest.raises(ValueError, match=text) as error:
            result[number]
        assert error.value.reason.startswith("image_")
        assert ("no.png" if number == 4 else "t.tsv") in str(error.value)


def test_rows_that_name_rows_that_name_rows(table):
    chain = [(0, base(NOISE)), *((n, str(n - 1)) for n in range(1, 2000))]
    result = table(chain)
    assert all(same(arrays(result[n]), [NOISE]) for n in (0, 1, 8))
    for n in (9, 1999):
        with pytest.raises(ValueError, match="after 8 others that name the next"):
            result[n]
    # Each row names the one before it ten times: 10^8 images.
    result = table([(0, base(NOISE)), *((n, str([str(n - 1)] * 10)) for n in range(1, 9))])
    assert len(result[2].images) == 100
    with pytest.raises(ValueError, match="row 9: has more than 256 images"):
        result[8]


def test_a_missing_cell_that_became_a_text_is_no_image(table):
    assert not table([(0, "nan"), (1, "<NA>")])[0].images


def test_files_beside_the_questions_and_in_a_folder(tmp_path):
    images = tmp_path / "images"
    for name, pixels in {"a.png": RED, "OCR/b.png": BLUE, "OCR/images/c.png": GREEN}.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(encoded(pixels))
    mme = tmp_path / "OCR.txt"
    mme.write_text("".join(f"{name}\tIs it? Please answer yes or no.\tYes\n" for name in ("a.png", "b.png", "c.png")))
    result = questions_of("mme", [mme], images=images)
    assert [same(arrays(result[n]), [each]) for n, each in enumerate((RED, BLUE, GREEN))] == [True] * 3
    rows = [{"question": "q", "gt_answer": "a", "image_src": "https://host/x/a.png"}]
    hal = tmp_path / "hal.json"
    hal.write_text(json.dumps(rows))
    assert same(arrays(questions_of("mmhal", [hal], images=images)[0]), [RED])
    (images / "COCO_val2014_000000000042.jpg").write_bytes(encoded(NOISE))
    chair = tmp_path / "chair.json"
    chair.write_text(json.dumps({"42": ["dog"]}))
    assert same(arrays(questions_of("chair", [chair], images=images)[0]), [NOISE])
    (tmp_path / "d.png").write_bytes(encoded(GREEN))
    mmmu = tmp_path / "mmmu.jsonl"
    row = {"id": "validation_Art_1", "question": "q", "answer": "3", "question_type": "short-answer"}
    mmmu.write_text(json.dumps({**row, "image_1": "d.png", "image_2": "images/a.png"}))
    assert same(arrays(questions_of("mmmu", [mmmu])[0]), [GREEN, RED])


@pytest.mark.parametrize(
    ("task", "item", "structured", "plain"),
    [
        ("pope", Item("1", "Is there a car?"), "Is there a car?", "Is there a car?\nAnswer with yes or no."),
        ("mme", Item("1", "Is it? Please answer yes or no."), "Is it? Please answer yes or no.", None),
        ("chair", Item("1", "Describe."), "Describe.", None),
        (
            "mmmu",
            Item("1", "See <image 1>.\n(A) <image 2>\n(B) no", options={"A": "", "B": "no"}),
            "See (picture 1).\n(A) (picture 2)\n(B) no",
            "See (picture 1).\n(A) (picture 2)\n(B) no\nAnswer with the letter of one option.",
        ),
        (
            "mathvision",
            Item("1", r"Let\nIs $a \neq b$?" + "\n<image1>"),
            "Let\nIs $a \\neq b$?",
            "Let\nIs $a \\neq b$?\nAnswer with a single word, number or phrase.",
        ),
        (
            "mmmu_pro",
            Item("1", "hidden\nA. x", options={"A": "x"}, kind="vision"),
            "Answer the question that the picture shows.",
            "Answer the question that the picture shows.\nAnswer with the letter of one option.",
        ),
    ],
)
def test_prompts(task, item, structured, plain):
    assert prompt_of(task, item, "structured") == structured
    assert prompt_of(task, item, "plain") == (structured if plain is None else plain)
    assert prompt_of(task, item, "Q: {question} {x}") == f"Q: {structured} {{x}}"
