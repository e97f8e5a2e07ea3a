"""A random tiny Qwen3-VL in whole: BRPO with ROUTE resumed to the bit, SFT with COPY on adapters, and the server."""

import base64
import io
import json
import random
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import qwenla_jax
from qwenla_jax.config.run_options import (
    BrpoOptions,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LoraOptions,
    OptimOptions,
    PoolOptions,
    RewardOptions,
    RunOptions,
)
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.inference.load import tiny_processor
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import init_params
from qwenla_jax.serve import engine_loop
from qwenla_jax.serve.chat_prompt import to_example
from qwenla_jax.serve.protocol import parse_request
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.train.loop import run
from qwenla_jax.weights.hub import EMBEDDED

SMALL = RunOptions(
    stage="brpo",
    steps=2,
    data=DataOptions(batch_size=2, max_response_tokens=96, max_prompt_tokens=96),
    optim=OptimOptions(learning_rate=1e-2, warmup_ratio=0.0),
    brpo=BrpoOptions(group_size=2, temperature=2.0),
    rewards=RewardOptions(target_length=4.0, pool=PoolOptions(workers=1)),
    eval=EvalOptions(every=0, final_size=0),
    checkpoint=CheckpointOptions(every=1, keep=3),
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The embedded checkpoint's tokenizer with a random model; the head is wider than its share of the width."""
    config = ModelConfig.from_hf(EMBEDDED)
    tower = {"window_size": 28, "full_attention_layers": (0, 1, 2), "tokens_per_second": 0}
    tower |= {"hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": 36, "deepstack_layers": (0, 2)}
    vision = replace(config.vision, **tower)
    text = replace(config.text, head_dim=48, mrope_section=(8, 8, 8))
    config = replace(config, vision=vision, text=text, model_type="qwen3_vl", dtype="float32", param_dtype="float32")
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(2))
    tokenizer = qwenla_jax.load(EMBEDDED).tokenizer
    folder = tmp_path_factory.mktemp("start") / "hf"
    return qwenla_jax.save(folder, config, params, tokenizer=tokenizer, processor=tiny_processor())


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "timing" not in key and "perf" not in key} for row in rows]


def test_brpo_with_route_is_resumed_to_the_bit(start, tmp_path):
    reattention = ReattentionOptions(mode="route", max_insertions=1)
    options = replace(SMALL, init_from=str(start), reattention=reattention)
    run(options, tmp_path / "whole")
    run(replace(options, steps=1), tmp_path / "parts")
    run(options, tmp_path / "parts")
    one, two = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(one[name].tobytes() == two[name].tobytes() for name in one)
    last = [[row for row in lines(tmp_path / name) if row["step"] == 2][-1] for name in ("whole", "parts")]
    assert last[0] == last[1] and last[0]["train/sampling_logp_difference"] < 1e-4
    first = load_file(start / "model.safetensors")
    for name in ("model.visual.deepstack_merger_list.1.linear_fc1.weight", "model.visual.pos_embed.weight"):
        assert not np.array_equal(first[name], one[name])  # they have a gradient
    card = (tmp_path / "whole" / "hf" / "README.md").read_text()
    assert "Qwen3VLForConditionalGeneration" in card and "Qwen2" not in card


def test_sft_with_copy_trains_adapters(start, tmp_path):
    options = replace(
        SMALL,
        stage="sft",
        init_from=str(start),
        lora=LoraOptions(rank=2, modules=("(decoder/layers|visual/(blocks|merger|deepstack_.))/.*/kernel",)),
        reattention=ReattentionOptions(mode="copy", max_insertions=1),
    )
    run(options, tmp_path)
    loss = [row["train/loss"] for row in lines(tmp_path) if "train/loss" in row]
    assert np.isfinite(loss).all()
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved} >= {"q_proj", "o_proj", "qkv", "linear_fc1", "linear_fc2"}
    assert not any("norm" in name or "embed" in name for name in moved)
    model = qwenla_jax.load(tmp_path / "hf").model
    assert model.config.family.name == "Qwen3-VL"


def test_the_server_answers_as_one_alone_does(start):
    """With insertions, whose number a random model's sampled responses decide."""
    checkpoint, image = qwenla_jax.load(start), make_scene(0, 1, 7).image
    often = np.asarray(checkpoint.params["decoder"]["embed"]["embedding"]).copy()
    often[checkpoint.tokenizer.ids.reflection_open] *= 8  # its logit too, where the two are tied
    decoder = {**checkpoint.params["decoder"], "embed": {"embedding": often}}
    checkpoint = replace(checkpoint, params={**checkpoint.params, "decoder": decoder})
    sizes = {"max_model_len": 192, "limit_mm_per_prompt": 1, "max_num_seqs": 2}
    options = ServeOptions(model=str(start), served_model_name=("q",), **sizes)
    served = engine_loop.build(checkpoint, options)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many?"}]
    inserted = 0
    for seed in range(6):
        settings = {"temperature": 2.0, "seed": seed, "max_completion_tokens": 64}
        body = {"messages": [{"role": "user", "content": parts}], "reattention": {"mode": "copy"}, **settings}
        chat = parse_request(json.dumps(body).encode(), options)
        example = to_example(chat.messages, served.tok, served.processor, served.layout, 1)
        question = engine_loop.to_question(chat, example, served, random.Random(0))
        ((_, _, rollout),) = served.engine.run(question.requests)
        got = rollout.ids_BxR[0, : rollout.length_B[0]].tolist()
        want = qwenla_jax.ask(checkpoint, image, "How many?", temperature=2.0, seed=seed, max_new_tokens=64)
        assert served.tok.decode([i for i in got if i not in served.tok.ids.stop()]) == want.text
        assert int(rollout.inserted_B[0]) == len(want.reattention)
        inserted += len(want.reattention)
    assert inserted
