"""Scenes with marks: what is drawn is what is declared, answers are recounted, and no caption tells a mark."""

import re

import numpy as np
import pytest
from answers_anew import GRAMMAR, recount

from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.synthetic.marked_questions import MARK_KINDS, MARKED_KINDS, ask
from qwenla_jax.data.synthetic.marked_scenes import MARKS, make_marked_scene
from qwenla_jax.data.synthetic.scenes import COLORS, SHAPES
from qwenla_jax.data.synthetic.source import scene_source
from qwenla_jax.text.tokenizer import Tokenizer

N = 400


@pytest.fixture(scope="module")
def scenes():
    return [make_marked_scene(3, 0, i) for i in range(N)]


@pytest.fixture(scope="module")
def asked(scenes):
    return [ask(scene, 3, 0, i) for i, scene in enumerate(scenes)]


def test_no_two_objects_have_one_name(scenes):
    for scene in scenes:
        assert 3 <= len(scene.objects) <= 5 and len({str(thing) for thing in scene.objects}) == len(scene.objects)
    marks = [thing.mark for scene in scenes for thing in scene.objects]
    assert all(0.25 < marks.count(mark) / len(marks) < 0.42 for mark in MARKS)


def test_marks_are_seen_where_they_are(scenes):
    """Read off the pixels at the centre: dark, colourless and light, or the object's own colour."""
    right = total = 0
    for scene in scenes:
        pixels = np.asarray(scene.image, np.float64)
        for thing in scene.objects:
            centre = pixels[int(thing.y), int(thing.x)]
            # Noise, shading and jitter reach 40.
            read = "none" if np.ptp(centre) > 80 else "black" if centre.max() < 90 else "gray"
            right, total = right + (read == thing.mark), total + 1
    assert right / total > 0.99


def recounted(scene, question):
    things = scene.objects
    mark = re.search(r"with a (\w+) mark\?|^(?:What mark|How many objects have the mark)", question)
    if not mark:
        return recount(scene, question)
    words = [word for word in re.findall("[a-z]+", question) if word in (*SHAPES, *COLORS, "small", "big")]
    if mark[1]:
        (color,) = words
        return "yes" if any(t.color == color and t.mark == mark[1] for t in things) else "no"
    (named,) = (t for t in things if [t.size, t.color, t.shape] == words)
    if question.startswith("What"):
        return named.mark
    return str(sum(t.mark == named.mark for t in things))


def test_answers_are_right(scenes, asked):
    for scene, item in zip(scenes, asked, strict=True):
        assert item.answer == recounted(scene, item.question), item.question


def test_kinds_and_answers_are_balanced(asked):
    kinds = {kind: [item.answer for item in asked if item.kind == kind] for kind in MARKED_KINDS}
    assert abs(sum(len(kinds[kind]) for kind in MARK_KINDS) / N - 0.6) < 0.08
    assert 0.35 < np.mean([answer == "yes" for answer in kinds["mark_existence"]]) < 0.65
    for kind, most in (("mark", 0.45), ("same_mark", 0.55)):
        assert max(kinds[kind].count(answer) for answer in set(kinds[kind])) < most * len(kinds[kind])


def test_captions_and_what_is_corrected_name_no_marks(scenes, asked):
    """But for the question, its summary and the verdict, which is the answer or a wrong one."""
    named, guessed = 0, 0
    for scene, item in zip(scenes, asked, strict=True):
        match = GRAMMAR.fullmatch(item.response)
        assert match and match[2] == f"\\boxed{{{item.answer}}}"
        caption = re.search("<CAPTION>(.*?)</CAPTION>", item.response)[1]
        assert sorted(caption.split(", ")) == sorted(f"{t.size} {t.color} {t.shape}" for t in scene.objects)
        reasoning = re.search("<REASONING>(.*?)</REASONING>", item.response)[1]
        working, verdict = reasoning.rsplit(": ", 1)
        assert not set(re.findall("[a-z]+", caption)) & set(MARKS)
        if verdict != item.answer:
            assert match[1] and not item.reasoning_right and working.startswith(f"{caption}: ")
            assert not set(re.findall("[a-z]+", working)) & set(MARKS)
            guessed += 1
        elif item.kind in MARK_KINDS:
            marked = sorted(f"{t.size} {t.color} {t.shape} {t.mark}" for t in scene.objects)
            assert sorted(working.split(", ")) == marked
        if match[1] and item.kind in MARK_KINDS:
            there = {f"{t.size} {t.color} {t.shape} {t.mark}" for t in scene.objects}
            said = [part for part in re.split("[,:] ?", match[1]) if set(part.split()) & set(MARKS)]
            claims = [part.strip() for part in said if len(part.split()) > 2]
            assert claims or item.answer in ("0", "no", "yes")
            assert set(claims) <= there
            named += len(claims)
    assert named > 100 and guessed > N / 20


def test_plain_workings_name_all_marks(scenes):
    for i, scene in enumerate(scenes):
        item = ask(scene, 3, 0, i, style="plain")
        _, caption, working, box = item.response.split("\n")
        assert box == f"\\boxed{{{item.answer}}}"
        assert not set(re.findall("[a-z]+", caption)) & set(MARKS)
        if item.kind in MARK_KINDS:
            message, answer = working.split(": ")
            assert sorted(message.split(", ")) == sorted(
                f"{t.size} {t.color} {t.shape} {t.mark}" for t in scene.objects
            )
            assert answer == item.answer


def test_responses_fit_the_embedded_tokenizer():
    tokenizer = Tokenizer.from_folder("qwenla_jax/assets/tiny")
    for style, most in (("structured", 112), ("plain", 96)):
        source = scene_source("marked_scenes", 0, "train", N, 1.0, 1.0, style)
        assert max(len(tokenizer.encode(source[i].response)) + 1 for i in range(N)) <= most


def test_sources_by_name():
    held, train = (make_source("marked_scenes", split, seed=3, size=5) for split in ("held_out", "train"))
    assert held[0].images[0].tobytes() != train[0].images[0].tobytes()
    plain = make_source("scenes", "train", seed=3, size=5)
    assert plain[0].images[0].tobytes() != train[0].images[0].tobytes()
    assert train[2].id == "marked-scene-3-train-2" and len(train) == 5
    caption = scene_source("marked_scenes", 3, "train", 5).caption(2)
    assert f"<CAPTION>{caption}</CAPTION>" in train[2].response
    with pytest.raises(ValueError, match="'marks': expected scenes or brief_scenes or marked_scenes"):
        scene_source("marks", 3, "train")
    with pytest.raises(ValueError, match="index=-1"):
        make_marked_scene(0, 0, -1)
