"""Questions and answers against transformers, which knows nothing of looking again.

Greedy text-only answers are those of its `generate`; with COPY they are greedy over the prompt in which the images
are given once more; attention is its own attention weights.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from official_question import Official
from PIL import Image

import qwenla_jax
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.inference.ask import Asker
from qwenla_jax.utils.compile_counter import CompileCounter

TINY = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
QUESTIONS = ("How many circles are there?", "What color is the big square?")
TOKENS = 48
CAP = 2


def opened(files):
    return [Image.open(file).convert("RGB") for file in files]


@pytest.mark.parametrize("index", range(2))
def test_text_alone_is_what_transformers_generates(index):
    scene, question = make_scene(7, 5, index), QUESTIONS[index]
    checkpoint = qwenla_jax.load(TINY, dtype="float32")
    answer = qwenla_jax.ask(checkpoint, scene.image, question, reattention="none", max_new_tokens=64)
    official = Official(TINY, [scene.image], question)
    expected = official.generate(64)
    assert answer.token_ids == expected
    assert answer.stopped == (expected[-1] in official.stop)
    assert answer.text == official.tok.decode([i for i in expected if i not in official.stop])
    assert answer.reattention == [] and answer.skipped == 0


@pytest.mark.parametrize(
    ("which", "question", "reflections"), [([1], QUESTIONS[0], CAP), ([0, 1], "Is there a red circle?", CAP + 1)]
)
def test_copy_is_the_prompt_with_the_images_given_again(reflecting, images, which, question, reflections):
    """Greedy tokens; then where it looked, and the attention that the images got."""
    files, number = [images[i] for i in which], len(which)
    official = Official(reflecting, opened(files), question)
    expected = official.greedy(TOKENS, CAP)
    assert expected[:-1].count(official.open) >= reflections, "the checkpoint of this test is to reflect often"
    checkpoint = qwenla_jax.load(reflecting)
    images = files[0] if number == 1 else files
    answer = qwenla_jax.ask(checkpoint, images, question, max_insertions=CAP, max_new_tokens=TOKENS)
    assert answer.token_ids == expected
    tags = [at for at, token in enumerate(expected) if token == official.open]
    assert [reattention.position for reattention in answer.reattention] == tags[:CAP]
    assert answer.skipped == len([at for at in tags[CAP:] if at < TOKENS - 1])
    assert not answer.stopped
    for reattention in answer.reattention:
        assert answer.text[reattention.offset :].startswith("<REFLECTION>")
        assert answer.text[: reattention.offset].count("<REFLECTION>") == answer.reattention.index(reattention)
        assert [(one.rows, one.cols) for one in reattention.images] == official.grids
        assert [one.image for one in reattention.images] == list(range(number))
        for one in reattention.images:
            assert one.selected == tuple((row, col) for row in range(one.rows) for col in range(one.cols))

    # Attention on visual tokens before and in each reflection, from transformers' own weights.
    ran = official.run(expected, CAP)
    visual = np.flatnonzero(ran.ids == official.image)
    own, again = visual[visual < len(official.prompt)], visual[visual >= len(official.prompt)]
    since = 0
    for reattention in answer.reattention:
        closed = next(at for at in range(reattention.position, TOKENS) if expected[at] == official.close)
        assert official.open not in expected[reattention.position + 1 : closed]
        spans = {"before": (since, reattention.position), "after": (reattention.position, closed + 1)}
        for name, (first, end) in spans.items():
            rows = ran.slots[first:end]
            got = getattr(reattention, name)
            even_own = np.mean([(own <= row).sum() / (row + 1) for row in rows])
            even_again = np.mean([(again <= row).sum() / (row + 1) for row in rows])
            paid_own = ran.attention[rows][:, own].sum(1).mean()
            paid_again = ran.attention[rows][:, again].sum(1).mean()
            np.testing.assert_allclose(
                [got.original, got.inserted, got.even_original, got.even_inserted],
                [paid_own, paid_again, even_own, even_again],
                atol=1e-5,
            )
            assert got.total == pytest.approx(paid_own + paid_again, abs=1e-5)
            assert got.ratio == pytest.approx((paid_own + paid_again) / (even_own + even_again), abs=1e-4)
        since = reattention.position
    assert answer.reattention[0].before.inserted == 0 and answer.reattention[0].before.ratio_inserted is None
    assert answer.reattention[0].after.inserted > 0


def test_route_keeps_the_most_attended_cells(reflecting, images):
    share = 0.4
    answer = qwenla_jax.ask(
        qwenla_jax.load(reflecting),
        list(images),
        QUESTIONS[1],
        reattention="route",
        keep_ratio=share,
        max_insertions=CAP,
        max_new_tokens=TOKENS,
    )
    official = Official(reflecting, opened(images), QUESTIONS[1])
    cells = [(n, *divmod(i, cols)) for n, (rows, cols) in enumerate(official.grids) for i in range(rows * cols)]
    reattention = answer.reattention[0]
    # What the tokens before the first tag attended to.
    ran = official.run(answer.token_ids[: reattention.position], 0)
    own = np.flatnonzero(ran.ids == official.image)
    best = np.argsort(-ran.attention[ran.slots][:, own].sum(0), kind="stable")[: math.ceil(share * len(own))]
    assert {(one.image, *cell) for one in reattention.images for cell in one.selected} == {cells[i] for i in best}
    for reattention in answer.reattention:
        assert reattention.selected_tokens == math.ceil(share * len(own)) and reattention.visual_tokens == len(own)
        for one in reattention.images:
            assert all(0 <= row < one.rows and 0 <= col < one.cols for row, col in one.selected)
            assert list(one.selected) == sorted(set(one.selected))


def test_asking_again_compiles_nothing(reflecting):
    checkpoint = qwenla_jax.load(reflecting)
    ask = lambda image, question: qwenla_jax.ask(  # noqa: E731
        checkpoint, image, question, max_insertions=CAP, max_new_tokens=TOKENS
    )
    scene = make_scene(7, 5, 2).image
    first = ask(scene, "How many?")
    again = qwenla_jax.load(reflecting)
    with CompileCounter() as compiled:
        other = ask(scene.resize((130, 100)), "Is there a big circle? Look at all of them.")
        checkpoint = again
        same = ask(scene, "How many?")
    assert compiled.count == 0
    assert first.token_ids == same.token_ids
    assert other.reattention[0].images[0].rows < other.reattention[0].images[0].cols


def test_a_seed_decides_at_a_temperature(reflecting):
    checkpoint = qwenla_jax.load(reflecting)
    scene = make_scene(7, 5, 3).image
    answers = [
        qwenla_jax.ask(
            checkpoint, scene, "Name all.", reattention="none", temperature=1.0, seed=seed, max_new_tokens=8
        ).token_ids
        for seed in (0, 0, 1, 2, 3)
    ]
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers))) > 1


def test_another_temperature_compiles_nothing_and_parts_make_the_text(reflecting):
    """The images of the last questions are encoded once."""
    checkpoint, scene = qwenla_jax.load(reflecting), make_scene(7, 5, 3).image
    options = {"max_insertions": CAP, "max_new_tokens": TOKENS}
    qwenla_jax.ask(checkpoint, scene, "Name all.", **options)
    with CompileCounter() as compiled:
        for temperature, top_p in ((0.5, 1.0), (1.0, 0.9)):
            parts = []
            asker = Asker(checkpoint, temperature=temperature, top_p=top_p, **options)
            first = asker.ask(scene, "Name all.", on_text=parts.append)
            assert "".join(parts) == first.text and len([part for part in parts if part]) > 2
            asker._engine._programs = asker._engine._programs._replace(encode=None)
            with pytest.raises(ZeroDivisionError):  # an interrupted answer is not given to the next question
                asker.ask(scene, "Name all.", on_text=lambda part: 1 / 0)
            assert (
                asker.ask(scene, "How many?").text
                == qwenla_jax.ask(checkpoint, scene, "How many?", temperature=temperature, top_p=top_p, **options).text
            )
    assert compiled.count == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "question: it is empty"),
        ({"question": "x\ud800"}, "question: it holds half of a character"),
        ({"system": "\udcff"}, "system: it holds half of a character"),
        ({"images": "none.png"}, "none.png: cannot be read: No such file"),
        ({"images": "/dev/zero"}, "/dev/zero: is no file"),
        ({"keep_ratio": 1.5}, "keep_ratio: got 1.5, expected a number from 0 to 1"),
        ({"reattention": "twice"}, "mode 'twice'"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"presence_penalty": 3.0}, "presence_penalty: got 3.0, expected -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a number above 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_pixels": 0}, "max_pixels: got 0"),
        ({"images": [3]}, r"images\[0\]: got int"),
        ({"images": Image.new("RGB", (900, 3))}, r"images\[0\]: an image's sides"),
        ({"images": Image.new("F", (9, 9))}, r"images\[0\]: an image of mode 'F'"),
    ],
)
def test_refuses(changes, message):
    arguments = {"images": make_scene(7, 5, 0).image, "question": "How many?"} | changes
    with pytest.raises(ValueError, match=message):
        qwenla_jax.ask(qwenla_jax.load(TINY), **arguments)


def test_refuses_checkpoints_that_lack_a_part():
    scene = make_scene(7, 5, 0).image
    whole = qwenla_jax.load(TINY)
    for part, message in (("tokenizer", "tokenizer.json"), ("processor", "preprocessor_config.json")):
        with pytest.raises(ValueError, match=message):
            qwenla_jax.ask(dataclasses.replace(whole, **{part: None}), scene, "How many?")
