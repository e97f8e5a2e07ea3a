"""Training with insertions: gradients and losses against sequences written out in full; where responses look."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from models import CLOSE, END, IMAGE, OPEN, START, VIDEO, VOCAB, looking_questions, small_model

from qwenla_jax.config.run_options import BrpoOptions, OptimOptions
from qwenla_jax.inference.attention_mass import attention_mass
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train.brpo.loss import brpo_loss
from qwenla_jax.train.brpo.update import RolloutBatch, make_brpo_gradient
from qwenla_jax.train.logprobs import response_logprobs
from qwenla_jax.train.optimizer import make_optimizer
from qwenla_jax.train.sft.update import make_sft_gradient, reattention_sft_loss
from qwenla_jax.train.train_runtime import stack_microbatches
from qwenla_jax.train.train_state import create, make_update
from qwenla_jax.types import ResponseBatch

Q, G, R, CAP, SHARE = 4, 3, 10, 2, 0.5
B = Q * G
BIAS = suppression_bias(VOCAB, VOCAB, [IMAGE, VIDEO, START, END])
COPY = ReattentionConfig("copy", max_insertions=CAP, open_id=OPEN, close_id=CLOSE)
ROUTE = dataclasses.replace(COPY, mode="route", keep_ratio=SHARE)
HIDING = dataclasses.replace(ROUTE, form="bias")
SHUT = dataclasses.replace(COPY, mode="vision_only")
FORMS = pytest.mark.parametrize("reattention", [ROUTE, HIDING], ids=["compact", "bias"])
SGD = OptimOptions(learning_rate=1e-3, warmup_ratio=0.0, clip_norm=None)
# Tags of a group's rows: none, one at the start, two side by side, one that stands last, more than the cap.
TAGS = ([], [0], [3, 4], [2, 9], [1, 4, 6, 7], [5, 8])


@functools.cache
def model():
    return small_model(initializer_range=0.2)


@functools.cache
def case(seed=0):
    """Vision, prompts, grids, responses and their lengths."""
    vision, prompts, grids = looking_questions(Q, seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, OPEN, (B, R)).astype(np.int32)
    length = rng.integers(R - 2, R + 1, B).astype(np.int32)
    for b in range(B):
        ids[b, TAGS[b % len(TAGS)]] = OPEN
    length[3] = length[4] = R
    return vision, prompts, grids, ids, length


def most(grids, b):
    return CAP if grids[b // G] else 0


@functools.cache
def chosen(seed=0):
    """What ROUTE keeps by its definition, for every row."""
    vision, prompts, grids, ids, length = case(seed)
    net, params = model()
    visual_ZxD = np.asarray(net.apply({"params": params}, vision, method="encode"))
    return [
        plain.sample_token(params, net.config.text, visual_ZxD, prompts, grids, b // G, ids[b, : length[b]], CAP, SHARE)
        for b in range(B)
    ]


def strange_kept(seed=0):
    """A choice that no attention made: what a rollout recorded is to be replayed, whatever it is."""
    _, prompts, grids, ids, length = case(seed)
    rng = np.random.default_rng(5)
    selected = []
    for b in range(B):
        tokens = sum(r * c for r, c in grids[b // G])
        pick = lambda: set(rng.permutation(tokens)[: plain.share_of(SHARE, tokens)].tolist())  # noqa: B023, E731
        selected.append([pick() for _ in range(CAP)])
    return selected


def as_slots(selected, seed=0):
    """Sets of visual tokens as bool [B, E, X], delimiters kept."""
    _, prompts, grids, _, _ = case(seed)
    block = prompts.block
    out = np.zeros((B, CAP, block.source_QxX.shape[1]), bool)
    for b in range(B):
        q = b // G
        visual = np.flatnonzero([s >= 0 and prompts.visual_QxP[q, max(s, 0)] >= 0 for s in block.source_QxX[q]])
        out[b, :, : block.length_Q[q]] = True
        for e in range(CAP):
            out[b, e, visual] = [j in selected[b][e] if e < len(selected[b]) else False for j in range(len(visual))]
    return out


def written(selected, seed=0):
    """Ids, positions, visual indexes; where each response token is predicted; which slots hold inserted images."""
    _, prompts, grids, ids, length = case(seed)
    rows = [
        plain.write_out(prompts, grids, b // G, ids[b, : length[b]], most(grids, b), selected and selected[b])
        for b in range(B)
    ]
    pred = np.zeros((B, R), np.int32)
    inserted = np.zeros((B, 64), bool)
    for b, row in enumerate(rows):
        pred[b, : length[b]] = [row.prompt - 1, *row.slot_R[:-1]]
        inserted[b, [i for slots in row.shown for i in slots]] = True
    return plain.stack(rows, 64), pred, inserted


def plain_logprobs(params, selected, blocked=False):
    """Log-probabilities [B, R] of the responses, from whole sequences without prefix, cache or splice.

    With `blocked` no gradient flows through inserted images.
    """
    net = model()[0]
    vision, _, _, ids_BxR, _ = case()
    (ids, pos, visual), pred, inserted = written(selected)
    variables = {"params": params}
    visual_ZxD = net.apply(variables, vision, method="encode")
    x = net.apply(variables, ids, visual, visual_ZxD, method="embed")
    x = jnp.where(inserted[..., None] & blocked, jax.lax.stop_gradient(x), x)
    hidden = net.apply(variables, x, pos, method="decode").hidden_BxTxD
    logits = logits_of(params, jnp.take_along_axis(hidden, pred[..., None], axis=1)) + BIAS
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids_BxR[..., None], axis=2)[..., 0]


def rollout_batch(selected):
    _, _, _, ids, length = case()
    rng = np.random.default_rng(1)
    return RolloutBatch(
        ids_BxR=ids,
        logp_BxR=(-3 * rng.random((B, R))).astype(np.float32),
        length_B=length,
        advantage_B=rng.normal(size=B).astype(np.float32),
        counted_B=np.ones(B, np.float32),
        trained_B=np.ones(B, np.float32),
        selected_BxExX=as_slots(selected),
    )


def gradient_of(step, state, *batch):
    """The gradient, read off AdamW's first moment after one update: (1 - b1) times it."""
    new, metrics = step(state, *batch, BIAS)
    mu = new.opt_state.inner_states["train"].inner_state[1][0].mu
    return jax.device_get((jax.tree.map(lambda m: m / 0.1, mu), metrics))


def assert_close(one, two, atol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@functools.cache
def brpo_gradient(reattention):
    net, params = model()
    vision, prompts, *_ = case()
    optimizer = make_optimizer(SGD, 10, params)
    step = make_update(make_brpo_gradient(net, BrpoOptions(group_size=G), 8, reattention=reattention), optimizer)
    reference = jax.tree.map(lambda x: x * 1.02, params)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (vision, prompts, rollout_batch(strange_kept())))
    step = jax.jit(step)
    return gradient_of(step, create(params, optimizer), reference, *batch)


@functools.cache
def plain_brpo():
    """Compiled: (parameters, blocked) -> loss and gradient."""
    batch, options = rollout_batch(strange_kept()), BrpoOptions(group_size=G)
    reference = plain_logprobs(jax.tree.map(lambda x: x * 1.02, model()[1]), strange_kept())
    mask = np.arange(R) < batch.length_B[:, None]

    def loss(params, blocked):
        logp = plain_logprobs(params, strange_kept(), blocked)
        value, _ = brpo_loss(
            logp, batch.logp_BxR, reference, batch.advantage_B, mask,
            beta=options.beta, clip_low=options.clip_low, clip_high=options.clip_high,
        )  # fmt: skip
        return value / B

    return jax.jit(jax.value_and_grad(loss))


@FORMS
def test_brpo_gradient_is_that_of_the_sequence_in_full(reattention):
    """Of all parameters; what the rollout recorded is replayed, whatever the parameters would choose now."""
    gradient, metrics = brpo_gradient(reattention)
    loss, want = plain_brpo()(model()[1], False)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    assert_close(gradient, want, 1e-5)
    assert min(np.abs(g).max() for g in jax.tree.leaves(want)) > 1e-4


def test_brpo_gradient_is_the_same_in_both_forms():
    (one, metrics), (two, other) = brpo_gradient(ROUTE), brpo_gradient(HIDING)
    assert_close(one, two, 1e-5)
    assert_close(metrics, other, 1e-5)


def test_inserted_images_carry_gradient_to_the_vision_tower():
    _, blocked = plain_brpo()(model()[1], True)
    gradient, _ = brpo_gradient(ROUTE)
    for got, cut in zip(jax.tree.leaves(gradient["visual"]), jax.tree.leaves(blocked["visual"]), strict=True):
        assert np.abs(got - cut).max() > 1e-3 * np.abs(got).max()


def sft_loss_of(reattention):
    vision, prompts, _, ids, length = case()
    responses = ResponseBatch(ids, length, np.zeros((B, CAP), np.int32))
    return lambda p: reattention_sft_loss(model()[0], p, vision, prompts, responses, BIAS, reattention)


@functools.cache
def plain_sft_gradient(routed):
    length = case()[-1]
    mask = np.arange(R) < length[:, None]
    selected = chosen() if routed else None
    loss = lambda p: -jnp.sum(plain_logprobs(p, selected) * mask)  # noqa: E731
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(model()[1]))


@pytest.mark.parametrize("reattention", [COPY, ROUTE, HIDING], ids=["copy", "compact", "bias"])
def test_sft_gradient_is_that_of_the_sequence_in_full(reattention):
    """What ROUTE keeps is computed within, and is what the definition says; inserted tokens carry no loss."""
    run = jax.jit(jax.value_and_grad(sft_loss_of(reattention), has_aux=True))
    (loss, (_, number)), gradient = run(model()[1])
    want, want_gradient = plain_sft_gradient(reattention is not COPY)
    assert number == case()[-1].sum()
    np.testing.assert_allclose(loss / number, want / number, atol=1e-5)
    assert_close(*(jax.tree.map(lambda g: g / number, g) for g in (gradient, want_gradient)), 1e-5)


def test_the_forced_token_carries_no_loss():
    _, (_, number) = jax.jit(sft_loss_of(SHUT))(model()[1])
    _, _, grids, ids, length = case()
    tags = [int((row[: n - 1] == OPEN).sum()) for row, n in zip(ids, length, strict=True)]
    forced = sum(min(n, most(grids, b)) for b, n in enumerate(tags))
    assert forced > 4 and number == length.sum() - forced


def test_the_tag_is_predicted_by_what_stands_before_the_images():
    """With other images put in, everything up to the first tag is as it was, the tag included."""
    net, params = model()
    vision, prompts, grids, ids, length = case()
    block = prompts.block
    # Text tokens of the prompt in the images' places.
    other = prompts.replace(
        block=block.replace(source_QxX=np.where(block.source_QxX >= 0, prompts.length_Q[:, None] - 1, -1))
    )
    selected = np.arange(block.source_QxX.shape[1]) < np.repeat(block.length_Q, G)[:, None, None]
    selected = np.repeat(selected, CAP, axis=1)
    run = jax.jit(
        lambda prompts: response_logprobs(net, params, vision, prompts, ids, BIAS, 1.0, COPY, length, selected)[0],
    )
    change = np.abs(np.asarray(run(prompts)) - np.asarray(run(other)))
    seen = 0
    for b in range(B):
        first = next((t for t in range(length[b] - 1) if ids[b, t] == OPEN), None) if grids[b // G] else None
        if first is None:
            assert not change[b].any()
            continue
        assert not change[b, : first + 1].any() and change[b, first + 1] > 1e-3
        seen += 1
    assert seen >= 5


def test_parts_of_a_batch_with_insertions_add_up():
    """The parts have other blocks: one image a prompt and two."""
    net, params = model()
    optimizer = make_optimizer(SGD, 10, params)
    one, two = looking_questions(2, 3, images=1), looking_questions(2, 4, images=2)
    _, _, _, ids, length = case()
    answers = [ResponseBatch(ids[at], length[at], np.zeros((2, CAP), np.int32)) for at in (slice(1, 3), slice(4, 6))]
    parts = stack_microbatches([(*one[:2], answers[0]), (*two[:2], answers[1])])
    assert parts[1].block.source_QxX.shape == (2, 2, 12) and (parts[1].block.source_QxX[0, :, 6:] == -1).all()
    step = jax.jit(make_update(make_sft_gradient(net, reattention=COPY), optimizer))
    blank = lambda n: parts[2].replace(length_B=np.where(np.arange(2)[:, None] == n, 0, parts[2].length_B))  # noqa: E731
    state = create(params, optimizer)
    (whole, metrics), (first, _), (second, _) = (
        gradient_of(step, state, *parts[:2], answer) for answer in (parts[2], blank(1), blank(0))
    )
    n, m = (float(answer.length_B.sum()) for answer in answers)
    assert metrics["num_tokens"] == n + m
    assert_close(whole, jax.tree.map(lambda a, b: (n * a + m * b) / (n + m), first, second), 1e-5)
    loss = jax.jit(lambda *b: reattention_sft_loss(net, params, *b, BIAS, COPY)[0])
    unpadded = loss(*one[:2], answers[0]) + loss(*two[:2], answers[1])
    np.testing.assert_allclose(metrics["loss"], unpadded / (n + m), rtol=1e-5)


@pytest.mark.parametrize("reattention", [TEXT_ONLY, COPY, ROUTE, HIDING], ids=["text", "copy", "compact", "bias"])
def test_attention_mass_is_that_of_the_attention_matrices(reattention):
    net, params = model()
    cfg = net.config.text
    vision, prompts, grids, ids, length = case()
    selected = [[set(range(9))] * CAP] * B if reattention is COPY else strange_kept()
    slots = as_slots(selected) if reattention.inserts else None
    run = jax.jit(lambda params: attention_mass(net, params, vision, prompts, ids, length, reattention, slots))
    mass = jax.device_get(run(params))
    visual_ZxD = np.asarray(net.apply({"params": params}, vision, method="encode"))
    inserted = 0
    for b in range(B):
        q, n = b // G, int(length[b])
        allowed = most(grids, b) if reattention.inserts else 0
        row = plain.write_out(prompts, grids, q, ids[b, :n], allowed, selected[b])
        mean_TxT = plain.attention(params, cfg, visual_ZxD, row).mean((0, 1))[row.slot_R]
        own = np.flatnonzero(row.visual_T[: row.prompt] >= 0)
        close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0)
        close(mass.original_BxR[b, :n], mean_TxT[:, own].sum(1))
        close(mass.image_BxRxP[b, :n, : row.prompt], mean_TxT[:, : row.prompt])
        assert not mass.image_BxRxP[b, :n, row.prompt :].any()
        seen_R = np.array(row.slot_R) + 1
        close(mass.even_original_BxR[b, :n], len(own) / seen_R)
        rest = [i for i in range(row.prompt, len(row.ids_T)) if row.visual_T[i] < 0]
        total = mass.image_BxRxP[b, :n].sum(1) + mean_TxT[:, rest].sum(1)
        again = {i: [j for at in row.shown for j in at if row.visual_T[j] == row.visual_T[i]] for i in own}
        paid = [mean_TxT[:, again.get(i, [])].sum(1) for i in range(row.prompt)]
        close(mass.again_BxRxP[b, :n, : row.prompt], np.stack(paid, axis=1))
        for e, at in enumerate(row.shown):
            close(mass.inserted_BxExR[b, e, :n], mean_TxT[:, at].sum(1))
            close(mass.even_inserted_BxExR[b, e, :n], [sum(i < s for i in at) / s for s in seen_R])
            total = total + mass.inserted_BxExR[b, e, :n]
            inserted += len(at)
        close(total, 1.0)
        assert not mass.inserted_BxExR[b, len(row.shown) :, :n].any()
        assert not mass.even_inserted_BxExR[b, len(row.shown) :, :n].any()
    assert bool(inserted) == reattention.inserts


@pytest.mark.parametrize("content", ["blank", "other", "pause"])
def test_controls_show_something_else_in_the_same_place(content):
    """Whole sequences with other visual tokens where the image would stand again: of empty patches, of the next frame,
    or none, so that the image's token itself is embedded."""
    net, params = model()
    vision, prompts, _, ids_BxR, length_B = case()
    (ids, pos, visual), pred, inserted = written(None)
    tokens = vision.gather_IxM.size
    shown = {"blank": visual + tokens, "other": (visual + vision.gather_IxM.shape[1]) % tokens, "pause": visual * 0 - 1}
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), vision)
    twice = dataclasses.replace(twice, patches_IxSxC=np.concatenate([vision.patches_IxSxC, 0 * vision.patches_IxSxC]))
    hidden = net.apply({"params": params}, twice, ids, pos, np.where(inserted, shown[content], visual))
    logits = logits_of(params, jnp.take_along_axis(hidden, pred[..., None], axis=1)) + BIAS
    want = jnp.take_along_axis(jax.nn.log_softmax(logits), ids_BxR[..., None], axis=2)[..., 0]
    reattention = dataclasses.replace(COPY, content=content)
    got, _ = jax.jit(
        lambda *args: response_logprobs(net, *args[:3], ids_BxR, BIAS, 1.0, reattention, length_B, args[3])
    )(params, vision, prompts, as_slots([[range(99)] * CAP] * B))
    counted = np.arange(R) < length_B[:, None]
    np.testing.assert_allclose(np.where(counted, got, 0), np.where(counted, want, 0), atol=2e-5)
    same = plain_logprobs(params, None)
    assert np.abs(np.where(counted, same - want, 0)).max() > 0.01


def test_no_control_shows_the_image_itself():
    """A batch of one image has no other one: what is predicted then is no number."""
    net, params = model()
    vision, prompts, _ = looking_questions(1, images=1)
    responses = np.array([[OPEN, 1, CLOSE, 2]], np.int32)
    reattention = dataclasses.replace(COPY, content="other")
    kept = np.ones((1, CAP, prompts.block.source_QxX.shape[1]), bool)
    args = net, params, vision, prompts, responses, BIAS, 1.0, reattention, np.array([4], np.int32), kept
    assert np.isnan(response_logprobs(*args)[0][0, 1:]).all()
