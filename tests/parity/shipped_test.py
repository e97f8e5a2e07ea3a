"""The shipped checkpoint through transformers alone: its model, tokenizer and image processor, on rendered scenes."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import qwenla_jax
from qwenla_jax.data.collate import collate_prompts, make_buckets
from qwenla_jax.data.images import PictureLayout
from qwenla_jax.data.scenes import make_scene
from qwenla_jax.data.sources import Record
from qwenla_jax.data.transforms import to_prompt_example
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.sampling.logits import forbidden_bias
from qwenla_jax.sampling.loop import SampleOptions, sample

FOLDER = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
QUESTIONS = (
    "How many objects are there?",
    "Is there a red circle?",
    "What color is the largest object?",
    "Subtract all circles. How many objects are left?",
)
NEW_TOKENS = 64
TOLERANCE = 1e-4  # of the logits, times their standard deviation where that is above 1: a trained model's are larger


@pytest.fixture(scope="module")
def folder():
    if not (FOLDER / "config.json").is_file():
        pytest.fail(f"no checkpoint at {FOLDER}")
    return FOLDER


def _official(folder, scenes):
    """transformers' inputs of the questions, made with its own tokenizer and image processor, padded on the left."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = pil.Qwen2VLImageProcessorPil.from_pretrained(folder)
    pixels = processor(images=[scene.image for scene in scenes], return_tensors="pt")
    texts = []
    for scene, question, (_, h, w) in zip(scenes, QUESTIONS, pixels["image_grid_thw"].tolist(), strict=True):
        assert scene.image.size == (112, 112)
        picture = "<|vision_start|>" + "<|image_pad|>" * (h * w // 4) + "<|vision_end|>"
        texts.append(f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "mm_token_type_ids": (batch["input_ids"] == image).to(torch.int32),
        **pixels,
    }
    return model, inputs


def test_shipped_checkpoint(folder):
    import torch

    scenes = [make_scene(7, 5, index) for index in range(len(QUESTIONS))]
    official, inputs = _official(folder, scenes)
    loaded = qwenla_jax.load(folder, dtype="float32")
    model, params = loaded
    v, tok = model.config.vision, loaded.tokenizer
    layout = PictureLayout(v.patch_size, v.spatial_merge_size, v.temporal_patch_size, v.window_size)
    records = [
        Record(str(i), (scene.image,), question, "", None, "count")
        for i, (scene, question) in enumerate(zip(scenes, QUESTIONS, strict=True))
    ]
    examples = [to_prompt_example(record, tok, loaded.processor, layout) for record in records]
    buckets = make_buckets(layout, len(records), 112 * 112, 112 * 112, 128, 256)
    vision, prompts = collate_prompts(examples, buckets)

    # The same prompt, token for token.
    P = inputs["input_ids"].shape[1]
    for q, n in enumerate(prompts.length_Q):
        assert inputs["input_ids"][q, P - n :].tolist() == prompts.ids_QxP[q, :n].tolist()
        assert inputs["attention_mask"][q].sum() == n

    # Greedy until the stop tokens of the checkpoint's own generation_config.json.
    stop = official.generation_config.eos_token_id
    assert set(stop) == set(tok.ids.stop())
    with torch.no_grad():
        unsampled = [*tok.ids.forbidden(), *range(tok.vocab_size, model.config.text.vocab_size)]
        out = official.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=unsampled)
    out = out[:, P:].numpy()
    bias_V = forbidden_bias(model.config.text.vocab_size, tok.vocab_size, tok.ids.forbidden())
    options = SampleOptions(1, NEW_TOKENS, 0.0, 1.0, tok.ids.stop())
    rows = np.arange(len(records), dtype=np.uint32)
    rollout = jax.jit(functools.partial(sample, model, options))(
        params, vision, prompts, bias_V, np.uint32(0), np.uint32(0), rows
    )
    for q, length in enumerate(np.asarray(rollout.length_B)):
        assert rollout.ids_BxR[q, :length].tolist() == out[q, :length].tolist()
        assert bool(rollout.stopped_B[q]) == (int(out[q, length - 1]) in stop)

    # Logits of the prompts.
    @jax.jit
    def forward(params, vision, prompts):
        hidden = model.apply({"params": params}, vision, prompts.ids_QxP, prompts.pos_QxPx3, prompts.visual_QxP)
        return logits_of(params, hidden)

    ours = np.asarray(forward(params, vision, prompts))
    with torch.no_grad():
        theirs = official(**inputs).logits.numpy()
    for q, n in enumerate(prompts.length_Q):
        expected = theirs[q, P - n :]
        np.testing.assert_allclose(ours[q, :n], expected, atol=TOLERANCE * max(1.0, expected.std()), rtol=0)
