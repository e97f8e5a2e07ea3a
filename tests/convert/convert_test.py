"""Checkpoints to Orbax and back: the files of transformers, byte for byte, and Orbax's own reader."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers

import qwenla_jax
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.parallel.sharding import mesh_chunks
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.weights import convert, orbax
from qwenla_jax.weights.hub import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Folders written by transformers: (dtype, shards) -> folder."""

    def write(dtype, shard):
        folder = tmp_path_factory.mktemp(f"{dtype}-{shard}")
        config = transformers.AutoConfig.from_pretrained(EMBEDDED)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = shard == "1MB"
        torch.manual_seed(3)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=shard)
        for name in SMALL:
            shutil.copy(EMBEDDED / name, folder / name)
        if dtype == "float32":  # as an export of this package
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text("raise AssertionError('this is never run here')")
        return folder

    return {(d, s): write(d, s) for d, s in (("float32", "1MB"), ("bfloat16", "1MB"), ("bfloat16", "1GB"))}


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def script(name, *args):
    done = subprocess.run(
        [sys.executable, f"convert/{name}.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


@pytest.mark.parametrize("kind", [("float32", "1MB"), ("bfloat16", "1MB"), ("bfloat16", "1GB")], ids="-".join)
def test_there_and_back_is_the_same_to_the_byte(official, kind, tmp_path):
    folder = official[kind]
    assert len(list(folder.glob("*.safetensors"))) == (1 if kind[1] == "1GB" else 5 if kind[0] == "float32" else 3)
    message = []
    plan = convert.plan_from_hf(folder)
    convert.from_hf(plan, tmp_path / "orbax", message.append)
    assert sum(message) == plan.size
    assert same(qwenla_jax.load(tmp_path / "orbax").params, qwenla_jax.load(folder).params)
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)


@pytest.mark.parametrize("fsdp, tensor", [(2, 1), (1, 2), (4, 2)])
def test_cut_for_a_mesh(official, fsdp, tensor, tmp_path):
    """The same parameters and the same files back; a chunk is a device's part, 2 of 4 layers would be two chunks."""
    folder = official["bfloat16", "1GB"]
    chunks = mesh_chunks(ModelConfig.from_hf(folder), fsdp, tensor)
    # By hand: 128 wide, 4 heads of 32 and 2 of keys and values; an axis that does not divide stays whole.
    assert chunks["decoder/layers/attn/q/kernel"] == (1, 128 // fsdp, 128 // tensor)
    assert chunks["decoder/layers/mlp/down/kernel"] == (1, 320 // tensor, 128 // fsdp)
    assert chunks["decoder/embed/embedding"] == (512 // tensor, 128 // fsdp)
    assert chunks["decoder/norm/scale"] == (128,) and chunks["visual/blocks/attn/q/bias"] == (1, 64 // tensor)
    message = []
    plan = convert.plan_from_hf(folder, chunks=chunks)
    convert.from_hf(plan, tmp_path / "orbax", message.append)
    assert sum(message) == plan.size
    up = tmp_path / "orbax" / "params" / "decoder.layers.mlp.up.kernel"
    assert len([path for path in up.iterdir() if path.name[0] != "."]) == 4 * fsdp * tensor
    assert same(qwenla_jax.load(tmp_path / "orbax").params, qwenla_jax.load(folder).params)
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)


def test_orbax_reads_it_without_us(official, tmp_path):
    """And a linear layer is the transposed of what torch holds."""
    folder = official["bfloat16", "1MB"]
    convert.from_hf(convert.plan_from_hf(folder), tmp_path / "orbax")
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(tmp_path / "orbax" / "params")
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    up = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    qkv = theirs["model.visual.blocks.1.attn.qkv.weight"].float().numpy()
    for layer in range(4):
        want = theirs[f"model.language_model.layers.{layer}.mlp.up_proj.weight"].float().numpy().T
        assert np.array_equal(np.asarray(up[layer], np.float32), want)
    assert np.array_equal(np.asarray(params["visual"]["blocks"]["attn"]["k"]["kernel"][1], np.float32), qkv[64:128].T)
    conv = theirs["model.visual.patch_embed.proj.weight"].float().numpy()
    patches = np.asarray(params["visual"]["patch_embed"]["kernel"], np.float32)
    assert np.array_equal(patches, conv.reshape(64, -1).T)


def test_another_type(official, tmp_path):
    folder = official["bfloat16", "1MB"]
    convert.from_hf(convert.plan_from_hf(folder, dtype="float32"), tmp_path / "orbax")
    loaded = qwenla_jax.load(tmp_path / "orbax")
    assert loaded.config.param_dtype == "float32"
    assert same(loaded.params, qwenla_jax.load(folder, dtype="float32").params)
    with pytest.raises(ValueError, match="stored as float32, but the files had bfloat16"):
        convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("tags, cut", [("mean", False), ("pieces", False), ("pieces", True)])
def test_rows_of_the_tags(official, tags, cut, tmp_path):
    """A tokenizer without tags, as the released ones are; embedding and head have rows to spare."""
    folder = tmp_path / "released"
    shutil.copytree(official["bfloat16", "1GB"], folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].strip("</>").isupper()]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]  # it names the tags too
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    plain = Tokenizer.from_folder(folder)
    assert plain.token_to_id("<REFLECTION>") is None
    chunks = mesh_chunks(ModelConfig.from_hf(folder), 2, 2) if cut else None
    convert.from_hf(convert.plan_from_hf(folder, tags=tags, chunks=chunks), tmp_path / "orbax")
    made, before = qwenla_jax.load(tmp_path / "orbax"), qwenla_jax.load(folder)
    ids = made.tokenizer.ids.tags
    assert len(ids) == 10 and min(ids.values()) >= plain.vocab_size
    old_VxD, new_VxD = (np.asarray(c.params["decoder"]["embed"]["embedding"], np.float32) for c in (before, made))
    pieces = [plain.token_to_id(p) for p in plain._backend.encode("reflection").tokens]
    want = old_VxD[: plain.vocab_size].mean(0) if tags == "mean" else old_VxD[pieces].mean(0)
    for name in ("<REFLECTION>", "</REFLECTION>"):
        np.testing.assert_allclose(new_VxD[ids[name]], want, rtol=1e-2, atol=1e-4)
    head = np.asarray(made.params["decoder"]["lm_head"]["kernel"], np.float32)
    old_head = np.asarray(before.params["decoder"]["lm_head"]["kernel"], np.float32)
    others = [i for i in range(len(old_VxD)) if i not in ids.values()]
    assert np.array_equal(new_VxD[others], old_VxD[others]) and np.array_equal(head[:, others], old_head[:, others])
    assert not np.array_equal(head[:, ids["<SUMMARY>"]], old_head[:, ids["<SUMMARY>"]])
    # What comes back is loaded by transformers, with the tags in its tokenizer.
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert auto.convert_tokens_to_ids("<REFLECTION>") == ids["<REFLECTION>"]
    transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back")


def test_interrupted_work_goes_on_and_leaves_nothing_half(official, tmp_path):
    plan = convert.plan_from_hf(official["bfloat16", "1MB"])
    target = tmp_path / "orbax"

    class Killed(BaseException):
        pass

    def stop_after(number):
        done = []

        def note(size):
            done.append(size)
            if len(done) == number:
                raise Killed

        return note

    with pytest.raises(Killed):
        convert.from_hf(plan, target, stop_after(40))
    work = tmp_path / ".orbax.converting"
    assert not target.exists() and work.is_dir()
    chunks = [work / "params" / piece.chunk for piece in plan.pieces]
    stamps = {chunk: chunk.stat().st_mtime_ns for chunk in chunks if chunk.is_file()}
    assert len(stamps) == 40
    torn = chunks[40].with_name(chunks[40].name + ".new")
    torn.write_bytes(b"torn")  # as a kill within a chunk leaves it
    convert.from_hf(plan, target)
    kept = {c: (target / c.relative_to(work)).stat().st_mtime_ns for c in stamps}
    assert kept == stamps and not work.exists()
    convert.to_hf(target, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(official["bfloat16", "1MB"])


def test_a_chunk_that_was_cut_short_is_written_again(official, tmp_path, monkeypatch):
    plan = convert.plan_from_hf(official["bfloat16", "1MB"])
    copy, calls = orbax.copy_bytes, []

    def half(source, offset, size, sink):
        calls.append(size)
        copy(source, offset, size if len(calls) < 30 else size // 2, sink)
        if len(calls) == 30:
            raise OSError("the disk is full")

    monkeypatch.setattr(orbax, "copy_bytes", half)
    with pytest.raises(OSError, match="disk is full"):
        convert.from_hf(plan, tmp_path / "orbax")
    monkeypatch.undo()
    convert.from_hf(plan, tmp_path / "orbax")
    convert.to_hf(tmp_path / "orbax", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(official["bfloat16", "1MB"])


def test_what_was_begun_from_another_source_is_not_taken_over(official, tmp_path):
    target = tmp_path / "orbax"
    work = tmp_path / ".orbax.converting" / "params" / "decoder.norm.scale"
    work.mkdir(parents=True)
    (work / "0").write_bytes(b"something else")
    (tmp_path / ".orbax.converting" / "plan.json").write_text("{}")
    convert.from_hf(convert.plan_from_hf(official["float32", "1MB"]), target)
    assert same(qwenla_jax.load(target).params, qwenla_jax.load(official["float32", "1MB"]).params)


def test_all_that_is_wrong_is_reported_before_anything_is_written(official, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "invalid"
    shutil.copytree(official["bfloat16", "1GB"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors["extra"] = torch.zeros(2)
    tensors["visual.merger.ln_q.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, out, err = script("from_hf", "--src", folder, "--dst", tmp_path / "orbax")
    assert status == 1 and not out
    for text in ("missing: model.norm.weight", "unexpected: extra [2]", "misshapen: visual.merger.ln_q.weight is [3]"):
        assert text in err
    assert [path.name for path in tmp_path.iterdir()] == ["invalid"]


def test_a_shard_that_is_cut_off_is_refused(official, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(official["bfloat16", "1GB"], folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    status, _, err = script("from_hf", "--src", folder, "--dst", tmp_path / "orbax")
    assert status == 1 and "model.safetensors: not a readable safetensors file" in err
    assert not (tmp_path / "orbax").exists()


def test_files_of_other_folders_are_neither_written_nor_copied(official, tmp_path):
    """Names in layout.json and links among the small files are somebody else's."""
    folder, secret = tmp_path / "orbax", tmp_path / "secret.txt"
    secret.write_text("mine")
    convert.from_hf(convert.plan_from_hf(official["bfloat16", "1MB"]), folder)
    layout = json.loads((folder / "layout.json").read_text())
    before = tree(tmp_path)
    for name in ("../x", f"{tmp_path}/x", "a/x", "a\\x", "", "x\0", "x" * 300):
        named = [{**layout["files"][0], "name": f"{name}.safetensors"}, *layout["files"][1:]]
        for wrong in ({"files": named}, {"index": {f"{name}.safetensors.index.json": "{}"}}):
            (folder / "layout.json").write_text(json.dumps(layout | wrong))
            with pytest.raises(ValueError, match="layout.json: .* is no file name"):
                convert.to_hf(folder, tmp_path / "back")
    sizes = json.loads(layout["files"][0]["header"])
    first = min((n for n in sizes if n != "__metadata__"), key=lambda n: sizes[n]["data_offsets"])
    large = {first: {**sizes[first], "data_offsets": [0, 10**15]}}
    for content, message in (
        ([], "layout.json: holds a list; expected an object"),
        ({}, "layout.json: files is None; it must be a list"),
        (layout | {"files": [[]]}, "it must be a list of objects"),
        (layout | {"files": [{**layout["files"][0], "name": 3}]}, "3 is no file name"),
        (layout | {"index": {"config.json": "{}"}}, "'config.json' is no file name"),
        (layout | {"files": [{"name": "a.safetensors", "header": "[]"}]}, "the head is a list"),
        (layout | {"files": [{"name": "a.safetensors", "header": json.dumps(large)}]}, "has 1000000000000000 bytes"),
        (layout | {"files": layout["files"][:1] * 2}, "names a file twice"),
        (layout | {"stored": "int8", "dtype": ["int8"]}, "it must be of float32, bfloat16, float16"),
    ):
        (folder / "layout.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            convert.to_hf(folder, tmp_path / "back")
    (folder / "layout.json").write_text(json.dumps(layout))
    assert tree(tmp_path) == before
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(ValueError, match="notes.txt: a link out of the folder, to .*secret.txt"):
        convert.to_hf(folder, tmp_path / "back")
    # The other way too, but for Hugging Face's cache, whose files are links to its own store.
    snapshot, blobs = tmp_path / "models" / "snapshots" / "1", tmp_path / "models" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(official["bfloat16", "1MB"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert.from_hf(convert.plan_from_hf(snapshot), tmp_path / "cached")
    (folder / "notes.txt").unlink()
    assert tree(tmp_path / "cached") == tree(folder)
    (snapshot / "notes.txt").symlink_to(secret)
    with pytest.raises(ValueError, match="notes.txt: a link out of the folder"):
        convert.plan_from_hf(snapshot)


def test_the_commands(official, tmp_path):
    folder = official["bfloat16", "1MB"]
    status, out, err = script("from_hf", "--src", folder, "--dst", tmp_path / "a", "--dry_run")
    assert status == 0 and "104 chunks" in out and not (tmp_path / "a").exists(), err
    assert script("from_hf", "--src", folder, "--dst", tmp_path / "a")[0] == 0
    status, _, err = script("from_hf", "--src", folder, "--dst", tmp_path / "a")
    assert status == 1 and "already exists; --overwrite replaces it" in err
    assert script("to_hf", "--src", tmp_path / "a", "--dst", tmp_path / "b")[0] == 0
    assert tree(tmp_path / "b") == tree(folder)
    status, _, err = script("to_hf", "--src", tmp_path, "--dst", tmp_path / "c")
    assert status == 1 and "holds no params of convert/from_hf.py and no checkpoints of a run" in err
    status, _, err = script("from_hf", "--src", tmp_path / "nowhere", "--dst", tmp_path / "c")
    assert status == 1 and f"{tmp_path / 'nowhere'}: no such folder" in err


@pytest.mark.slow
def test_compare_sees_what_is_the_same_and_what_is_not(official, tmp_path):
    folder = official["float32", "1MB"]
    convert.from_hf(convert.plan_from_hf(folder), tmp_path / "orbax")
    status, out, err = script("compare", "--hf", folder, "--flax", tmp_path / "orbax")
    assert status == 0 and "logits, 4 layers" in out and "100.0%" in out, err[-2000:]
    chunk = tmp_path / "orbax" / "params" / "decoder.layers.attn.o.kernel" / "2.0.0"
    values = np.fromfile(chunk, np.float32)
    (values * 1.5).tofile(chunk)
    status, out, err = script("compare", "--hf", folder, "--flax", tmp_path / "orbax")
    assert status == 1 and "the logits differ by more than 0.001" in err
    rows = {line.split("  ")[0]: float(line[26:38]) for line in out.splitlines() if line.startswith("hidden")}
    assert rows["hidden state, 2 layers"] < 1e-4 < 1e-3 < rows["hidden state, 3 layers"]


@pytest.mark.slow
def test_a_run_starts_from_it_and_goes_back(official, tmp_path):
    """Training takes the converted folder; its checkpoint comes out as the run's own export does."""
    from qwenla_jax.config.checks import from_config_dict
    from qwenla_jax.config.run_options import CheckpointOptions, DataOptions, EvalOptions, RunOptions
    from qwenla_jax.config.schema import to_dict
    from qwenla_jax.train.loop import run

    convert.from_hf(convert.plan_from_hf(EMBEDDED), tmp_path / "orbax")
    options = RunOptions(
        stage="sft",
        steps=2,
        init_from=str(tmp_path / "orbax"),
        data=DataOptions(batch_size=2),
        eval=EvalOptions(every=0, final_size=0),
        checkpoint=CheckpointOptions(every=1),
    )
    run(from_config_dict(to_dict(options)), tmp_path / "run")
    status, _, err = script("to_hf", "--src", tmp_path / "run", "--dst", tmp_path / "hf")
    assert status == 0, err[-2000:]
    assert tree(tmp_path / "hf") == tree(tmp_path / "run" / "hf")
    assert script("to_hf", "--src", tmp_path / "run", "--dst", tmp_path / "one", "--step", 1)[0] == 0
    one, two = (qwenla_jax.load(tmp_path / name).params for name in ("one", "hf"))
    assert not same(one, two)
    status, _, err = script("to_hf", "--src", tmp_path / "run", "--dst", tmp_path / "no", "--step", 7)
    assert status == 1 and "there is no checkpoint of step 7" in err


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_table_of_the_published_sizes(size, shared_data, tmp_path):
    """Names and shapes as transformers has them for the published hyper-parameters; no weights are made."""
    from qwenla_jax.model.hf_names import canonical, table

    shutil.copy(shared_data / "configs" / f"qwen2_5_vl_{size}.json", tmp_path / "config.json")
    config = ModelConfig.from_hf(tmp_path)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
    theirs = {canonical(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.text.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    ours = {name: entry.shape for entry in table(config) for name in entry.names}
    assert ours == theirs and len(ours) > 700
    # The chunks of one layer are all that is ever held: never more than a tensor.
    most = max(int(np.prod(shape)) for shape in ours.values())
    assert most * 2 < 3e9
    assert dataclasses.asdict(config)["text"]["num_layers"] * 12 < len(ours)


def test_pieces_cover_every_byte_once(official):
    plan = convert.plan_from_hf(official["bfloat16", "1MB"])
    for header in plan.headers:
        spans = sorted((p.offset, p.size) for p in plan.pieces if p.file == header.file)
        end = 8 + len(header.text)
        for offset, size in spans:
            assert offset == end
            end += size
        assert end == header.file.stat().st_size
    assert len({piece.chunk for piece in plan.pieces}) == len(plan.pieces)
