"""Reading and writing Hugging Face folders, against transformers, safetensors' own files and torch's tensors."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwenla_jax
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.model.config import ModelConfig, TextConfig, VisionConfig
from qwenla_jax.model.qwen_vl import init_params
from qwenla_jax.text.tokenizer import train_tiny_tokenizer
from qwenla_jax.weights import hf

VISION = VisionConfig(2, 16, 20, 2, 3, 4, 2, 2, 16, (1,), 24, 2)
TEXT = TextConfig(100, 24, 40, 3, 3, 1, 8, 1e-6, 1e4, (2, 1, 1), False)
CONFIG = ModelConfig(VISION, TEXT, 90, 91, 92, 93)
TIED = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, tie_word_embeddings=True))


def _official(folder, tied=False, dtype="float32"):
    """A transformers model with every weight random, saved by transformers itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2_5_VLConfig.from_dict((TIED if tied else CONFIG).to_hf())
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def _params(config=CONFIG):
    """Random parameters, norms and biases too."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_twice_is_the_original_file(tmp_path, tied, dtype):
    _official(tmp_path / "hf", tied, dtype)
    model, params = qwenla_jax.load(tmp_path / "hf")
    assert model.config.dtype == model.config.param_dtype == dtype
    abstract = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    qwenla_jax.save(tmp_path / "ours", model, params)
    original = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == original
    assert ModelConfig.from_hf(tmp_path / "ours") == ModelConfig.from_hf(tmp_path / "hf")


def test_where_each_tensor_goes(tmp_path):
    """By hand, on the tensors whose transformation is not a mere transposition."""
    official = _official(tmp_path)
    state = {name: value.numpy() for name, value in official.state_dict().items()}
    _, params = hf.load_params(tmp_path)
    attn = params["visual"]["blocks"]["attn"]
    for layer in range(2):
        weight = state[f"model.visual.blocks.{layer}.attn.qkv.weight"]
        bias = state[f"model.visual.blocks.{layer}.attn.qkv.bias"]
        for part, name in enumerate("qkv"):
            np.testing.assert_array_equal(attn[name]["kernel"][layer], weight[16 * part : 16 * part + 16].T)
            np.testing.assert_array_equal(attn[name]["bias"][layer], bias[16 * part : 16 * part + 16])
    conv = official.model.visual.patch_embed.proj
    patches = np.random.default_rng(1).standard_normal((5, 3 * 2 * 4 * 4)).astype(np.float32)
    expected = official.model.visual.patch_embed(conv.weight.new_tensor(patches)).detach().numpy()
    np.testing.assert_allclose(patches @ params["visual"]["patch_embed"]["kernel"], expected, atol=1e-4)
    up = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up[2], state["model.language_model.layers.2.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(params["decoder"]["lm_head"]["kernel"], state["lm_head.weight"].T)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_we_write(tmp_path, config, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    params = _params(config)
    folder = qwenla_jax.save(tmp_path / "new" / "model", config, params, max_shard_bytes=max_shard_bytes)
    official, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in official.state_dict().items():
        if name == "model.language_model.layers.1.self_attn.o_proj.weight":
            np.testing.assert_array_equal(value.numpy().T, params["decoder"]["layers"]["attn"]["o"]["kernel"][1])
    official.save_pretrained(tmp_path / "again")
    _same(hf.load_params(tmp_path / "again")[1], params)
    _same(hf.load_params(folder)[1], params)
    shards = sorted(folder.glob("*.safetensors"))
    if max_shard_bytes == 20_000:
        assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
        for shard in shards:
            tensors = load_file(shard)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]


def test_names_of_newer_versions(tmp_path):
    qwenla_jax.save(tmp_path / "a", CONFIG, _params())
    tensors = {}
    for name, value in load_file(tmp_path / "a" / "model.safetensors").items():
        prefix = {"visual": "model.visual.", "model": "model.language_model."}.get(name.split(".")[0])
        tensors[name if prefix is None else prefix + name.split(".", 1)[1]] = value
    tensors["model.language_model.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # a buffer that carries nothing
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    _same(hf.load_params(tmp_path / "a")[1], _params())


def test_types(tmp_path):
    params = _params()
    qwenla_jax.save(tmp_path / "half", CONFIG, params, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    config, kept = hf.load_params(tmp_path / "half")
    assert config.param_dtype == config.dtype == "bfloat16"
    _same(kept, rounded)
    config, wide = hf.load_params(tmp_path / "half", dtype="float32", remat="dots")
    assert (config.param_dtype, config.dtype, config.remat) == ("float32", "float32", "dots")
    _same(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))
    config, mixed = hf.load_params(tmp_path / "half", dtype="bfloat16", param_dtype="float32")
    assert (config.param_dtype, config.dtype) == ("float32", "bfloat16")
    assert jax.tree.leaves(mixed)[0].dtype == np.float32
    with pytest.raises(ValueError, match="param_dtype 'int4' is not one of"):
        hf.load_params(tmp_path / "half", dtype="float32", param_dtype="int4")


def test_shardings(tmp_path):
    qwenla_jax.save(tmp_path / "a", CONFIG, _params())
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    by_rows = jax.tree.map(lambda leaf: jax.NamedSharding(mesh, jax.P("data")), _params())
    for shardings in (everywhere, by_rows):
        _, params = hf.load_params(tmp_path / "a", shardings=shardings)
        _same(params, _params())
        expected = shardings if shardings is everywhere else by_rows["decoder"]["norm"]["scale"]
        assert params["decoder"]["norm"]["scale"].sharding == expected


def test_tokenizer_and_processor(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tiny_tokenizer(["count the red circles"], vocab_size=320)
    processor = ProcessorSettings(784, 12544, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    ids = {name: tokenizer.token_to_id(name) for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>")}
    config = ModelConfig(
        VISION,
        dataclasses.replace(TEXT, vocab_size=tokenizer.vocab_size),
        *ids.values(),
        tokenizer.token_to_id("<|vision_end|>"),
    )
    folder = qwenla_jax.save(tmp_path / "a", config, _params(config), tokenizer=tokenizer, processor=processor)
    loaded = qwenla_jax.load(folder)
    text = "<|im_start|>user\ncount<|im_end|>\n<SUMMARY>"
    assert loaded.config == config and loaded.processor == processor
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    assert generation.eos_token_id == [end, pad] and generation.pad_token_id == pad
    official = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert official.generation_config.eos_token_id == [end, pad]
    (folder / "tokenizer.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    bare = qwenla_jax.load(folder)
    assert bare.tokenizer is None and bare.processor is None


def _rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_all_wrong_tensors_in_one_error(tmp_path):
    qwenla_jax.save(tmp_path / "a", CONFIG, _params())

    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["visual.blocks.1.attn.qkv.bias"]
        tensors["model.layers.9.input_layernorm.weight"] = np.zeros(24, np.float32)
        tensors["visual.merger.ln_q.weight"] = np.zeros(17, np.float32)
        tensors["lm_head.weight"] = np.zeros((100, 24), np.int64)
        tensors["model.visual.merger.mlp.0.bias"] = tensors["visual.merger.mlp.0.bias"].copy()

    _rewrite(tmp_path / "a", change)
    with pytest.raises(ValueError) as caught:
        hf.load_params(tmp_path / "a")
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "dtype: lm_head.weight is I64, should be one of F32, BF16, F16",
        "given twice: visual.merger.mlp.0.bias (again in model.safetensors as visual.merger.mlp.0.bias)",
        "misshapen: visual.merger.ln_q.weight is [17], should be [16]",
        "missing: model.norm.weight [24]",
        "missing: visual.blocks.1.attn.qkv.bias [48]",
        "unexpected: model.layers.9.input_layernorm.weight [24]",
    ]
    assert str(tmp_path / "a") in str(caught.value).splitlines()[0]


def test_tied_head_in_the_file(tmp_path):
    qwenla_jax.save(tmp_path / "a", TIED, _params(TIED))
    _rewrite(tmp_path / "a", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    _same(hf.load_params(tmp_path / "a")[1], _params(TIED))
    _rewrite(tmp_path / "a", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="contradiction: config.json ties the embeddings"):
        hf.load_params(tmp_path / "a")


def test_broken_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        qwenla_jax.load(tmp_path / "nowhere")
    folder = qwenla_jax.save(tmp_path / "a", CONFIG, _params(), max_shard_bytes=20_000)
    shard = folder / sorted(p.name for p in folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}: not a readable safetensors file"):
        qwenla_jax.load(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such file, though model.safetensors.index.json"):
        qwenla_jax.load(folder)
    index = folder / "model.safetensors.index.json"
    for content, message in (
        ("{}", "not a safetensors index"),
        ('{"weight_map": 5}', "not a safetensors index"),
        ("[]", "holds a list"),
        ('{"weight_map": {"a": 3}}', "3 is no file name; expected a plain one that ends in .safetensors"),
        ('{"weight_map": {"a": null, "b": "c.safetensors"}}', "None is no file name"),
        ('{"weight_map": {"a": ["x.safetensors"]}}', "is no file name"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors' is no file name"),
        (json.dumps({"weight_map": {"a": f"{tmp_path}/x.safetensors"}}), "is no file name"),
        ("[" * 200_000, "nested more than 100 deep"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=f"index.json: {message}|index.json: .*{message}"):
            qwenla_jax.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        qwenla_jax.load(folder)


def test_save_refuses(tmp_path):
    params = _params()
    del params["decoder"]["norm"]
    params["visual"]["extra"] = np.zeros(3)
    params["decoder"]["lm_head"]["kernel"] = np.zeros((100, 24))
    with pytest.raises(ValueError) as caught:
        qwenla_jax.save(tmp_path / "a", CONFIG, params)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "misshapen: decoder/lm_head/kernel is [100, 24], should be [24, 100]",
        "missing: decoder/norm/scale [24]",
        "unexpected: visual/extra [3]",
    ]
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        qwenla_jax.save(tmp_path / "a", CONFIG, _params(), max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_save_is_atomic(tmp_path):
    class Broken:
        def token_to_id(self, token):
            return 1

        def save(self, folder, system):
            raise OSError("disk full")

    qwenla_jax.save(tmp_path / "a", CONFIG, _params())
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qwenla_jax.save(tmp_path / "a", CONFIG, _params())
    with pytest.raises(OSError, match="disk full"):
        qwenla_jax.save(tmp_path / "a", TIED, _params(TIED), tokenizer=Broken(), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    qwenla_jax.save(tmp_path / "a", TIED, _params(TIED), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert hf.load_params(tmp_path / "a")[0] == TIED
    assert len({p.stat().st_mode for p in (tmp_path / "a").iterdir()}) == 1  # the weights are as readable as the rest


def test_import_is_light_and_loading_takes_no_torch(tmp_path):
    qwenla_jax.save(tmp_path / "a", CONFIG, _params())
    code = (
        "import sys, qwenla_jax; assert qwenla_jax.__version__; assert 'jax' not in sys.modules;"
        f"qwenla_jax.load({str(tmp_path / 'a')!r}); assert 'transformers' not in sys.modules;"
        "assert qwenla_jax.load('tiny').tokenizer.ids; assert 'torch' not in sys.modules; print('fine')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "fine", out.stderr
