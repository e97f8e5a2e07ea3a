"""The benchmark of the server: what transformers gets, its bookkeeping, and its whole path at small size.

Oracles: transformers' image processor and tokenizer, and numbers worked out by hand.
"""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.bench import serving
from launch.bench.shapes import shape_of
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.serve.chat_prompt import to_example
from qwenla_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]


def test_transformers_generates_from_the_same_prompt(tmp_path):
    """Token by token and patch by patch what its own tokenizer and image processor make of the request."""
    transformers = pytest.importorskip("transformers")
    shape = shape_of("model", True, "float32")
    start = serving.checkpoint_of(shape, tmp_path)
    config, tok = ModelConfig.from_hf(start), Tokenizer.from_folder(start)
    processor = ProcessorSettings.from_json(start / "preprocessor_config.json")
    body = serving.make_body(shape, 4, [0])
    example = to_example(body["messages"], tok, processor, layout_of(config), 1)
    with np.load(serving.write_inputs(example, config, tmp_path, [0])) as content:
        inputs = dict(content)
    theirs = transformers.AutoImageProcessor.from_pretrained(start, backend="pil")
    data = base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
    want = theirs(Image.open(io.BytesIO(data)), return_tensors="np")
    np.testing.assert_array_equal(inputs["image_grid_thw"], want["image_grid_thw"])
    np.testing.assert_array_equal(inputs["pixel_values"], want["pixel_values"])
    text = transformers.AutoTokenizer.from_pretrained(start)
    prompt = text.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    once = text(prompt)["input_ids"]  # with one token for the image, whose visual tokens are 15
    at = once.index(config.image_token_id)
    assert inputs["prompt_ids"].tolist() == once[:at] + [config.image_token_id] * 15 + once[at + 1 :]
    assert inputs["prompt_types"].sum() == 15


def row(rates, cpu, first, same=()):
    return {"rates": rates, "cpu": cpu, "first": first, "same": list(same), "compilations": 0}


def test_shares_by_hand():
    rows = {
        "engine alone, 8": row([120.0, 220.0, 60.0], [0.01, 0.02, 0.05], [0.1, 0.2]),
        "as they arrive, 8": row([100.0, 200.0, 50.0], [0.02, 0.03, 0.06], [0.1, 0.2]),
        "qwenla serve, 8": row([90.0, 190.0, 30.0], [0.025, 0.03, 0.12], [0.1, 0.3, 0.2], [True, False]),
        "generate, 8": row([150.0, 100.0, 50.0], [0.01, 0.01, 0.01], [1.0]),
    }
    serving.fill(rows)
    http = rows["qwenla serve, 8"]
    assert (http["tokens_per_second"], http["first_p50"]) == (90.0, 0.2)  # shares are .9, .95 and .6
    assert (http["of_engine"], http["http_share"]) == (0.75, pytest.approx(0.1))  # of the engine: .75, .86, .5
    assert (http["cpu_per_token"], http["http_cpu_share"]) == (0.03, pytest.approx(0.2))  # .8, 1 and .5 of it
    assert rows["generate, 8"]["of_engine"] == pytest.approx(5 / 6) and "http_share" not in rows["generate, 8"]
    work = {"params": 1e6, "prompt": 3, "visual": 2, "tokens": 1, "slots": 8, "rounds": 3}
    machine = {"cpu": "C", "cores": 2, "load_average_1min": 0.0, "versions": {"jax": "0"}}
    given = {"machine": machine, "work": work, "rows": rows, "peer_versions": None, "missing": {"x": "no y"}}
    lines = list(serving.table(json.loads(json.dumps(given))))
    assert {"90.0", "10.0%", "30.0", "20.0%", "0.200", "1/2"} <= set(lines[6].split()) and lines[-1] == "x: no y"


@pytest.mark.slow
def test_the_whole_path_at_small_size(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "bench" / "main.py"), "--suite=serving", "--small", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    sides = "engine alone", "as they arrive", "qwenla serve"
    assert list(rows) == [f"{side}, {clients}" for clients in (1, 3) for side in sides]
    assert all(len(row["first"]) == (2 if name.endswith("1") else 3) for name, row in rows.items())
    assert all(row["tokens_per_second"] > 0 and row["first_p50"] > 0 for row in rows.values())
    assert all(rows["qwenla serve, 3"]["same"]) and "HTTP's share" in done.stderr
