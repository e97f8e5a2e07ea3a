"""Mutated checkpoints through every reader of their files: read or refused by name, at once and in little memory.

Oracle: the clock, the process's memory, what a reader may raise, and the folder around what is written.
`QWENLA_FUZZ=100000 pytest tests/model/files_fuzz_test.py` is the long form, and `QWENLA_FUZZ_SEED` repeats a seed.
"""

import copy
import dataclasses
import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
from measure import peak_growth, slower_than

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.hf_names import table
from qwenla_jax.text.chat_template import CHAT_TEMPLATE
from qwenla_jax.text.tokenizer import Tokenizer, train_tiny_tokenizer
from qwenla_jax.weights import convert, hf, orbax

CASES = int(os.environ.get("QWENLA_FUZZ", "2000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
SAVED = Path(__file__).parent / "releases"
GROWTH = 400  # MB that the process may grow by in any case of a reader
ODD = [
    *(None, True, False, 0, 1, -1, 3, 1023, 2**20, 2**31, 2**63, 10**15, 10**400),
    *(1e-9, 1e308, float("nan"), float("inf")),
    *("", "a", "14", "x" * 5000, "\x00", "\ud800", "../x.safetensors", "/tmp/x.safetensors", "x.safetensors", "silu"),
    *([], {}, [14, 14], [[14], [14]], [None], ["a"], {"a": 1}, [[]] * 300, list(range(3000)), {"type": "mrope"}),
]
DEEP = "[" * 200_000


def paths(value, here=()):
    """Every place in a JSON value."""
    yield here
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*here, key))


def changed(rng, value):
    """A JSON value with one to three places replaced, removed, renamed or copied elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(paths(value))[1:]
        if not places:
            return rng.choice(ODD)
        *parents, last = rng.choice(places)
        node = value
        for key in parents:
            node = node[key]
        kind = rng.random()
        if kind < 0.6:
            node[last] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.8:
            del node[last]
        elif kind < 0.9 and isinstance(node, dict):
            node[rng.choice(["a", "", "text_config", "dtype", "head_dim", "layer_types"])] = node.pop(last)
        else:
            *_, other = rng.choice(places)
            node[last] = copy.deepcopy(node.get(other, other) if isinstance(node, dict) else other)
    return value


def mutated(rng, text):
    """Bytes of a mutated JSON text: half of them JSON still, the others any bytes."""
    if rng.random() < 0.003:
        return DEEP.encode()
    if rng.random() < 0.6:
        return json.dumps(changed(rng, json.loads(text))).encode()
    raw = bytearray(text.encode())
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            raw[at : at + rng.choice([1, 3, 40])] = b""
        elif kind == 1:
            raw[at:at] = rng.choice([b"\x00", b"\xff", b'"', b"{", b"]", b"9" * 30, b",", b"\\u", b"1e999"])
        elif kind == 2 and at < len(raw):
            raw[at] = rng.randrange(256)
        else:
            raw = raw[: at + 1] if rng.random() < 0.2 else raw + raw[:at][:100]
    return bytes(raw)


def restore(files):
    """Writes the files that the last case changed as they were."""
    for path, text in files.items():
        if path.read_bytes() != text.encode():
            path.write_text(text, encoding="utf-8")


def attack(name, read, write):
    """`write(rng)` changes a file and puts the others back; `read()` must take or refuse them."""
    rng = random.Random(f"{SEED} {name}")
    print(f"QWENLA_FUZZ_SEED={SEED}")
    read()  # the unharmed files; and what is loaded at the first call is nobody's doing
    growth, taken = peak_growth(), 0
    for _ in range(CASES):
        note = write(rng)
        start = time.thread_time()
        try:
            read()
            taken += 1
        except (ValueError, FileNotFoundError, FileExistsError) as error:
            assert not isinstance(error, UnicodeError) and str(error).strip(), note
        assert not slower_than(1, start, read), note
    assert 0 < taken < CASES
    assert growth() < GROWTH


@pytest.mark.parametrize("saved", ["4.49.0/tied", "4.57.6/untied_sharded"])
def test_config_and_index(saved, tmp_path):
    """config.json of two layouts, and the index of the weight files beside it."""
    folder = tmp_path / "model"
    shutil.copytree(SAVED / saved, folder)
    files = {path: path.read_text() for path in folder.glob("*.json")}

    def write(rng):
        restore(files)
        file = rng.choice(sorted(files))
        content = mutated(rng, files[file])
        file.write_bytes(content)
        return content[:2000]

    def read():
        config = ModelConfig.from_hf(folder)
        assert len(table(config)) < 40 and ModelConfig.from_hf(config.to_hf()) is not None
        hf.check_tensors(folder, config)

    attack(saved, read, write)


def test_tokenizer_files(tmp_path):
    folder = tmp_path / "model"
    train_tiny_tokenizer(["how many red circles"], 300).save(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 300}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    files = {path: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    unharmed = (folder / "chat_template.jinja").read_bytes()

    def write(rng):
        restore(files)
        file = rng.choice(sorted(files))
        if file.suffix == ".json":
            content = mutated(rng, files[file])
        else:
            at, put = rng.randrange(len(CHAT_TEMPLATE)), rng.choice(["", "{%", "}}", "x", "\x00", "é", "\ud800"])
            content = f"{CHAT_TEMPLATE[:at]}{put}{CHAT_TEMPLATE[at + 1 :]}".encode("utf-8", "surrogatepass")
        file.write_bytes(content)
        return file.name, content[:2000]

    def read():
        tokenizer = Tokenizer.from_folder(folder).with_tags()
        ids = tokenizer.encode("<|im_start|>user\nhow many<SUMMARY>")
        assert ids and isinstance(tokenizer.decode(ids, skip_special=True), str)
        if len(ids) % 8 == 0 or (folder / "chat_template.jinja").read_bytes() != unharmed:
            tokenizer.save(tmp_path / "again")

    attack("tokenizer", read, write)


def test_safetensors_headers(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SAVED / "5.23.0" / "tied", folder)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    head, data = raw[8 : 8 + length].decode(), raw[8 + length :]

    def write(rng):
        content = mutated(rng, head)
        said = len(content) if rng.random() < 0.9 else rng.choice([0, 1, 7, len(content) + 5, 2**31, 2**62, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", said) + content + (data if rng.random() < 0.9 else data[:1000]))
        return said, content[:2000]

    def read():
        orbax.read_header(file)
        convert.plan_from_hf(folder)

    attack("safetensors", read, write)


def test_layout_of_a_converted_folder(tmp_path):
    """Nothing is written beside the folder that was asked for, and no half of it stays."""
    folder, target = tmp_path / "orbax", tmp_path / "out" / "back"
    convert.from_hf(convert.plan_from_hf(SAVED / "4.57.6" / "untied_sharded"), folder)
    layout = (folder / "layout.json").read_text()
    before = sorted(path.name for path in tmp_path.iterdir())

    def write(rng):
        content = json.loads(layout)
        if rng.random() < 0.5:  # a head within it
            each = rng.choice(content["files"])
            each["header"] = mutated(rng, each["header"]).decode("utf-8", "replace")
            content = json.dumps(content).encode()
        else:
            content = mutated(rng, layout)
        (folder / "layout.json").write_bytes(content)
        return content[:2000]

    def read():
        shutil.rmtree(target.parent, ignore_errors=True)
        try:
            convert.to_hf(folder, target)
            assert [path.name for path in target.parent.iterdir()] == ["back"]
        except ValueError:
            assert not target.parent.is_dir() or not list(target.parent.iterdir())
            raise
        finally:
            assert {path.name for path in tmp_path.iterdir()} - {"out"} == set(before) - {"out"}

    attack("layout", read, write)


def test_the_largest_that_is_taken():
    """Layers and rows at their bounds cost no time; one more is refused."""
    content = json.loads((SAVED / "4.49.0" / "tied" / "config.json").read_text())
    start = time.thread_time()
    config = ModelConfig.from_hf(content | {"num_hidden_layers": 1024, "vocab_size": 2**24})
    assert sum(len(entry.names) for entry in table(config)) > 10_000
    with pytest.raises(ValueError, match="at most 1,024"):
        dataclasses.replace(config.text, num_layers=1025)
    assert time.thread_time() - start < 1
