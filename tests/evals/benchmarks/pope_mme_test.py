"""POPE and MME. Oracles: the objects of POPE's images, which nobody here labelled; hand-computed scores."""

import json
import re

import pytest

from qwenla_jax.evals.benchmarks.pope_mme import SPLITS, mme_answer, pope_answer, score_mme, score_pope
from qwenla_jax.evals.registry import score_files, task_of
from qwenla_jax.evals.task import Answer, Item, Settings


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_fit_the_objects_and_answers_by_them_are_all_right(shared_data, tmp_path):
    folder = shared_data / "hallucination"
    objects = json.loads((folder / "chair_ground_truth.json").read_text())
    gold, message, always = [], [], []
    for split in SPLITS:
        gold.append(folder / f"coco_pope_{split}.json")
        rows = rows_of(gold[-1])
        seen = [
            re.fullmatch(r"Is there an? (.*) in the image\?", row["text"])[1]
            in objects[str(int(re.search(r"([0-9]+)\.jpg", row["image"])[1]))]
            for row in rows
        ]
        assert seen == [row["label"] == "yes" for row in rows] and len(rows) == 3000
        answers = [
            {"question_id": row["question_id"], "answer": "Yes, there is." if s else "No"}
            for row, s in zip(rows, seen, strict=True)
        ]
        message.append(write(tmp_path / f"{split}.jsonl", answers))
        always.append(write(tmp_path / f"all_{split}.jsonl", [row | {"answer": "yes"} for row in answers]))
    result = score_files("pope", message, gold)
    assert {
        name: result.figures[name].value for name in ("F1", "F1/random", "accuracy/popular", "yes/adversarial")
    } == {"F1": 100.0, "F1/random": 100.0, "accuracy/popular": 100.0, "yes/adversarial": 50.0}
    # Half of the labels are yes, so that yes to everything has precision 1/2 and recall 1: F1 is 2/3.
    assert score_files("pope", always, gold).figures["F1"].value == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes", "yes"), ("no", "no"), ("No, there is", "no"), ("There is not", "no"), ("NO", "yes"), ("", "yes")]
    + [
        ("Yes. No.", "yes"),
        ("nope", "yes"),
        ("It is,no", "yes"),
        ("is no dog.", "no"),
        ("cannot", "yes"),
        ("\nNo", "yes"),
    ],
)
def test_pope_reads_as_officially(text, read):
    assert pope_answer(text) == read


def pope(split, *pairs):
    return [Answer(Item(f"{split}/{n}", answer=gold, kind=split), said) for n, (said, gold) in enumerate(pairs)]


def test_pope_by_hand():
    # random: tp 1, fp 1, fn 1: F1 = 2/4. popular: tp 1, fp 0, fn 0: 1. Mean 3/4; pooled it would be 4/6.
    answers = pope("random", ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")) + pope(
        "popular", ("yes", "yes")
    )
    result = score_pope(answers, Settings())
    assert result.figures["F1"].value == 75.0
    assert result.figures["precision/random"].value == 50.0 and result.figures["accuracy/random"].value == 50.0
    assert "without adversarial" in result.notes["F1"]
    assert result.figures["F1/random"].low < 50 < result.figures["F1/random"].high


def test_pope_question_without_prediction_is_wrong():
    answers = [Answer(Item("random/1", answer=gold, kind="random"), "", given=False) for gold in ("yes", "no")]
    assert score_pope(answers, Settings()).figures["accuracy/random"].value == 0.0


def test_pope_of_one_deduplicated_file(tmp_path):
    rows = [
        "index\tcategory\tquestion\tanswer\tprediction",
        "1\trandom,popular\tq?\tYes\tyes",
        "2\tadversarial\tq?\tNo\tYes",
    ]
    path = tmp_path / "model_POPE.tsv"
    path.write_text("\n".join(rows) + "\n")
    result = score_files("pope", [path])
    assert [result.figures[f"F1/{split}"].value for split in SPLITS] == [100.0, 100.0, 0.0]


def test_pope_split_is_that_of_the_column_and_not_of_the_id(tmp_path):
    # As Hugging Face's copy has it: an id over all splits, the number within the split, and the split in a column.
    rows = [
        {"id": str(3 * place + n), "question_id": str(n), "category": split, "answer": "yes"}
        for place, split in enumerate(SPLITS)
        for n in range(3)
    ]
    message = [row | {"prediction": "no" if n == 8 else "yes"} for n, row in enumerate(rows)]
    result = score_files("pope", [write(tmp_path / "said.jsonl", message)])
    assert result.counts == {"answers": 9} | {f"questions/{split}": 3 for split in SPLITS}
    assert result.notes["F1"] == "mean of 3 splits"
    # Of the last split 2 of 3 are found and nothing else is told: precision 1, recall 2/3.
    assert [result.figures[f"F1/{split}"].value for split in SPLITS] == pytest.approx([100.0, 100.0, 80.0])
    # A column that tells no split leaves it to the next one, and ids that begin with it are whole.
    for row in message:
        row |= {"split": row.pop("category"), "category": "test"}
    assert score_files("pope", [write(tmp_path / "said.jsonl", message)]).figures == result.figures
    message = [{"id": f"{row['split']}/{row['question_id']}", "prediction": row["prediction"]} for row in message]
    assert score_files("pope", [write(tmp_path / "ours.jsonl", message)], [write(tmp_path / "g.jsonl", rows)]) == result


def test_pope_predictions_without_ids_go_by_the_questions_texts(tmp_path):
    gold = write(
        tmp_path / "coco_pope_random.json", [{"question_id": n, "text": f"q{n}", "label": "yes"} for n in (1, 2)]
    )
    said = write(
        tmp_path / "random.jsonl", [{"question": f"q{n}", "answer": "no" if n == 1 else "yes"} for n in (1, 2)]
    )
    assert score_files("pope", [said], [gold]).figures["recall/random"].value == 50.0
    write(said, [{"question": f"q{n}", "answer": "yes"} for n in (2, 1)])
    with pytest.raises(ValueError, match="lacks index or question_id"):
        score_files("pope", [said], [gold])


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes.", "yes"), (" no", "no"), ("Y", "yes"), ("n.", "no"), ("x", "other"), ("Yes, it is", "yes"), ("", "other")]
    + [("It is not", "other"), ("The answer is yes", "other"), ("now", "no"), ("not", "no"), ("a no", "no")],
)
def test_mme_reads_as_officially(text, read):
    assert mme_answer(text) == read


def mme(kind, image, *pairs):
    return [
        Answer(Item(f"{kind}/{image}/{n}", answer=gold, kind=kind, details={"image": image}), said)
        for n, (said, gold) in enumerate(pairs)
    ]


def test_mme_by_hand():
    # existence: 3 of 4 questions, 1 of 2 images: 75 + 50. code_reasoning: 1 of 2 and 0 of 1: 50 + 0.
    answers = mme("existence", "a", ("yes", "yes"), ("no", "no")) + mme("existence", "b", ("yes", "yes"), ("yes", "no"))
    answers += mme("code_reasoning", "a", ("maybe", "yes"), ("No", "no"))
    result = score_mme(answers, Settings())
    assert [result.figures[name].value for name in ("total", "perception", "cognition")] == [175.0, 125.0, 50.0]
    assert result.figures["existence/accuracy+"].value == 50.0 and result.counts["read_as_other"] == 1
    with pytest.raises(ValueError, match="have not two questions"):
        score_mme(answers[:-1], Settings())


def test_mme_text_files(tmp_path):
    (tmp_path / "OCR.txt").write_text("a.jpg\tIs it A?\tYes\tYes.\na.jpg\tIs it B?\tNo\tYes it is\n")
    result = score_files("mme", [tmp_path / "OCR.txt"])
    assert result.figures["OCR/accuracy"].value == 50.0 and result.figures["total"].value == 50.0
    (tmp_path / "ocr.txt").write_text("a.jpg\tIs it A?\tYes\tYes.\n")
    with pytest.raises(ValueError, match="'ocr' is none of MME's"):
        score_files("mme", [tmp_path / "ocr.txt"])


def test_no_split_is_refused(tmp_path):
    path = write(tmp_path / "said.jsonl", [{"question_id": 1, "answer": "yes"}])
    with pytest.raises(ValueError, match="of no split"):
        score_files("pope", [path], [path])
    assert task_of("pope").name == "pope"
    with pytest.raises(ValueError, match="expected one of chair, pope"):
        task_of("popes")
