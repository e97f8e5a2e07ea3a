"""Scenes: a pure function of (seed, split, index), drawn as declared, and questions whose answers are right."""

import re
import subprocess
import sys

import numpy as np
import pytest
from answers_anew import GRAMMAR, recount

from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.synthetic.scene_questions import KINDS, ask
from qwenla_jax.data.synthetic.scenes import make_scene, render
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts
from qwenla_jax.text.tokenizer import train_tiny_tokenizer

N = 400


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(3, 0, i) for i in range(N)]


@pytest.fixture(scope="module")
def asked(scenes):
    return [ask(scene, 3, 0, i) for i, scene in enumerate(scenes)]


def test_another_process_draws_the_same():
    code = (
        "import hashlib; from qwenla_jax.data.synthetic.source import SceneSource\n"
        "records = [SceneSource(5, 'train')[i] for i in (0, 7, 123456)]\n"
        "print(hashlib.sha256(b''.join(r.images[0].tobytes() + r.response.encode() for r in records)).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_splits_and_seeds_differ():
    images = {make_scene(seed, split, 0).image.tobytes() for seed in (0, 1) for split in (0, 1, 2)}
    assert len(images) == 6


def test_an_object_has_its_colour_at_its_centre(scenes):
    """Where nothing drawn later covers it: red, green and blue within shading, noise and jitter of what it says."""
    seen = 0
    for scene in scenes:
        pixels = np.asarray(scene.image, np.int16)
        for i, thing in enumerate(scene.objects):
            covers = [o for o in scene.objects[i + 1 :] if np.hypot(o.x - thing.x, o.y - thing.y) < 1.4 * o.radius + 2]
            if not covers:
                seen += 1
                assert np.abs(pixels[int(thing.y), int(thing.x)] - thing.rgb).max() <= 40, thing
    assert seen > N


def test_there_are_perception_errors_to_make(scenes):
    """Overlaps, several sizes, positions off any grid, noise that differs between equal scenes."""
    pairs = [(a, b) for s in scenes for i, a in enumerate(s.objects) for b in s.objects[i + 1 :]]
    overlapping = [np.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius for a, b in pairs]
    assert 0.03 < np.mean(overlapping) < 0.5
    assert len({round(thing.radius, 2) for s in scenes for thing in s.objects}) > 200
    one, two = (render(scenes[0].objects, np.random.default_rng(i)) for i in range(2))
    assert one.tobytes() != two.tobytes()


def test_answers_are_right(scenes, asked):
    for scene, item in zip(scenes, asked, strict=True):
        assert item.answer == recount(scene, item.question), item.question


def test_responses_keep_the_format_and_conclude_right(scenes, asked):
    reflecting = correcting = 0
    for scene, item in zip(scenes, asked, strict=True):
        match = GRAMMAR.fullmatch(item.response)
        assert match and match[2] == item.answer
        caption = re.search("<CAPTION>(.*?)</CAPTION>", item.response)[1]
        assert sorted(caption.split(", ")) == sorted(f"{t.size} {t.color} {t.shape}" for t in scene.objects)
        reasoning = re.search("<REASONING>(.*?)</REASONING>", item.response)[1]
        # The reasoning ends in its verdict: a wrong one only where a reflection follows that has the right one.
        verdict = re.split(": ", reasoning)[-1]
        assert (verdict == item.answer) == item.reasoning_right
        if not item.reasoning_right:
            assert match[1].endswith(f": {item.answer}</REFLECTION>")
        reflecting += match[1] is not None
        correcting += not item.reasoning_right
    assert abs(reflecting / N - 0.5) < 0.1
    assert abs(correcting / reflecting - 0.3) < 0.1


def test_of_brief_responses_only_reflections_describe(scenes):
    reflecting = 0
    for i, scene in enumerate(scenes):
        item = ask(scene, 3, 0, i, style="brief")
        assert (item.question, item.answer) == (ask(scene, 3, 0, i).question, recount(scene, item.question))
        match = GRAMMAR.fullmatch(item.response)
        assert match and match[2] == item.answer and item.reasoning_right
        before, _, reflection = item.response.partition("<REFLECTION>look again: ")
        described = sorted(f"{t.size} {t.color} {t.shape}" for t in scene.objects)
        assert re.search("<CAPTION>(.*?)</CAPTION>", before)[1] == f"{len(described)} objects"
        if match[1] is not None:
            reflecting += 1
            seen, _, verdict = reflection.partition("</REFLECTION>")[0].rpartition(": ")
            assert verdict == item.answer and sorted(seen.split(", ")) == described
    assert abs(reflecting / N - 0.5) < 0.1
    records = make_source("brief_scenes", "train", seed=1, size=3)
    for i in range(3):
        assert records[i].response == ask(make_scene(1, 2, i), 1, 2, i, style="brief").response


def test_kinds_and_answers_are_balanced(asked):
    kinds = {kind: [item.answer for item in asked if item.kind == kind] for kind in KINDS}
    assert all(0.13 < len(answers) / N < 0.27 for answers in kinds.values())
    for kind in ("existence", "compare"):
        assert 0.35 < np.mean([a == "yes" for a in kinds[kind]]) < 0.65
    for kind in ("count", "subtract", "attribute"):
        assert max(kinds[kind].count(a) for a in set(kinds[kind])) < 0.45 * len(kinds[kind])


def test_responses_are_short_for_the_tiny_tokenizer(asked):
    tokenizer = train_tiny_tokenizer(tokenizer_texts(300))
    lengths = [len(tokenizer.encode(item.response)) + 1 for item in asked]
    assert np.mean(lengths) < 45 and max(lengths) <= 64


def test_shares_change_the_response_and_not_the_question():
    plain, always = SceneSource(1, "train", 50, 0.0), SceneSource(1, "train", 50, 1.0, 1.0)
    for i in range(50):
        assert plain[i].question == always[i].question and plain[i].answer == always[i].answer
        assert "REFLECTION" not in plain[i].response and "REFLECTION" in always[i].response
