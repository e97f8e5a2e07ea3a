"""COPY and ROUTE against transformers, which knows nothing of either.

COPY is the picture given once more in the prompt: transformers computes positions, visual tokens and logits of the
expanded prompt by itself. ROUTE is a sequence with some of those visual tokens left out: transformers takes embeddings
and position ids of what is kept, and its own attention weights say what that is.
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import qwenla_jax
from qwenla_jax.data.blocks import BlockOptions, picture_block
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.reattention.trigger import LookOptions
from qwenla_jax.sampling.logits import forbidden_bias
from qwenla_jax.sampling.loop import SampleOptions, sample
from qwenla_jax.train.logprobs import response_selection, response_states
from qwenla_jax.types import PictureBlock

TOLERANCE = 1e-4
CAP = 3
# Odd grids, two pictures, padded batches, rows without a picture, one to four KV heads, tied and untied.
SEEDS = [5, 12, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (3, 4, 7, 14, 15))]


def with_block(batch, arch, oracle, options=BlockOptions()):  # noqa: B008
    """The prompts with their pictures' blocks, padded by some slots."""
    blocks = []
    for q, grids in enumerate(oracle.cases[arch.case]):
        n = batch.length_Q[q]
        blocks.append(picture_block(batch.prompts.visual_QxP[q, :n], batch.prompts.pos_QxPx3[q, :n], grids, options))
    Q, X = len(blocks), max(len(b.source_X) for b in blocks) + 3
    N = max(len(grids) for grids in oracle.cases[arch.case])
    block = PictureBlock(
        np.full((Q, X), -1, np.int32),
        np.zeros((Q, X, 3), np.int32),
        np.zeros((Q, X), np.int32),
        np.array([len(b.source_X) for b in blocks], np.int32),
        np.array([b.span for b in blocks], np.int32),
        np.zeros((Q, N), np.int32),
    )
    for q, (b, grids) in enumerate(zip(blocks, oracle.cases[arch.case], strict=True)):
        n = len(b.source_X)
        block.source_QxX[q, :n], block.pos_QxXx3[q, :n], block.moves_QxX[q, :n] = b.source_X, b.pos_Xx3, b.moves_X
        block.tokens_QxN[q, : len(grids)] = [r * c for r, c in grids]
    return batch.prompts.replace(block=block)


def ids_of(arch):
    """<REFLECTION> and </REFLECTION>: two ordinary tokens stand for them."""
    return arch.vocab - 5, arch.vocab - 6


class Official:
    """One prompt at a time through transformers, as a sequence that grows."""

    def __init__(self, model, arch, batch, oracle):
        self.model, self.arch = model, arch
        self.rows = []
        pixels, thw = batch.hf["pixel_values"], batch.hf["image_grid_thw"]
        counts = [int(n) for n in thw.prod(-1)]
        firsts = [0, *itertools.accumulate(counts)]
        number = 0
        for q, grids in enumerate(oracle.cases[arch.case]):
            n = batch.length_Q[q]
            own = range(number, number + len(grids))
            number += len(grids)
            self.rows.append(
                SimpleNamespace(
                    prompt=batch.prompts.ids_QxP[q, :n].tolist(),
                    grids=grids,
                    pixels=[pixels[firsts[i] : firsts[i + 1]] for i in own],
                    thw=[thw[i] for i in own],
                )
            )

    def expand(self, q, response, tags=CAP):
        """Token ids of prompt and response with the pictures before the first tags, and the slot of each token."""
        row, ids, slots, used = self.rows[q], list(self.rows[q].prompt), [], 0
        image, start, end = self.arch.vocab - 1, self.arch.vocab - 3, self.arch.vocab - 4
        for token in response:
            if token == ids_of(self.arch)[0] and used < tags and row.grids:
                for r, c in row.grids:
                    ids += [start, *[image] * (r * c), end]
                used += 1
            slots.append(len(ids))
            ids.append(int(token))
        return ids, slots, used

    def logits(self, q, response, tags=CAP):
        """What predicts each token of the response, and the token after it: float32 [R + 1, V]."""
        import torch

        row = self.rows[q]
        ids, slots, used = self.expand(q, response, tags)
        ids_1xT = torch.tensor([ids])
        inputs = {}
        if row.grids:
            inputs = {
                "pixel_values": torch.cat(row.pixels * (1 + used)),
                "image_grid_thw": torch.stack(row.thw * (1 + used)),
            }
        with torch.no_grad():
            out = self.model(
                input_ids=ids_1xT,
                attention_mask=torch.ones_like(ids_1xT),
                mm_token_type_ids=(ids_1xT == self.arch.vocab - 1).to(torch.int32),
                **inputs,
            ).logits[0]
        return out[[len(row.prompt) - 1, *slots]].float().numpy()

    def greedy(self, q, tokens, bias_V):
        """Greedy continuation, the pictures given again as soon as a tag comes; no cache."""
        response = []
        for _ in range(tokens):
            # The tag that comes last has no block of its own yet when the next token is predicted: it gets it first.
            response.append(int(np.argmax(self.logits(q, response)[-1] + bias_V)))
        return response

    def routed(self, q, response, share):
        """Logits as above for ROUTE, and the sets of visual tokens that transformers' attention keeps."""
        import torch

        row, open_id = self.rows[q], ids_of(self.arch)[0]
        image = self.arch.vocab - 1
        language = self.model.model.language_model
        embed = self.model.get_input_embeddings()
        visual = None
        if row.grids:
            with torch.no_grad():
                found = self.model.model.get_image_features(torch.cat(row.pixels), torch.stack(row.thw))
            found = getattr(found, "pooler_output", found)
            visual = torch.cat(list(found)) if isinstance(found, list | tuple) else found

        def run(upto, kept):
            """All tokens up to response token `upto`, positions of the full expansion, what is not kept left out."""
            ids, slots, used = self.expand(q, response[:upto])
            ids_1xT = torch.tensor([ids])
            pos, _ = self.model.model.get_rope_index(
                ids_1xT,
                (ids_1xT == image).to(torch.int32),
                torch.stack(row.thw * (1 + used)) if row.grids else None,
                attention_mask=torch.ones_like(ids_1xT),
            )
            x = embed(ids_1xT)
            at = [i for i, token in enumerate(ids) if token == image]
            M = len(at) // (1 + used) if row.grids else 0
            for number, i in enumerate(at):
                x[0, i] = visual[number % M]
            left_out = {
                i for number, i in enumerate(at) if number >= M and number % M not in kept[number // M - 1]
            }
            stay = [i for i in range(len(ids)) if i not in left_out]
            back = {i: n for n, i in enumerate(stay)}
            with torch.no_grad():
                out = language(
                    inputs_embeds=x[:, stay],
                    position_ids=pos[:, :, stay],
                    attention_mask=torch.ones(1, len(stay), dtype=torch.int64),
                    output_attentions=True,
                )
                logits = self.model.lm_head(out.last_hidden_state)[0].float().numpy()
            attention_TxT = torch.stack(out.attentions).mean((0, 2))[0].numpy()
            return logits, attention_TxT, [back[s] for s in slots], at[:M]

        kept = []
        tags = [t for t, token in enumerate(response) if token == open_id][:CAP] if row.grids else []
        for t in tags:
            _, attention_TxT, slots, own = run(t, kept)
            score_M = attention_TxT[slots][:, own].sum(0) if slots else np.zeros(len(own))
            count = int(np.ceil(share * len(own)))
            kept.append(set(np.argsort(-score_M, kind="stable")[:count].tolist()))
        logits, _, slots, _ = run(len(response), kept)
        return logits[[len(row.prompt) - 1, *slots]], kept


def responses(arch, rows, length, seed):
    """Random responses in which 1 to 4 tags stand at different places in every row."""
    rng = np.random.default_rng([2308, seed])
    out = rng.integers(0, arch.vocab - 6, (rows, length)).astype(np.int32)
    for row in out:
        row[rng.choice(length - 1, int(rng.integers(1, 5)), replace=False)] = ids_of(arch)[0]
    return out


def ours(model, params, vision, prompts, ids_BxR, look, kept=None):
    """Logits that predict each response token, and what was kept."""

    @jax.jit
    def run(params, vision, prompts, ids_BxR):
        length_B = np.full(len(ids_BxR), ids_BxR.shape[1], np.int32)
        chosen = kept
        if chosen is None and look.inserts:
            chosen = response_selection(model, params, vision, prompts, ids_BxR, length_B, look, CAP)
        states = response_states(model, params, vision, prompts, ids_BxR, look, length_B, chosen)
        return logits_of(params, states), chosen

    return jax.device_get(run(params, vision, prompts, ids_BxR))


def look_options(arch, **changes):
    open_id, close_id = ids_of(arch)
    return LookOptions(**{"mode": "copy", "max_insertions": CAP, "open_id": open_id, "close_id": close_id} | changes)


@pytest.fixture
def case(oracle, saved):
    """A function: seed -> model of both sides with the same inputs."""

    def make(seed):
        arch = oracle.architecture(seed)
        official, folder = saved(arch)
        official.set_attn_implementation("eager")
        batch = oracle.inputs(arch)
        model, params = qwenla_jax.load(folder)
        prompts = with_block(batch, arch, oracle)
        return SimpleNamespace(
            arch=arch,
            hf=Official(official, arch, batch, oracle),
            model=model,
            params=params,
            vision=batch.vision,
            prompts=prompts,
            oracle=oracle,
        )

    return make


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_is_the_picture_given_again(case, seed):
    c = case(seed)
    Q = len(c.prompts.length_Q)
    ids_BxR = responses(c.arch, Q, 20, seed)
    logits, _ = ours(c.model, c.params, c.vision, c.prompts, ids_BxR, look_options(c.arch))
    blind, _ = ours(c.model, c.params, c.vision, c.prompts, ids_BxR, look_options(c.arch, mode="none"))
    for q in range(Q):
        expected = c.hf.logits(q, ids_BxR[q])[:-1]
        np.testing.assert_allclose(logits[q], expected, atol=TOLERANCE, rtol=0)
        if c.hf.rows[q].grids:
            assert np.abs(blind[q] - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_sampling_with_copy_is_greedy_over_the_expanded_prompt(case, seed):
    """The tag is made likely enough that it comes; rows get their pictures at different steps."""
    c = case(seed)
    Q, tokens = len(c.prompts.length_Q), c.oracle.tokens
    bias_V = forbidden_bias(c.arch.vocab, c.arch.vocab, range(c.arch.vocab - 4, c.arch.vocab))
    pictured = next(q for q, row in enumerate(c.hf.rows) if row.grids)
    while ids_of(c.arch)[0] not in c.hf.greedy(pictured, 24, bias_V):
        bias_V[ids_of(c.arch)[0]] += 0.5
    look = look_options(c.arch, rows_at_once=2)
    options = SampleOptions(1, tokens, 0.0, 1.0, (c.arch.vocab - 1,), look)
    run = jax.jit(functools.partial(sample, c.model, options))
    rollout = run(
        c.params, c.vision, c.prompts, bias_V, np.uint32(0), np.uint32(0), np.arange(Q, dtype=np.uint32)
    )
    expected = [c.hf.greedy(q, tokens, bias_V) for q in range(Q)]
    np.testing.assert_array_equal(rollout.ids_BxR, expected)
    tags = [row[:-1].count(ids_of(c.arch)[0]) for row in expected]
    assert tags[pictured] > 0
    for q, row in enumerate(c.hf.rows):
        assert rollout.inserted_B[q] == (min(tags[q], CAP) if row.grids else 0)
        assert rollout.refused_B[q] == tags[q] - rollout.inserted_B[q]


@pytest.mark.parametrize("seed", SEEDS)
def test_route_is_the_kept_tokens_at_their_positions(case, seed):
    c = case(seed)
    Q = len(c.prompts.length_Q)
    ids_BxR = responses(c.arch, Q, 20, seed)
    results = {}
    for form in ("compact", "bias"):
        look = look_options(c.arch, mode="route", share=0.5, form=form)
        results[form], kept_BxExX = ours(c.model, c.params, c.vision, c.prompts, ids_BxR, look)
    np.testing.assert_allclose(results["compact"], results["bias"], atol=TOLERANCE, rtol=0)
    whole, _ = ours(c.model, c.params, c.vision, c.prompts, ids_BxR, look_options(c.arch))
    for q in range(Q):
        expected, kept = c.hf.routed(q, ids_BxR[q].tolist(), 0.5)
        np.testing.assert_allclose(results["compact"][q], expected[:-1], atol=TOLERANCE, rtol=0)
        source_X = c.prompts.block.source_QxX[q]
        own = np.flatnonzero(c.prompts.visual_QxP[q] >= 0)
        for e, want in enumerate(kept):
            slots = source_X[np.flatnonzero(kept_BxExX[q, e])]
            assert {int(np.searchsorted(own, s)) for s in slots if s in own} == want
        if any(len(want) < len(own) for want in kept):
            assert np.abs(results["compact"][q] - whole[q]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("seed", SEEDS[1:2])
def test_the_ends_of_route(case, seed):
    """All of the tokens are COPY, none of them is text alone."""
    c = case(seed)
    ids_BxR = responses(c.arch, len(c.prompts.length_Q), 16, seed)
    run = functools.partial(ours, c.model, c.params, c.vision, c.prompts, ids_BxR)
    for form in ("compact", "bias"):
        all_of_it, _ = run(look_options(c.arch, mode="route", share=1.0, form=form))
        np.testing.assert_array_equal(all_of_it, run(look_options(c.arch))[0])
        none_of_it, _ = run(look_options(c.arch, mode="route", share=0.0, form=form))
        np.testing.assert_array_equal(none_of_it, run(look_options(c.arch, mode="none"))[0])
