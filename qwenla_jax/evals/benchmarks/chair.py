"""CHAIR: objects that a caption names and the image does not show (Rohrbach et al. 2018).

Paper, evaluation: CHAIR_i and CHAIR_s over captions of COCO 2014 images, of the text of `<CONCLUSION>` alone;
figure 1 adds Recall. As the official scorer does, the unit of CHAIR_i is a mention, not a distinct object.

Words are split by NLTK's own rules, which come with the package. Its sentence splitter needs trained data that does
not; here a sentence ends at . ? or ! before a blank, save after a few abbreviations. That matters only because the word
rules take a full stop off the last word of a sentence alone.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.evals.benchmarks.chair_singular import singular
from qwenla_jax.evals.result import Figure, ratio_figure
from qwenla_jax.utils.json_files import read_bytes

# Tried once at each run of marks, and without going back within it: time linear in the text.
_SENTENCE_END = re.compile(r"(?<![.?!])[.?!]++[\"')\]}]*+(?=\s)")
# NLTK's rules look at the blank on either side of a word alone, and take quadratic time for a run of them.
_BLANKS = re.compile(" {3,}")
_ABBREVIATIONS = frozenset("mr mrs ms dr st jr sr vs etc e.g i.e u.s a.m p.m inc corp ltd".split())
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
_PAIRS = (
    "motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,"
    "parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,"
    "mobile phone,teddy bear,hair drier,potted plant,bow tie,laptop computer,stove top oven,home plate,train track"
).split(",")

# The 80 categories of COCO with common words for each; ours. Figures of papers need the official file.
_CATEGORIES = """
person, man, woman, boy, girl, child, kid, baby, people, adult, guy, lady, player, rider, skier, surfer
bicycle, bike
car, taxi, van, sedan, suv, automobile
motorcycle, motorbike, motor bike, motor cycle, scooter, moped
airplane, plane, air plane, aircraft, jet, jetliner
bus, minibus
train, locomotive
truck, pickup, lorry, firetruck
boat, ship, sailboat, canoe, kayak, ferry, yacht
traffic light, traffic signal, stop light, street light, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench
bird, duck, goose, seagull, gull, pigeon, owl, swan, parrot, flamingo
cat, kitten
dog, puppy
horse, pony, foal
sheep, lamb, goat
cow, cattle, bull, calf, ox
elephant
bear, panda
zebra
giraffe
backpack, knapsack
umbrella, parasol
handbag, purse, briefcase
tie, bow tie, necktie
suitcase, suit case, luggage
frisbee
skis, ski
snowboard
sports ball, ball, football, basketball, soccerball
kite
baseball bat
baseball glove
skateboard
surfboard
tennis racket, racket
bottle
wine glass
cup, mug
fork
knife
spoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger
orange
broccoli
carrot
hot dog, hotdog
pizza
donut, doughnut, bagel
cake, cupcake, cheesecake
chair, seat, stool, armchair
couch, sofa, loveseat
potted plant, houseplant
bed
dining table, table, desk
toilet, urinal
tv, television, monitor
laptop, notebook, laptop computer
mouse
remote
keyboard
cell phone, mobile phone, phone, cellphone, smartphone
microwave
oven, stove
toaster
sink
refrigerator, fridge
book
clock
vase
scissors
teddy bear, teddybear
hair drier, hairdryer
toothbrush
"""


@dataclasses.dataclass(frozen=True)
class Synonyms:
    """Words for objects.

    Attributes:
      object_of: word or two-word name -> the object that it stands for.
      name: where they come from, for reports.
    """

    object_of: Mapping[str, str]
    name: str


def parse_synonyms(lines: Iterable[str], name: str) -> Synonyms:
    """Synonyms from lines "object, word, word, ..."; a word in two lines stands for the later one, as officially.

    Raises:
      ValueError: there is no line.
    """
    object_of: dict[str, str] = {}
    for line in lines:
        # Split at comma and one blank: an entry after two blanks keeps one and is never met, as in the official scorer.
        words = line.strip().split(", ")
        if words[0]:
            object_of |= dict.fromkeys(words, words[0])
    if not object_of:
        raise ValueError(f"{name}: holds no synonyms; expected lines such as 'bicycle, bike, cycle'")
    return Synonyms(object_of, name)


def read_synonyms(path: Path | None = None) -> Synonyms:
    """Synonyms of a file, or without one our own table of COCO's 80 categories, which gives other figures.

    Raises:
      ValueError: the file is missing, no text, or empty.
    """
    if path is None:
        return parse_synonyms(_CATEGORIES.strip().splitlines(), "own table")
    try:
        return parse_synonyms(read_bytes(path).decode("utf-8").splitlines(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as synonyms: {error}") from error


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, punctuation as words of its own.

    Raises:
      ValueError: nltk is not installed.
    """
    tokenizer = _tokenizer()
    sentences = [_BLANKS.sub("  ", sentence) for sentence in _sentences(caption.lower())]
    return [word for sentence in sentences for word in tokenizer.tokenize(sentence)]


def _sentences(text: str) -> list[str]:
    result, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        before = text[max(start, end.start() - 12) : end.start()].rsplit(maxsplit=1)
        if end[0] == "." and before and before[-1].lstrip("(\"'") in _ABBREVIATIONS:
            continue
        result.append(text[start : end.end()].strip())
        start = end.end()
    return [*result, text[start:].strip()]


@functools.cache
def _tokenizer() -> Any:
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ModuleNotFoundError as error:
        raise ValueError("CHAIR needs the package nltk: pip install 'qwenla_jax[evals]'") from error
    return NLTKWordTokenizer()


@functools.cache
def _double_words() -> Mapping[str, str]:
    """Two words -> the one that they count as."""
    result = {pair: pair for pair in _PAIRS}
    result |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
    result |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    return result | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


def mentions(caption: str, synonyms: Synonyms) -> list[str]:
    """The objects that a caption names, once for each mention, in order.

    Raises:
      ValueError: nltk is not installed.
    """
    words, joined = [singular(word) for word in words_of(caption)], []
    doubles, at = _double_words(), 0
    while at < len(words):
        double = doubles.get(" ".join(words[at : at + 2]))
        joined.append(double or words[at])
        at += 2 if double else 1
    # "toilet seat" is no chair; where both words stand apart, neither is the seat.
    drop_seat = "toilet" in joined and "seat" in joined
    return [
        synonyms.object_of[word] for word in joined if word in synonyms.object_of and not (drop_seat and word == "seat")
    ]


def true_objects(categories: Iterable[str], captions: Iterable[str], synonyms: Synonyms) -> frozenset[str]:
    """What an image shows: its annotated categories, and the objects of its human captions.

    Raises:
      ValueError: a category that no line of the synonyms holds; or as in `mentions`.
    """
    result = set()
    for category in categories:
        if category not in synonyms.object_of:
            raise ValueError(f"{synonyms.name}: lacks the category {category!r}")
        result.add(synonyms.object_of[category])
    return frozenset(result.union(*(mentions(caption, synonyms) for caption in captions)))


@dataclasses.dataclass(frozen=True)
class ChairCounts:
    """One caption: mentions, those of objects that are not there, true objects named and true objects."""

    mentions: int
    hallucinated: int
    recalled: int
    there: int


def count(caption: str, objects: Collection[str], synonyms: Synonyms) -> ChairCounts:
    """Counts of one caption against the image's objects."""
    named, there = mentions(caption, synonyms), frozenset(objects)
    return ChairCounts(len(named), sum(one not in there for one in named), len(there & set(named)), len(there))


def chair(counts: Sequence[ChairCounts]) -> tuple[dict[str, Figure], dict[str, int]]:
    """CHAIR_i, CHAIR_s, Recall in percent, and what was counted.

    Intervals: Wilson's for CHAIR_s; for the others the ratio's normal one over captions, which mentions come in.

    Raises:
      ValueError: there is no caption.
    """
    if not counts:
        raise ValueError("chair: there are no captions to score")
    bad = sum(one.hallucinated > 0 for one in counts)
    figures = {
        "CHAIR_i": ratio_figure([(one.hallucinated, one.mentions) for one in counts]),
        "CHAIR_s": Figure.of_counts(bad, len(counts)),
        "Recall": ratio_figure([(one.recalled, one.there) for one in counts]),
    }
    return figures, {
        "captions": len(counts),
        "hallucinating_captions": bad,
        "mentions": sum(one.mentions for one in counts),
        "hallucinated_mentions": sum(one.hallucinated for one in counts),
        "true_objects": sum(one.there for one in counts),
        "true_objects_named": sum(one.recalled for one in counts),
        "captions_without_mention": sum(one.mentions == 0 for one in counts),
    }
