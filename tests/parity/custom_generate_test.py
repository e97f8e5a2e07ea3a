"""`custom_generate/generate.py` of an export beside our engine: re-attention written twice, in torch and in JAX.

It was written from the paper and the documentation, not from the package's code. Greedy tokens and what every insertion
shows are equal: of the shipped checkpoint, whose `<REFLECTION>` is made likelier on both sides, as it seldom writes one
greedily; and of random models of transformers. All of them, as a table:

    QWENLA_CUSTOM_GENERATE=10 python -m pytest -n0 -s tests/parity/custom_generate_test.py -k random_models
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from official import CAP, Ids, Official, ids_of, with_block
from PIL import Image

import qwenla_jax
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.collate import Buckets, collate_prompts, make_buckets
from qwenla_jax.data.batching.example import to_prompt_example
from qwenla_jax.data.images.preprocess import ImageLayout
from qwenla_jax.data.record import Record
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.weights.custom_generate import REQUIREMENTS, write_custom_generate

EMBEDDED = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
TRAINED = ReattentionOptions("route", keep_ratio=0.25, max_insertions=1)  # the settings of the export below
R = 24
COUNT = int(os.environ.get("QWENLA_CUSTOM_GENERATE", "0"))
# A batch of rows of one and of two images; a row without an image; a batch of Qwen3-VL's, with features for DeepStack.
SEEDS = (*range(COUNT), *range(100, 100 + COUNT)) if COUNT else (19, 7, 104)
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0) if COUNT else (0.25,)
MODES = [("none", 0.5), ("copy", 0.5), *(("route", ratio) for ratio in RATIOS)]


class Likelier(transformers.LogitsProcessor):
    """Adds a bias [V] to the logits, as our engine does."""

    def __init__(self, logit_bias_V):
        self.logit_bias_V = torch.from_numpy(logit_bias_V)

    def __call__(self, input_ids, scores):
        return scores + self.logit_bias_V


def engine_for(model, params, batch, prompts, options, logit_bias_V):
    """An engine for this one batch, whose requests choose mode and kept share."""
    (I, S, C), M, P = batch.patches_IxSxC.shape, batch.gather_IxM.shape[1], prompts.ids_QxP.shape[1]
    sizes = Buckets((I,), (S,), (M,), (P,), (2 * P,), prompts.block.tokens_QxN.shape[1], C)
    return Engine(model, params, options, sizes, len(prompts.length_Q), logit_bias_V, questions=len(prompts.length_Q))


def ours(engine, vision, prompts, modes):
    """For each of the modes the rows of the batch: tokens, and the visual tokens that each insertion shows."""
    Q = len(prompts.length_Q)
    requests = [Request(vision, prompts, np.arange(Q, dtype=np.uint32), reattention=mode) for mode in modes]
    result = [[None] * Q for _ in modes]
    for mode, q, rollout in engine.run(requests):
        own = np.flatnonzero(prompts.visual_QxP[q] >= 0).tolist()
        source_X = prompts.block.source_QxX[q]
        shown = [
            [own.index(s) for s, chosen in zip(source_X, selected_X, strict=False) if chosen and s in own]
            for selected_X in rollout.selected_BxExX[0, : rollout.inserted_B[0]]
        ]
        result[mode][q] = rollout.ids_BxR[0, : rollout.length_B[0]].tolist(), shown
    return result


def theirs(out, prompt, ends=()):
    """The same of what `generate` returned."""
    rows = []
    insertions_B = out.get("insertions", [[] for _ in out.sequences])
    for ids, insertions in zip(out.sequences[:, prompt:].tolist(), insertions_B, strict=True):
        stop = next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
        assert all(i.at < stop for i in insertions)
        rows.append((ids[:stop], [i.selected for i in insertions]))
    return rows


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped checkpoint in float32, exported with the settings of a training with ROUTE."""
    loaded = qwenla_jax.load(EMBEDDED, dtype="float32")
    files = {"tokenizer": loaded.tokenizer, "processor": loaded.processor}
    folder = tmp_path_factory.mktemp("exported") / "hf"
    return qwenla_jax.save(folder, loaded.model, loaded.params, **files, reattention=TRAINED), loaded


def pictures():
    """The images of four questions, squares and strips."""
    square, other = (make_scene(7, 5, index).image for index in (3, 4))
    strip = Image.new("RGB", (168, 112), (217, 217, 217))
    strip.paste(make_scene(7, 5, 5).image, (50, 0))
    return [[square], [other, strip], [strip], [strip, square, other]]


QUESTIONS = ("Is there a red circle?", "How many objects are there?", "What color is the largest object?", "Any?")


def shipped_inputs(folder):
    """transformers' inputs of the questions, padded on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    pixels = processor(images=[image for row in pictures() for image in row], return_tensors="pt")
    sizes = iter((pixels["image_grid_thw"].prod(-1) // 4).tolist())
    texts = []
    for row, question in zip(pictures(), QUESTIONS, strict=True):
        shown = "".join(f"<|vision_start|>{'<|image_pad|>' * next(sizes)}<|vision_end|>" for _ in row)
        texts.append(f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n")
    return {**tokenizer(texts, padding=True, return_tensors="pt"), **pixels}


def test_the_shipped_checkpoint(exported):
    """Through `model.generate`, several images a row, in all modes and with the settings of the export."""
    folder, loaded = exported
    v, tok = loaded.config.vision, loaded.tokenizer
    layout = ImageLayout(v.patch_size, v.spatial_merge_size, v.temporal_patch_size, v.window_size)
    records = [
        Record(str(n), tuple(row), question, "", None, "count")
        for n, (row, question) in enumerate(zip(pictures(), QUESTIONS, strict=True))
    ]
    examples = [to_prompt_example(record, tok, loaded.processor, layout) for record in records]
    vision, prompts = collate_prompts(
        examples, make_buckets(layout, 4, 112 * 112, 112 * 168, 128, 256, max_images=3), block=ReattentionOptions()
    )
    logit_bias_V = suppression_bias(loaded.config.text.vocab_size, tok.vocab_size, tok.ids.suppressed())
    logit_bias_V[tok.ids.reflection_open] += 9.0
    base = ReattentionConfig("copy", open_id=tok.ids.reflection_open, close_id=tok.ids.reflection_close)
    sampling = SampleOptions(1, 48, 0.0, 1.0, tok.ids.stop(), dataclasses.replace(base, mode="route", by_row=True))
    changes = [{"mode": "none"}, {"mode": "copy"}, {"mode": "route"}]
    changes.append({name: getattr(TRAINED, name) for name in ("mode", "keep_ratio", "max_insertions")})
    modes = [dataclasses.replace(base, **change) for change in changes]
    engine = engine_for(loaded.model, loaded.params, vision, prompts, sampling, logit_bias_V)
    expected = ours(engine, vision, prompts, modes)

    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    inputs = shipped_inputs(folder)
    P = inputs["input_ids"].shape[1]
    for q, n in enumerate(prompts.length_Q):
        assert inputs["input_ids"][q, P - n :].tolist() == prompts.ids_QxP[q, :n].tolist()
    # transformers' own greedy text is that of mode none.
    options = {"max_new_tokens": 48, "logits_processor": [Likelier(logit_bias_V)], "return_dict_in_generate": True}
    image = inputs["input_ids"] == tok.ids.image_pad
    plain = model.generate(**inputs, mm_token_type_ids=image.int(), **options)
    assert [ids for ids, _ in theirs(plain, P, tok.ids.stop())] == [ids for ids, _ in expected[0]]
    given = [
        {"reattention": mode.mode, "keep_ratio": mode.keep_ratio, "max_insertions": mode.max_insertions}
        for mode in modes[:-1]
    ]
    for settings, want in zip([*given, {}], expected, strict=True):
        out = model.generate(**inputs, custom_generate=str(folder), trust_remote_code=True, **options, **settings)
        assert theirs(out, P, tok.ids.stop()) == want, settings
        counts = [len(shown) for _, shown in want]
        assert (max(counts) == 0) == (settings.get("reattention") == "none"), counts
    assert len({tuple(ids) for mode in expected for ids, _ in mode}) > 10  # modes differ in what they write


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The file of an export as a module: for models that transformers wrote, which have no such file."""
    tokenizer = qwenla_jax.load(EMBEDDED).tokenizer
    folder = tmp_path_factory.mktemp("code")
    write_custom_generate(folder, tokenizer)
    spec = importlib.util.spec_from_file_location("exported_generate", folder / "custom_generate" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run(code, model, arch, hf, logit_bias_V, mode, ratio, **changes):
    """`generate` of a random model, 24 tokens."""
    settings = {"reattention": mode, "keep_ratio": ratio, "max_insertions": CAP, "reflection_token_id": ids_of(arch)[0]}
    settings |= {"max_new_tokens": R, "min_new_tokens": R, "pad_token_id": 0, "return_dict_in_generate": True}
    return code.generate(model, **hf, **{**settings, "logits_processor": [Likelier(logit_bias_V)], **changes})


@pytest.mark.parametrize("seed", SEEDS)
def test_random_models(oracle, saved, code, seed):
    """Greedy tokens and selected tokens, of prompts of several lengths and numbers of images."""
    arch = oracle.architecture(seed)
    official, folder = saved(arch)
    official.set_attn_implementation("sdpa")
    batch = oracle.inputs(arch)
    model, params = qwenla_jax.load(folder)
    prompts = with_block(batch, arch, oracle)
    open_id, close_id = ids_of(arch)
    logit_bias_V = suppression_bias(arch.vocab, arch.vocab, range(arch.vocab - 4, arch.vocab))
    while not any(run(code, official, arch, batch.hf, logit_bias_V, "copy", 0.5).insertions):
        logit_bias_V[open_id] += 0.5
    base = ReattentionConfig("copy", max_insertions=CAP, open_id=open_id, close_id=close_id)
    options = SampleOptions(1, R, 0.0, 1.0, (arch.vocab - 1,), dataclasses.replace(base, mode="route", by_row=True))
    engine = engine_for(model, params, batch.vision, prompts, options, logit_bias_V)
    modes = [dataclasses.replace(base, mode=mode, keep_ratio=ratio) for mode, ratio in MODES]
    expected = ours(engine, batch.vision, prompts, modes)
    P, differ = batch.hf["input_ids"].shape[1], []
    for (mode, ratio), want in zip(MODES, expected, strict=True):
        got = theirs(run(code, official, arch, batch.hf, logit_bias_V, mode, ratio), P)
        same = [
            a == b
            for (ids_R, _), (want_R, _) in zip(got, want, strict=True)
            for a, b in zip(ids_R, want_R, strict=True)
        ]
        insertions = sum(len(shown) for _, shown in want)
        print(f"{arch}: {mode} {ratio}: {sum(same)} of {len(same)} tokens, {insertions} insertions")
        assert bool(insertions) == (mode == "copy" or (mode == "route" and ratio > 0))
        differ += [] if got == want else [(mode, ratio)]
        # The model's own implementation of attention is back.
        assert official.model.language_model.config._attn_implementation == "sdpa"
    assert not differ


@torch.no_grad()
def test_sampled_text_is_that_of_the_expanded_prompt(oracle, code):
    """Logits of sampled responses, two a prompt, are those of a prompt in which the image stands again (COPY)."""
    arch = oracle.architecture(19)
    official, batch = oracle.build(arch), oracle.inputs(arch)
    reference = Official(official, Ids.of(arch), batch, oracle.cases[arch.case])
    logit_bias_V = np.zeros(arch.vocab, np.float32)
    logit_bias_V[ids_of(arch)[0]] = 3.0
    torch.manual_seed(4)
    options = {"do_sample": True, "num_return_sequences": 2, "output_logits": True, "top_k": 0}
    out = run(code, official, arch, batch.hf, logit_bias_V, "copy", 0.5, **options)
    logits_BxRxV = torch.stack(out.logits, 1).numpy()
    responses_BxR = out.sequences[:, batch.hf["input_ids"].shape[1] :].numpy()
    assert len({tuple(i.at for i in insertions) for insertions in out.insertions}) > 3
    for b, response_R in enumerate(responses_BxR):
        want = reference.logits(b // 2, response_R)[:-1].numpy()
        np.testing.assert_allclose(logits_BxRxV[b], want, atol=1e-4, rtol=0)
    greedy = run(code, official, arch, batch.hf, logit_bias_V, "route", 0.5)
    top = run(code, official, arch, batch.hf, logit_bias_V, "route", 0.5, do_sample=True, top_k=1)
    assert torch.equal(greedy.sequences, top.sequences) and any(greedy.insertions)


def test_limits(oracle, code):
    """Of insertions and of inserted tokens, the share as it was written, and images without delimiters."""
    arch = oracle.architecture(19)
    official, batch = oracle.build(arch), oracle.inputs(arch)
    logit_bias_V = np.zeros(arch.vocab, np.float32)
    logit_bias_V[ids_of(arch)[0]] = 100.0  # every token is the tag

    def inserted(**changes):
        out = run(code, official, arch, batch.hf, logit_bias_V, "copy", 0.5, **{"max_insertions": 99, **changes})
        return [[(i.at, len(i.selected), i.tokens) for i in insertions] for insertions in out.insertions]

    # Visual tokens of the rows: 6, 5 + 4 and 12, and two delimiters an image. The last tag has no token behind it.
    assert [len(row) for row in inserted()] == [R - 1] * 3
    assert [len(row) for row in inserted(max_insertions=2)] == [2] * 3
    assert [len(row) for row in inserted(max_inserted_tokens=26)] == [3, 2, 1]
    assert inserted(max_inserted_tokens=13) == [[(0, 6, 8)], [(0, 9, 13)], []]
    bias = {"generation_config": transformers.GenerationConfig(reattention={"form": "bias"})}
    route = {"reattention": "route", "keep_ratio": 5 / 9, "max_insertions": 1}
    assert inserted(**route) == [[(0, 4, 6)], [(0, 5, 9)], [(0, 7, 9)]]
    assert inserted(**route, **bias) == [[(0, 4, 8)], [(0, 5, 13)], [(0, 7, 14)]]
    bare = {"generation_config": transformers.GenerationConfig(reattention={"delimiters": False})}
    assert inserted(**bare, max_insertions=1) == [[(0, 6, 6)], [(0, 9, 9)], [(0, 12, 12)]]
    assert (
        inserted(reattention="none") == inserted(max_insertions=0) == inserted(**route | {"keep_ratio": 0}) == [[]] * 3
    )


BAD = [
    ({"reattention": "vision_only"}, "'vision_only'; it must be one of none, copy, route; qwenla_jax has it"),
    ({"reattention": "COPY"}, "reattention is 'COPY'; it must be one of none, copy, route"),
    ({"keep_ratio": 50}, "keep_ratio is 50; it must be a number from 0 to 1"),
    ({"keep_ratio": "0.5"}, "keep_ratio is '0.5'"),
    ({"max_insertions": -1}, "max_insertions is -1; it must be a whole number of 0 or more"),
    ({"reflection_token_id": None}, "the id of <REFLECTION> is unknown.*pass reflection_token_id="),
    ({"num_beams": 3}, "num_beams=3 is not supported with re-attention, only greedy and sampling are"),
    ({"generation_config": transformers.GenerationConfig(num_beams=2)}, "num_beams=2 is not supported"),
    ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens=4 is not"),
    ({"guidance_scale": 1.5}, "guidance_scale=1.5 is not"),
    ({"use_cache": False}, "use_cache=False is not"),
    ({"cache_implementation": "static"}, "cache_implementation=static is not"),
    ({"output_attentions": True}, "output_attentions=True is not"),
    ({"stop_strings": "end"}, "stop_strings=end is not.*StopStringCriteria"),
    ({"pixel_values_videos": torch.zeros(4, 4)}, "pixel_values_videos is not supported"),
    ({"inputs_embeds": torch.zeros(1, 2, 4)}, "inputs_embeds is not supported"),
    ({"past_key_values": transformers.DynamicCache()}, "past_key_values is not supported"),
    ({"input_ids": None}, "input_ids must be a tensor of prompts"),
    ({"attention_mask": None}, "attention_mask is missing"),
    ({"attention_mask": lambda hf: hf["attention_mask"].flip(1)}, "prompts must be padded on the left alone"),
    ({"attention_mask": lambda hf: hf["attention_mask"][:, 1:]}, r"attention_mask is \[3, \d+\], input_ids \[3, \d+\]"),
    ({"image_grid_thw": None}, "pixel_values and image_grid_thw belong together"),
    ({"pixel_values": None, "image_grid_thw": None}, "prompt 0 has 6 image tokens more than image_grid_thw"),
    ({"image_grid_thw": lambda hf: hf["image_grid_thw"] * torch.tensor([2, 1, 1])}, "more than one frame; videos"),
    ({"input_ids": lambda hf: hf["input_ids"] * 0 + 1}, "image_grid_thw has 4 images more than the prompts"),
    ({"input_ids": lambda hf: hf["input_ids"] * 0 + 1000}, "the prompts hold video tokens"),
    (
        {"generation_config": transformers.GenerationConfig(reattention={"content": "pause"})},
        "reattention.content=pause",
    ),
    ({"generation_config": transformers.GenerationConfig(reattention={"m": 50})}, "unknown settings: m"),
    ({"generation_config": transformers.GenerationConfig(reattention="copy")}, "it must be an object"),
]


def test_bad_input(oracle, code):
    arch = oracle.architecture(19)
    official, batch = oracle.build(arch), oracle.inputs(arch)
    official.config.video_token_id = 1000
    for changes, message in BAD:
        given = {name: value(batch.hf) if callable(value) else value for name, value in changes.items()}
        hf = {name: value for name, value in batch.hf.items() if name not in given}
        with pytest.raises(ValueError, match=message):
            run(code, official, arch, hf, np.zeros(arch.vocab, np.float32), "copy", 0.5, **given)
    official.model.language_model.has_sliding_layers = True
    with pytest.raises(ValueError, match="layers of sliding attention"):
        run(code, official, arch, batch.hf, np.zeros(arch.vocab, np.float32), "copy", 0.5)
    other = transformers.Qwen2VLConfig()
    with pytest.raises(TypeError, match="the model is a qwen2_vl; re-attention is for Qwen2_5_VLForConditional"):
        code.generate(SimpleNamespace(config=other))


def test_the_files_of_an_export(exported, tmp_path):
    """What `save` writes; transformers keeps the settings; loaded with trust, the model looks again by itself."""
    folder, loaded = exported
    assert (folder / "custom_generate" / "requirements.txt").read_text() == REQUIREMENTS
    saved = json.loads((folder / "generation_config.json").read_text())["reattention"]
    tok = loaded.tokenizer
    assert saved == {
        "mode": "route",
        "keep_ratio": 0.25,
        "form": "compact",
        "max_insertions": 1,
        "max_inserted_tokens": None,
        "delimiters": True,
        "positions": "again",
        "content": "image",
        "reflection_token_id": tok.ids.reflection_open,
        "suppressed_token_ids": list(tok.ids.suppressed()),
        "vocab_size": tok.vocab_size,
    }
    trusting = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)
    trusting.generation_config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["reattention"] == saved
    logit_bias_V = np.zeros(loaded.config.text.vocab_size, np.float32)
    logit_bias_V[tok.ids.reflection_open] = 1e4
    options = {"logits_processor": [Likelier(logit_bias_V)], "max_new_tokens": 3, "return_dict_in_generate": True}
    out = trusting.generate(**shipped_inputs(folder), **options)
    assert [[(i.at, len(i.selected)) for i in row] for row in out.insertions] == [
        [(0, 4)],
        [(0, 7)],
        [(0, 3)],
        [(0, 11)],
    ]
    untrusting = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        untrusting.generate(**shipped_inputs(folder), custom_generate=str(folder), max_new_tokens=3)
    # Without the tags there is nothing to look again at.
    assert write_custom_generate(tmp_path, None) == {} and not (tmp_path / "custom_generate").exists()
