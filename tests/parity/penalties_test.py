"""Penalties and log-probabilities against transformers' own loop: several settings in one engine at once."""

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwenla_jax
from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.inference.ask import check_checkpoint
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.weights.hub import EMBEDDED

SETTINGS = ((0.0, 0.0, 1.0), (0.0, 0.0, 1.3), (1.5, 0.0, 1.0), (0.0, 0.5, 1.0), (0.8, 0.3, 1.15), (-0.4, -0.1, 1.05))
TOP = 20


class OpenAI(LogitsProcessor):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c[j] times that the response has token j."""

    def __init__(self, presence, frequency, prompt):
        self.presence, self.frequency, self.prompt = presence, frequency, prompt

    def __call__(self, input_ids, scores):
        c = torch.nn.functional.one_hot(input_ids[:, self.prompt :], scores.shape[1]).sum(1)
        return scores - c * self.frequency - (c > 0) * self.presence


def continued(model, inputs, settings, suppressed, tokens, **more):
    """transformers' greedy continuation of one prompt under presence, frequency and repetition penalty."""
    presence, frequency, repetition = settings
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=suppressed,
            repetition_penalty=repetition,
            logits_processor=LogitsProcessorList([OpenAI(presence, frequency, inputs["input_ids"].shape[1])]),
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )


def test_greedy_tokens_and_the_most_likely_ones(oracle, saved):
    arch = next(arch for arch in map(oracle.architecture, range(24)) if arch.case == "two images")
    official, folder = saved(arch)
    batch = oracle.inputs(arch)
    model, params = qwenla_jax.load(folder)
    hf, suppressed = batch.hf, list(range(arch.vocab - 4, arch.vocab))
    (I, S, C), M, P = batch.vision.patches_IxSxC.shape, batch.vision.gather_IxM.shape[1], batch.prompts.ids_QxP.shape[1]
    buckets = Buckets((I,), (S,), (M,), (P,), (2 * P,), 1, C)
    options = SampleOptions(1, oracle.tokens, 0.0, 1.0, (arch.vocab - 1,), penalties=True, top_logprobs=TOP)
    engine = Engine(model, params, options, buckets, 4, suppression_bias(arch.vocab, arch.vocab, suppressed), 7)
    tickets, ended = {}, {}
    for presence, frequency, repetition in SETTINGS:
        given = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
        asked = Request(batch.vision, batch.prompts, top_logprobs=TOP, **given)
        tickets[engine.submit(asked)] = presence, frequency, repetition
    logprobs = {ticket: [] for ticket in tickets}
    while engine.busy:
        for update in engine.step():
            logprobs[update.ticket] += update.logprobs[0]
            if update.rollout is not None:
                ended[update.ticket] = update.rollout.ids_BxR[0].tolist()
    said = set()
    for ticket, settings in tickets.items():
        out = continued(official, hf, settings, suppressed, oracle.tokens, min_new_tokens=oracle.tokens, pad_token_id=0)
        want = out.sequences[0, P:].tolist()
        assert ended[ticket] == want
        said.add(tuple(want))
        logits = torch.cat(out.logits).double()
        logits[:, suppressed] = -torch.inf
        logp = torch.log_softmax(logits, -1).numpy()
        got = logprobs[ticket]
        np.testing.assert_allclose([one.logprob for one in got], logp[range(len(want)), want], atol=1e-5)
        for one, logp_V in zip(got, logp, strict=True):
            ids, values = zip(*one.top, strict=True)
            np.testing.assert_allclose(values, np.sort(logp_V)[::-1][:TOP], atol=1e-5)
            np.testing.assert_allclose(values, logp_V[list(ids)], atol=1e-5)
    assert len(said) == len(SETTINGS)


def test_ask_with_the_shipped_checkpoint():
    scene, question = make_scene(7, 5, 2), "What color is the largest object?"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(EMBEDDED), qwenla_jax.load(EMBEDDED)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(EMBEDDED)(images=[scene.image], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    visual = int(pixels["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * visual), return_tensors="pt")["input_ids"]
    kind = (ids == checkpoint.config.image_token_id).to(torch.int32)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kind, **pixels}
    suppressed, said = list(check_checkpoint(checkpoint)[0].ids.suppressed()), set()
    for settings in ((0.0, 0.0, 1.0), (2.0, 2.0, 1.6), (-2.0, -2.0, 1.0), (0.0, 0.0, 0.6)):
        want = continued(model, inputs, settings, suppressed, 40).sequences[0, ids.shape[1] :].tolist()
        penalties = dict(zip(("presence_penalty", "frequency_penalty", "repetition_penalty"), settings, strict=True))
        got = qwenla_jax.ask(checkpoint, scene.image, question, reattention="none", max_new_tokens=40, **penalties)
        assert got.token_ids == want
        said.add(tuple(want))
    assert len(said) == 4
