"""The benchmark of one model beside transformers: its floors, its bookkeeping, and its whole path at small size.

Oracles: torch's flop counter and parameter sizes on transformers' model (and PEFT's adapters on it), and numbers worked
out by hand.
"""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from launch.bench.machine import cores
from qwenla_jax.model.qwen_vl import init_params
from qwenla_jax.weights.hf import save

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, str(ROOT / "launch" / "bench" / "main.py")]


@pytest.fixture(scope="module")
def launch():
    """The programs' modules, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        names = ("main", "transformers_peer", "model", "shapes")
        yield SimpleNamespace(**{name: importlib.import_module(f"launch.bench.{name}") for name in names})


@pytest.fixture(scope="module")
def shape(launch):
    return launch.shapes.shape_of("model", True, "float32")


@pytest.fixture(scope="module")
def hf(shape):
    """transformers' model of the small shape, attention over all pairs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = transformers.Qwen2_5_VLConfig(**shape.config.to_hf())
    config._attn_implementation = "eager"
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def batch_of(launch, shape, rows, tokens):
    import torch

    ids = torch.from_numpy(launch.shapes.tokens_of(shape)[:tokens].astype(np.int64))[None].repeat(rows, 1)
    _, patches = launch.shapes.make_image(shape)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == shape.config.image_token_id).int(),
        "pixel_values": torch.from_numpy(patches).repeat(rows, 1),
        "image_grid_thw": torch.tensor([[1, *(2 * n for n in shape.grid)]]).repeat(rows, 1),
    }


def counted(work):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def unseen(shape, tokens, rows):
    """Operations that eager attention spends forward on keys which no query may see."""
    t = shape.config.text
    return 4 * (tokens * (tokens - 1) // 2) * t.num_heads * t.head_dim * t.num_layers * rows


def test_training_floors_are_what_torch_counts(launch, shape, hf):
    floors = launch.shapes.floors(shape)
    B, T = shape.train_rows, shape.prompt + shape.response
    batch = batch_of(launch, shape, B, T)

    def work(model):
        return lambda: model(**batch, use_cache=False, logits_to_keep=shape.response).logits.sum().backward()

    assert floors["train"][0] == counted(work(hf)) - 3 * unseen(shape, T, B)
    peft = pytest.importorskip("peft")
    names = "self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj"
    rules = peft.LoraConfig(r=launch.shapes.RANK, target_modules=rf".*language_model.*({names})")
    adapted = peft.get_peft_model(hf, rules)
    result = counted(work(adapted)) - 3 * unseen(shape, T, B)
    adapted.unload()
    assert floors["train, LoRA"][0] == result


def test_floors_of_prefill_and_decoding_are_what_torch_counts(launch, shape, hf):
    import torch

    floors, (B,) = launch.shapes.floors(shape), shape.decode_rows
    batch = batch_of(launch, shape, B, shape.prompt)
    exactly = {"max_new_tokens": shape.new_tokens, "min_new_tokens": shape.new_tokens, "do_sample": False}
    with torch.inference_mode():
        prompt = counted(lambda: hf(**batch, logits_to_keep=1))
        whole = counted(lambda: hf.generate(**batch, **exactly, pad_token_id=0))
    assert floors[f"prefill, batch {B}"][0] == prompt - unseen(shape, shape.prompt, B)
    assert floors[f"decode, batch {B}"][0] == whole - prompt


def test_bytes_by_hand(launch, shape, hf):
    (B,) = shape.decode_rows
    assert (shape.prompt, shape.response, shape.new_tokens, B) == (24, 8, 8, 2)
    sizes = {name: value.numel() for name, value in hf.named_parameters()}
    read = 4 * sum(size for name, size in sizes.items() if "embed_tokens" not in name)
    text = 4 * sum(
        size
        for name, size in sizes.items()
        if "language_model" in name and "embed_tokens" not in name or "lm_head" in name
    )
    token = 4 * 2 * 2 * 16 * 2  # keys and values, 2 heads of 16, 2 layers
    want = {
        "train": 3 * read,
        "train, LoRA": 2 * read,
        "prefill, batch 2": read + 2 * 24 * token,
        # Of 8 tokens the first comes from the prefill, so 7 passes see 25, 26, ... 31 tokens in each of 2 rows.
        "decode, batch 2": 7 * text + 2 * sum(range(25, 32)) * token,
    }
    floors = launch.shapes.floors(shape)
    assert {name: moved for name, (_, moved) in floors.items()} == want
    half = dataclasses.replace(shape, config=dataclasses.replace(shape.config, dtype="bfloat16"))
    assert {name: 2 * moved for name, (_, moved) in launch.shapes.floors(half).items()} == want


def test_both_sides_have_the_same_loss(launch, shape, tmp_path):
    """The same image, tokens and weights go into both: a random model's losses are equal, and far from each other's
    when a single patch is not where it should be."""
    pytest.importorskip("torch")
    config = dataclasses.replace(shape.config, initializer_range=0.2)  # so that the image matters
    folder = save(tmp_path / "model", config, init_params(config, jax.random.key(0)))
    model = launch.model.Model(dataclasses.replace(shape, config=config), folder)
    inputs = launch.model.write_inputs(model, tmp_path)
    args = argparse.Namespace(config=folder, inputs=inputs, device="cpu", dtype="float32", in_a_row=1)
    peer = launch.transformers_peer.Peer(args)
    result = peer.train(shape.train_rows)
    assert len(result["seconds"]) == len(result["cpu_seconds"]) == 1
    assert model.train()() == pytest.approx(result["loss"], abs=1e-4)
    assert peer.peak(64)["matrix_gflops"] > 0
    pixels = peer.inputs["pixel_values"]
    pixels[[0, 59]] = pixels[[59, 0]]
    assert abs(peer.train(shape.train_rows)["loss"] - result["loss"]) > 1e-3


def times(seconds, cpu):
    return {"seconds": seconds, "cpu_seconds": cpu, "compilations": 0, "peer_seconds": [], "peer_cpu_seconds": []}


@pytest.fixture
def result(launch, shape):
    """Rows as measured, with peaks of 1 TFLOP/s and 1 GB/s."""
    rows = {name: times([], []) for name in ("train", "train, LoRA", "prefill, batch 2", "generate, batch 2")}
    rows["train"] = times([2.0, 4.0, 3.0], [2.0, 8.0, 3.0]) | {"peer_seconds": [6.0], "peer_cpu_seconds": [3.0]}
    rows["train, LoRA"] |= {"none": "does not fit", "peer_none": "ImportError"}
    rows["prefill, batch 2"] |= {"seconds": [1.0], "cpu_seconds": [1.0]}
    rows["generate, batch 2"] |= {"seconds": [3.0], "cpu_seconds": [3.0]}
    result = {"peaks": {"matrix_gflops": 1000.0, "memory_gb_s": 1.0}, "rows": rows, "peer_versions": None}
    result |= {"our_peak": 1000.0, "peer_peak": None}
    launch.model.fill(result, shape)
    return result | {"shape": dataclasses.asdict(shape)}


def test_medians_shares_and_ratios_by_hand(launch, shape, result):
    train, decode = result["rows"]["train"], result["rows"]["decode, batch 2"]
    assert train["seconds_median"] == 3.0 and train["peer_seconds_median"] == 6.0 and train["speed"] == 2.0
    assert train["cpu_share"] == 1.0 / cores() and train["peer_cpu_share"] == 0.5 / cores()
    flops, moved = launch.shapes.floors(shape)["train"]
    assert (train["flops_floor"], train["bytes_floor"]) == pytest.approx((flops / 1e12, moved / 1e9))
    assert train["share"] == pytest.approx(max(flops / 1e12, moved / 1e9) / 3)
    assert decode["seconds_median"] == 2.0 and decode["tokens"] == 14 and "speed" not in decode
    assert "share" not in result["rows"]["train, LoRA"]


def test_the_table_says_what_was_measured(launch, result):
    lines = list(launch.model.table(json.loads(json.dumps(result))))
    heads, train, lora = lines[4].split(), lines[5].split(), lines[6]
    assert heads[-2:] == ["peer/ours", "same"] and train[0] == "train" and {"3.0000", "6.0000", "2.00"} <= set(train)
    assert "does not fit" in lora and "ImportError" in lora
    assert any(line.startswith("decode, batch 2") and " 7.0 " in line for line in lines)  # 14 tokens in 2 seconds


def test_a_turn_begins_with_a_piece_that_does_not_count(launch):
    calls = []
    answer = {"seconds": [5.0, 6.0], "cpu_seconds": [1.0, 2.0], "loss": 7.0}

    def ask():
        calls.append("peer")
        return answer

    row = launch.model.in_turn(2, lambda: calls.append("ours"), ask)
    assert calls == ["ours", "ours", "ours", "peer"] * 2
    assert len(row["seconds"]) == len(row["cpu_seconds"]) == 4 and row["peer_seconds"] == [5.0, 6.0] * 2
    assert row["peer"] == answer and row["compilations"] == 0


def test_what_does_not_fit_is_said_and_other_errors_are_raised(launch):
    def fails(text):
        def work():
            raise jax.errors.JaxRuntimeError(text)

        return work

    calls = []
    row = launch.model.in_turn(2, fails("RESOURCE_EXHAUSTED: out of memory"), lambda: calls.append(1) or {"none": "E"})
    assert row["none"] == "does not fit" and row["peer_none"] == "E" and len(calls) == 1 and not row["seconds"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        launch.model.in_turn(1, fails("INTERNAL: broken"), None)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_peer_with_another_loss_ends_the_measurement(launch, shape, monkeypatch, tmp_path, wrong):
    class Peer:
        versions = {}

        def __init__(self, *_):
            pass

        def ask(self, *_):
            return {"seconds": [1.0], "cpu_seconds": [1.0], "loss": 2.0 + wrong}

    monkeypatch.setattr(launch.model, "Peer", Peer)
    monkeypatch.setattr(launch.model.Model, "train", lambda self, rank=0: lambda: 2.0)
    args = argparse.Namespace(rounds=1, peer_python=Path(sys.executable))
    with pytest.raises(RuntimeError, match=r"train: our loss is 2\.0"):
        launch.model.compare(args, shape, tmp_path, "cpu", 64)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--suite=model", "--rounds=0"], "--rounds must be at least 1, got 0"),
        (["--suite=gpu", "--minutes=0"], "--minutes must be above 0, got 0.0"),
        (["--suite=models"], "invalid choice: 'models'"),
        (["--suite=model", "--peer_python=/nowhere/python"], "--peer_python: /nowhere/python is no interpreter"),
        (["--suite=serving", "--clients", "1", "0"], "--clients must be at least 1, got 0"),
        (["--suite=cpu", "--small"], "--small: suite cpu has no small form"),
        (["--suite=gpu", "--checkpoint=/nowhere"], "--checkpoint: no config.json in /nowhere"),
        (["--suite=gpu", "--smal"], ""),
        ([], "--suite"),
    ],
)
def test_wrong_flags_are_refused_by_name(launch, capsys, flags, named):
    if named:
        with pytest.raises(SystemExit) as refused:
            launch.main.parse_arguments(flags)
        assert refused.value.code == 2 and named in capsys.readouterr().err
    else:  # argparse takes an unambiguous beginning
        assert launch.main.parse_arguments(flags).small


def test_the_gpu_suite_needs_a_gpu(launch, capsys):
    assert launch.main.main(["--suite=gpu"]) == 2
    assert "--suite=gpu needs a GPU, JAX has cpu; or --small" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_named(launch, tmp_path, capsys):
    """And the table is filled without it."""
    shape = launch.model.shape_of("gpu", True, "float32")
    args = argparse.Namespace(rounds=1, peer_python=None, deadline=0.0)
    rows = launch.model.compare(args, shape, tmp_path, "cpu", 64)["rows"]
    assert {row["none"] for row in rows.values()} == {"no time left"}
    assert "train: no time left" in capsys.readouterr().err
    result = {"rows": rows, "peaks": {"matrix_gflops": 1.0, "memory_gb_s": 1.0}}
    launch.model.fill(result, shape)
    assert "share" not in rows["train"] and rows["train"]["flops_floor"] > 0


@pytest.mark.slow
def test_the_whole_path_at_small_size(tmp_path):
    pytest.importorskip("peft")
    command = [*COMMAND, "--suite=gpu", "--small", "--json", f"--peer_python={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert {"suite", "machine", "peaks", "shape", "rows", "steps", "reattention", "peer_versions"} <= set(result)
    pairs = ("flops_floor", "bytes_floor", "share", "seconds_median", "peer_seconds_median", "speed", "cpu_share")
    for name in ("train", "train, LoRA", "prefill, batch 2"):
        assert set(pairs) <= set(result["rows"][name]), name
    generate = result["rows"]["generate, batch 2"]
    assert result["peaks"]["matrix_gflops"] == max(result["our_peak"], result["peer_peak"]) > 0
    assert generate["equal_tokens"] == 1.0 and generate["speed"] > 0 and len(generate["seconds"]) == 2
    assert abs(result["rows"]["train"]["loss"] - result["rows"]["train"]["peer_loss"]) <= 1e-4
    assert max(map(abs, result["parity"].values())) <= 1e-4 and set(result["parity"]) == {"train", "train, LoRA"}
    steps = result["steps"]
    assert list(steps) == ["BRPO step, LoRA", "BRPO step, LoRA, COPY", "BRPO step, LoRA, ROUTE", "BRPO step, full"]
    assert all(set(row) == {"step", "rollout", "update", "insertions"} for row in steps.values())
    assert [row["insertions"] > 0 for row in steps.values()] == [False, True, True, False]
    modes = result["reattention"]["modes"]
    assert list(modes) == ["text only", "copy, 8 rows at once", "route 50%, compact, 8 rows"]
    assert modes["text only"]["ratio"] == 1.0 and modes["copy, 8 rows at once"]["inserted"] > 0
    assert "peer/ours" in done.stderr
