"""CHAIR against the official scorer's figures on real captions, and by hand on small ones.

Oracle: figures that the official scorer gives for three published files of captions; singulars by its library; hand
counts.
"""

import json
import random
import re

import pytest
from nltk.tokenize import NLTKWordTokenizer

from qwenla_jax.evals.benchmarks import chair as chair_module
from qwenla_jax.evals.benchmarks.chair import (
    ChairCounts,
    chair,
    count,
    mentions,
    parse_synonyms,
    read_synonyms,
    true_objects,
    words_of,
)
from qwenla_jax.evals.benchmarks.chair_singular import singular
from qwenla_jax.evals.registry import score_files
from qwenla_jax.evals.task import Settings

KNOWN = {
    "Instruction2_llava": (10.55, 32.70, 9956, 1050, 654),
    "Instruction2_mplug": (14.83, 25.40, 5353, 794, 508),
    "Instruction1_minigpt-4": (9.19, 31.50, 14475, 1330, 630),
}
OWN = read_synonyms()


@pytest.mark.parametrize("name", KNOWN)
def test_real_captions(shared_data, name):
    folder = shared_data / "hallucination"
    settings = Settings(missing="leave_out", synonyms=folder / "chair_synonyms.txt")
    result = score_files("chair", [folder / f"captions_{name}.json"], [folder / "chair_ground_truth.json"], settings)
    chair_i, chair_s, named, wrong, captions = KNOWN[name]
    assert round(result.figures["CHAIR_i"].value, 2) == chair_i
    assert round(result.figures["CHAIR_s"].value, 2) == chair_s
    assert (result.counts["mentions"], result.counts["hallucinated_mentions"]) == (named, wrong)
    assert result.counts["hallucinating_captions"] == captions
    assert result.counts["captions"] == 2000 and result.counts["without_prediction_left_out"] == 483
    assert result.notes["scored_text"] == "the whole prediction"


# What clips' library `pattern` gives, its mistakes among them.
SINGULARS = """buses bus | bus bu | glass glas | glasses glass | ties ty | skis ski | canoes cano | collies collies
women woman | people person | children child | geese goose | knives knife | mice mouse | puppies puppy | benches bench
shoes shoe | scissors scissors | luggage luggage | pizza pizza | dishes dish | trolleys trolley | buns bun | calves calf
gloves glove | stoves stove | leaves leaf | potatoes potato | vases vase | houses house | cookies cookies | is is
horses horse | sandwiches sandwich | surfboards surfboard | boxes box | taxi taxi | cacti cactus | data datum
policemen policeman | oxen ox | series series | roses rose | slices slice | mans man | s s | movies movie | dogs' dog's
olives olife | species species | news news | analyses analysis | this thi | four fmy"""


@pytest.mark.parametrize("pair", [pair.split() for line in SINGULARS.split("\n") for pair in line.split("|")])
def test_singulars(pair):
    assert singular(pair[0]) == pair[1]


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A bus.", []),  # "bu" is no bus
        ("Two buses.", ["bus"]),
        ("A dog, a dog and DOGS!", ["dog", "dog", "dog"]),  # mentions, not objects
        ("A hot dog on a table.", ["hot dog", "dining table"]),
        ("A baby elephant and an adult bear.", ["elephant", "bear"]),
        ("A baby.", ["person"]),
        ("A passenger train at the stop sign.", ["train", "stop sign"]),
        ("A bow tie, three ties.", ["tie"]),
        ("A toilet seat.", ["toilet"]),
        ("A toilet beside a seat.", ["toilet"]),
        ("A seat.", ["chair"]),
        ("A wine glass, two wine glasses.", ["wine glass", "wine glass"]),
        ("It is a cat. A dog sits", ["cat", "dog"]),
        ("a cat.A dog", ["dog"]),  # one word: cat.A
        ("the man's cell phone", ["person", "cell phone"]),
        ("A teddy bear (with scissors)", ["teddy bear", "scissors"]),
        ("a motor bike", ["motorcycle"]),
        ("", []),
    ],
)
def test_mentions_by_hand(caption, named):
    assert mentions(caption, OWN) == named


def test_words_are_those_of_the_slow_expressions(shared_data):
    """Oracle: NLTK's rules on the text as it stands, and sentences by the expression that tries each mark of a run."""
    slow = re.compile(r"[.?!]+[\"')\]}]*(?=\s)")
    rules, rng = NLTKWordTokenizer(), random.Random(0)
    pieces = "a dog can't 'tis dogs' e.g. mr. . ? ! ... ' '' \" ( ) ] } -- , 1,2 gonna".split()
    pieces += [" ", "   ", "\n", " \n  \n", "\t", "\u2003 "]
    texts = [rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randrange(14))) for _ in range(2_000)]
    captions = (shared_data / "hallucination" / "captions_Instruction2_mplug.json").read_text().splitlines()
    for text in [*texts, *captions[:300]]:
        text = text.lower()
        assert [m.span() for m in chair_module._SENTENCE_END.finditer(text)] == [m.span() for m in slow.finditer(text)]
        sentences = chair_module._sentences(text)
        assert words_of(text) == [word for sentence in sentences for word in rules.tokenize(sentence)], text


def test_synonyms_lines_as_officially():
    result = parse_synonyms(["bicycle, bike", "car,  limo, iPhone", "bus, bike"], "here").object_of
    # The later line wins; " limo" keeps its blank and "iPhone" its capital, so no word meets them.
    assert result == {"bicycle": "bicycle", "bike": "bus", "car": "car", " limo": "car", "iPhone": "car", "bus": "bus"}
    with pytest.raises(ValueError, match="holds no synonyms"):
        parse_synonyms(["", " "], "here")


def test_own_table_has_the_80_categories():
    assert len(set(OWN.object_of.values())) == 80


def test_numbers_by_hand():
    # 3 + 1 mentions, 1 of them wrong; true objects 2 + 2, of which 2 and 1 are named.
    synonyms = parse_synonyms(["cat", "dog", "cow"], "here")
    counts = [count("A cat, a dog and a cow", ["cat", "dog"], synonyms), count("a cow", ["cow", "cat"], synonyms)]
    assert counts == [ChairCounts(3, 1, 2, 2), ChairCounts(1, 0, 1, 2)]
    figures, counted = chair(counts)
    assert (figures["CHAIR_i"].value, figures["CHAIR_s"].value, figures["Recall"].value) == (25.0, 50.0, 75.0)
    # Ratio 1/4: residuals 1 - 3/4 and 0 - 1/4, squared and summed 1/8, times 2/1, root 1/2; over 4: 0.125 x 1.96.
    assert figures["CHAIR_i"].high == pytest.approx(25 + 12.5 * 1.959964)
    assert figures["CHAIR_i"].low == pytest.approx(25 - 12.5 * 1.959964)
    assert counted["captions_without_mention"] == 0
    assert str(chair([ChairCounts(0, 0, 0, 1)])[0]["CHAIR_i"]).startswith("nan")


def test_coco_files_are_the_ground_truth(tmp_path):
    # Oracle: by hand. Image 1 has a cat by its boxes and a dog by a caption; image 2 nothing.
    instances = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 7}],
    }
    captions = {"images": [{"id": 1}, {"id": 2}], "annotations": [{"image_id": 1, "caption": "Two dogs."}]}
    for name, content in (("instances", instances), ("captions", captions)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows = [{"image_id": 1, "caption": "A cat and a dog."}, {"image_id": 2, "caption": "A cat."}]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gold = [tmp_path / "instances.json", tmp_path / "captions.json"]
    result = score_files("chair", [tmp_path / "said.jsonl"], gold)
    assert result.counts["mentions"] == 3 and result.counts["hallucinated_mentions"] == 1
    assert result.figures["Recall"].value == 100.0
    assert "not comparable" in result.notes["synonyms"]
    with pytest.raises(ValueError, match="instances alone; expected instances and captions"):
        score_files("chair", [tmp_path / "said.jsonl"], gold[:1])
    for odd, message in (
        ({"annotations": [{"image_id": 1, "caption": ["a dog"]}]}, None),
        ({"annotations": [{"image_id": 1, "caption": 5}]}, None),
        ({"annotations": [{"caption": "a dog"}]}, "row 1: not COCO's annotations: lacks 'image_id'"),
        ({"annotations": 5}, "row 1: not COCO's annotations: 'int' object"),
        ({"annotations": [], "categories": [{"id": [], "name": "cat"}]}, "row 1: not COCO's annotations: unhashable"),
        ({"annotations": [], "categories": [{"id": 7, "name": "cat"}], "images": [5]}, "not COCO's annotations: 'int'"),
    ):
        (tmp_path / "captions.json").write_text(json.dumps(odd))
        if message is None:
            score_files("chair", [tmp_path / "said.jsonl"], gold)
            continue
        with pytest.raises(ValueError, match=message):
            score_files("chair", [tmp_path / "said.jsonl"], gold)


def test_true_objects_refuse_an_unknown_category():
    with pytest.raises(ValueError, match="lacks the category 'door'"):
        true_objects(["door"], [], OWN)
