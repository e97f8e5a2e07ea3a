"""What the length study measures of one arm, and which images its models were trained on.

Oracle: whole sequences run by the model without prefix, with positions written by hand; a sampler that returns answers
that the test wrote; the training's own batches.
"""

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.collate import collate_sft
from qwenla_jax.data.batching.loader import make_pipeline
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.inference.runtime import build
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.recipes.cold_start import PRESETS
from qwenla_jax.sampling.prefill import encode_prompts
from qwenla_jax.study import length_run
from qwenla_jax.study.length_arms import (
    ARMS,
    BLANK,
    CONDITIONS,
    COPY,
    OTHER,
    PAUSE,
    ROUTE_50,
    SIZES,
    TEXT,
    VISION,
    base_options,
    stage_options,
)
from qwenla_jax.study.length_measures import (
    answer_sampler,
    answer_tokens,
    continued,
    forced_programs,
    generated,
    given_questions,
    teacher_forced,
    told_after,
    told_tokens,
)
from qwenla_jax.study.length_run import trained_images
from qwenla_jax.types import Rollout

ROWS = 4


def source(keys="tokens=32", size=ROWS, seed=3):
    return make_source(f"length_scenes#{keys}", "held_out", seed=seed, size=size)


@pytest.fixture(scope="module")
def model():
    return build(InferenceConfig(batch_size=ROWS, max_response_tokens=144))


@pytest.mark.parametrize("keys", ["tokens=32", "tokens=64&order=paper&working=filler"])
def test_where_a_response_tells_what(model, keys):
    runtime, tok = model[0], model[0].tokenizer
    for index in range(ROWS):
        records = source(keys)
        record, example = records[index], runtime.example(with_response=True)(records[index])
        ids = example.ids_T[example.prompt_length :]
        marked = [f"{thing} {thing.mark}" for thing in records.scene(index).in_order()]
        told = tok.decode(ids[told_tokens(ids, tok)]).removeprefix("look again: ")
        assert told.split(", ") == marked
        assert told_after(record.response).removeprefix("look again: ").split(", ") == marked
        assert tok.decode(ids[answer_tokens(ids, tok)]) == record.answer
        cut, given, inserted = continued(example, runtime, example, None)
        assert given.endswith("<REFLECTION>" if "paper" in keys else "look again</REFLECTION><CAPTION>")
        assert record.response.startswith(given) and inserted == 0
        assert tok.decode(cut.ids_T[example.prompt_length :]) == given
        assert cut.prompt_length == len(cut.ids_T) == len(cut.pos_Tx3) == len(cut.visual_T)
        assert cut.next_pos == cut.pos_Tx3[-1, 0] + 1


@pytest.mark.parametrize(
    ("arm", "order"),
    [(arm, "after") for arm in (TEXT, PAUSE, BLANK, COPY, ROUTE_50, VISION, OTHER)]
    + [(COPY, "paper"), (VISION, "paper")],
)
def test_a_given_response_is_what_the_arm_writes_itself(model, arm, order):
    """The token behind it is as likely as where the whole response is scored, with insertions made at reflections."""
    arm = ARMS[arm]
    config = dataclasses.replace(model[0].config, reattention=arm.reattention)
    runtime, params, tok = dataclasses.replace(model[0], config=config), model[1], model[0].tokenizer
    records = source(f"tokens=32&order={order}&words={'yes' if arm.words else 'no'}")
    examples = [runtime.example(with_response=True)(records[index]) for index in range(ROWS)]
    score, _ = forced_programs(runtime, squeezed=False)
    vision, prompts, responses = runtime.collate_responses(examples, runtime.buckets(ROWS), ROWS)
    logp_BxR, *_ = score(params, vision, prompts, responses.ids_BxR, responses.length_B)
    given = given_questions(runtime, params, examples, score)
    assert {one.inserted for one in given} == {arm.inserted(16)}
    asked = dataclasses.replace(runtime, config=dataclasses.replace(config, max_prompt_tokens=272, max_images=2))
    vision, prompts = asked.collate_prompts([one.example for one in given], asked.buckets(ROWS), ROWS)
    last_QxD, *_ = jax.jit(lambda *args: encode_prompts(runtime.model, *args))(params, vision, prompts)
    got_QxV = jax.nn.log_softmax(logits_of(params, last_QxD) + runtime.logit_bias_V)
    for row, example in enumerate(examples):
        ids = example.ids_T[example.prompt_length :]
        at = len(tok.encode(given[row].prefix))
        assert tok.decode(ids[:at]) == given[row].prefix
        np.testing.assert_allclose(got_QxV[row, ids[at]], logp_BxR[row, at], atol=1e-4)


@pytest.mark.parametrize("squeezed", [False, True])
def test_scores_are_those_of_whole_sequences(model, squeezed):
    runtime, params = model
    records, tok = source(), runtime.tokenizer
    examples = [runtime.example(with_response=True)(records[index]) for index in range(ROWS)]
    vision, tokens = collate_sft(examples, runtime.buckets(ROWS), ROWS)
    pos = tokens.pos_BxTx3.astype(float)
    for row, example in enumerate(examples):
        if squeezed:  # by hand: the first token inside stands right behind the tag, each further one a tenth on
            ids = example.ids_T.tolist()
            first, end = (ids.index(tok.ids.tags[f"<{slash}REASONING>"]) for slash in ("", "/"))
            inside = end - first - 1
            pos[row, first + 1 : end] = pos[row, first, 0] + 1 + 0.1 * np.arange(inside)[:, None]
            pos[row, end:] += 0.1 * inside - inside
    hidden = jax.jit(runtime.model.apply)({"params": params}, vision, tokens.ids_BxT, pos, tokens.visual_BxT)
    logits = logits_of(params, hidden) + runtime.logit_bias_V
    logp_BxTxV = np.asarray(jax.nn.log_softmax(logits))
    got = teacher_forced(runtime, params, records, forced_programs(runtime, squeezed), 0 if squeezed else ROWS).numbers
    for row, example in enumerate(examples):
        ids = example.ids_T.tolist()
        logp = [0.0, *(logp_BxTxV[row, t, ids[t + 1]] for t in range(len(ids) - 1))]
        best = [-1, *logp_BxTxV[row].argmax(-1)]
        first, end = (ids.index(tok.ids.tags[tag]) for tag in ("<CAPTION>", "</CAPTION>"))
        words = {t: tok.decode([ids[t]]).strip() for t in range(first + 1, end)}
        colours = [t for t, word in words.items() if word in ("red", "yellow", "green", "blue", "purple")]
        marks = [t for t, word in words.items() if word in ("none", "black", "gray")]
        objects = len(records.scene(row).objects)
        assert len(colours) == len(marks) == objects == got["colours"][row] == got["marks"][row]
        assert got["right_colours"][row] == sum(best[t] == ids[t] for t in colours)
        assert got["right_marks"][row] == sum(best[t] == ids[t] for t in marks)
        np.testing.assert_allclose(got["logp_told"][row], sum(logp[first + 1 : end]), atol=2e-3)
        text = tok.decode(ids)
        box = len(ids) - 1 - ids[::-1].index(tok.encode("{")[0])
        assert text[text.rindex("{") :].startswith("{" + records[row].answer + "}")
        close = ids.index(tok.encode("}")[0], box)
        np.testing.assert_allclose(got["logp_answer"][row], sum(logp[box + 1 : close]), atol=2e-3)
    assert not got["inserted_tokens"].any()
    assert (got["tokens/in"] > 0).all() != squeezed and (got["mass/after"] > 0).all() != squeezed


def test_positions_are_squeezed_without_insertions_alone(model):
    config = dataclasses.replace(model[0].config, reattention=ReattentionOptions(mode="copy"))
    with pytest.raises(ValueError, match="text-only"):
        forced_programs(dataclasses.replace(model[0], config=config), squeezed=True)


@pytest.mark.parametrize("given", [True, False])
def test_answers_are_judged(model, given):
    """The first answer is the written one; then one object of another colour, a wrong answer, nothing at all."""
    runtime, params = model
    records, tok = source(), runtime.tokenizer
    written = [records[index].response for index in range(ROWS)]
    seen = [records.scene(index).in_order()[0] for index in range(ROWS)]
    other = "red" if seen[1].color != "red" else "blue"
    painted = f"{seen[1].size} {other} {seen[1].shape}"
    texts = [written[0], written[1].replace(str(seen[1]), painted), written[2].replace("boxed{", "boxed{x"), ""]
    cut = [text.partition("<CAPTION>")[2] if given else text for text in texts]

    def respond(prompts):
        ids = [[*tok.encode(text), tok.ids.im_end] for text in cut]
        ids_BxR = np.array([row + [0] * (200 - len(row)) for row in ids], np.int32)
        length_B = np.array([len(row) for row in ids], np.int32)
        questions = [tok.decode(prompts.ids_QxP[row, : prompts.length_Q[row]]) for row in range(ROWS)]
        assert all(question.endswith("<CAPTION>" if given else "assistant\n") for question in questions)
        none = np.zeros(ROWS, np.int32)
        return Rollout(ids_BxR, ids_BxR * 0.0, length_B, none == 0, none, none, np.ones((ROWS, 1, 18), bool))

    sampler = answer_sampler(runtime, 200, given)
    sampler.run = lambda params, batches: (respond(batch.prompts) for batch in batches)
    one = generated(runtime, params, records, sampler, given)
    got = one.numbers
    assert got["right"].tolist() == [1, 1, 0, 0]
    assert got["worked"].tolist() == [1, 1, 1, 1 if given else 0]
    assert got["reflections"].tolist() == [1, 1, 1, 1 if given else 0]
    objects = [len(records.scene(index).objects) for index in range(ROWS)]
    assert got["named"].tolist() == [*objects[:3], 0] and got["invented"].tolist() == [0, 1, 0, 0]
    assert got["missed"].tolist() == [0, 1, 0, objects[3]]
    assert got["details"].tolist() == [*objects[:3], 0] and got["wrong_details"].tolist() == [0, 1, 0, 0]
    assert got["inserted_tokens"].tolist() == [18] * 4
    assert got["tokens"].tolist() == [len(tok.encode(text)) + 1 for text in cut]
    assert written[0] in one.answers[0] and records[0].question in one.answers[0]


def test_images_of_a_training_are_those_of_its_batches():
    size = dataclasses.replace(SIZES["quick"], steps=3, scenes=6)
    options = stage_options(ARMS[COPY], CONDITIONS["short"], size, "tiny", seed=1)
    options = dataclasses.replace(options, data=dataclasses.replace(options.data, batch_size=4, length_group=2))
    records = make_source(options.data.source, "cold_start", seed=options.seed)
    batches = make_pipeline(
        records,
        lambda record: types.SimpleNamespace(ids_T=record.response, record=record),
        lambda examples: [example.record for example in examples],
        batch_size=4,
        seed=options.seed,
        group=2,
    )
    seen = {length_run._digest(record.images[0]) for batch in itertools.islice(batches, 3) for record in batch}
    trained = trained_images(options)
    assert len(seen) == 12 and seen <= trained and len(trained) == 16
    fresh = length_run._source(ARMS[TEXT], CONDITIONS["short"], size, 1, "chain", 16)
    assert not {length_run._digest(fresh.scene(index).image) for index in range(6)} & trained
    # Drawn from the training's own scenes, they are found.
    leaked = {length_run._digest(records[int(i)].images[0]) for i in length_run.batch_indices(1, 0, 6, len(records))}
    assert leaked <= trained


def test_arms_are_trained_alike():
    """Stage 4 differs between arms in what is put in, and in nothing else; the base model's scenes are others."""
    size = SIZES["full"]
    for condition in CONDITIONS.values():
        made = [stage_options(arm, condition, size, "base", 2) for arm in ARMS.values() if arm.trained]
        assert len({repr(one.reattention) for one in made}) == len(made) == 8
        alike = [dataclasses.replace(one, reattention=ReattentionOptions()) for one in made]
        words = [repr(one).replace("&words=no", "") for one in alike]
        assert len(set(words)) == 1 and len({repr(one) for one in alike}) == 2
        assert made[0].data.max_response_tokens >= condition.high + 100
    trainings = [PRESETS["working"](), PRESETS["long"]()]
    bases = [*trainings, *base_options(size.bases[1], 1, trainings, "first")]
    assert {one.seed for one in bases}.isdisjoint(range(size.seeds)) and len({one.seed for one in bases}) == 4
    assert [one.init_from for one in bases] == [None, None, "random:tiny", "first"]
    assert ["11-330" in one.data.source for one in bases] == [False, True, False, True]
    with pytest.raises(ValueError, match="another image is not trained"):
        stage_options(ARMS["another image"], CONDITIONS["short"], size, "base", 0)
