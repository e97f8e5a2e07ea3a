"""The work of a step. Oracles: torch's flop counter on transformers' model, and numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest
from models import small_config

from qwenla_jax.model.families import FAMILIES
from qwenla_jax.planner.flops import (
    Work,
    attention,
    brpo_step_work,
    decode,
    decoder_forward,
    head,
    patch_embed,
    product,
    vision_forward,
)

CONFIG = small_config()


@pytest.fixture(scope="module", params=FAMILIES)
def counted(request):
    """A model, and forward, forward and backward as torch counts them: an image of 4 windows, 20 tokens, all pairs."""
    config = small_config(request.param)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    hf = transformers.AutoConfig.for_model(**config.to_hf())
    hf._attn_implementation = "eager"
    model = getattr(transformers, config.family.architecture)(hf)
    ids = torch.tensor([[1, config.vision_start_token_id, *[config.image_token_id] * 16, 2, 3]])
    pixels = torch.zeros(64, config.vision.patch_values)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = model(**inputs, use_cache=False).logits
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    return config, counts


def test_forward_and_backward_are_what_torch_counts(counted):
    patches = np.full((1, 4), 16)
    tokens, (config, counts) = 20, counted
    forward = (
        vision_forward(config.vision, patches)
        + decoder_forward(config.text, tokens, tokens**2, tokens)
        + head(config.text, tokens)
    )
    assert forward.flops == counts[0]
    assert (forward * 3 - patch_embed(config.vision, 64)).flops == counts[1]


def test_products_by_hand():
    assert product(3, 5, 7) == Work(210, 4 * (15 + 35 + 21))
    # 6 pairs, 2 heads of 4: scores 6*2*4 products and sums, values as many. 3 queries and outputs, 3 keys and values.
    assert attention(6, 3, 3, 2, 1, 4, value_bytes=2) == Work(192, 2 * (2 * 3 * 8 + 2 * 3 * 4))


def test_decoding_does_the_products_of_one_causal_pass():
    prompt_B, response_B = np.array([5, 5, 9, 9]), np.array([4, 2, 1, 6])
    result = decode(CONFIG.text, prompt_B, response_B, group=2)
    # Token t of a response sees its prompt and t tokens of its own, itself included; the last is never fed.
    pairs = sum(p + t for p, r in zip(prompt_B, response_B, strict=True) for t in range(1, r))
    assert result.flops == decoder_forward(CONFIG.text, 9, pairs, 0).flops
    # The weights are read in every one of the 5 rounds.
    once = decoder_forward(CONFIG.text, 1, 0, 0).bytes - 4 * CONFIG.text.num_layers * _passing(CONFIG.text)
    assert result.bytes > 5 * once


def _passing(text):
    """Numbers that go into and out of one layer's products and attention for one token, keys aside."""
    D, F, q, kv = text.hidden_size, text.intermediate_size, text.num_heads * text.head_dim, text.num_kv_heads * 8
    return (D + q) + 2 * (D + kv) + (q + D) + 2 * (D + F) + (F + D) + 2 * q


def test_a_step_counts_what_its_formula_says():
    prompt_Q, response_B = np.array([20, 22]), np.array([8, 8, 8, 3])
    step = brpo_step_work(CONFIG, np.full((2, 4), 16), prompt_Q, response_B, num_params=1000)
    rollout, update = step["rollout"], step["update"]
    assert rollout["vision tower"].flops == 2 * vision_forward(CONFIG.vision, np.full((1, 4), 16)).flops
    # The first token of a group comes from the prompt, so 27 - 4 tokens are decoded and 23 + 2 rows pass the head.
    assert rollout["decoding, head"].flops == 25 * 2 * 32 * 96
    # The update does what the rollout does, and its head sees every token of every row.
    parts = sum((rollout[name].flops for name in rollout), -25 * 2 * 32 * 96)
    assert update["policy forward"].flops == parts + 27 * 2 * 32 * 96
    assert update["policy forward"] == update["reference forward"]
    # Forward twice, less the gradient of 128 patches of 96 values to 16: nothing trains the pixels.
    assert update["policy backward"].flops == 2 * update["policy forward"].flops - 2 * 128 * 96 * 16
    assert update["AdamW"] == Work(0, 28_000)
    assert (
        "reference forward"
        not in brpo_step_work(CONFIG, np.ones((2, 1)) * 16, prompt_Q, response_B, 1, False)["update"]
    )


def test_bytes_go_with_the_size_of_a_number():
    arguments = (CONFIG, np.full((1, 1), 16), np.array([9]), np.array([4, 4]), 10)
    four, two = brpo_step_work(*arguments), brpo_step_work(*arguments, value_bytes=2)
    for phase, parts in four.items():
        for name, work in parts.items():
            assert dataclasses.replace(work, bytes=work.bytes / 2) == two[phase][name]


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 responses are no multiple of 2 prompts"):
        brpo_step_work(CONFIG, np.full((2, 1), 16), np.array([5, 5]), np.array([1, 1, 1]), 1)
    with pytest.raises(ValueError, match="at least one token"):
        brpo_step_work(CONFIG, np.full((1, 1), 16), np.array([5]), np.array([1, 0]), 1)
