"""Adapters against PEFT: logits, gradients, initial values, merged exports, and folders that PEFT loads."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

import qwenla_jax
from qwenla_jax.model import lora
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.weights.peft import save_adapters

SEED = 12  # three prompts, one of them with two images; heads of the released size
RANK, ALPHA = 3, 5
ALL_LINEAR = ("(decoder/layers|visual/(blocks|merger))/.*/kernel",)
# Ours -> the module of transformers, written down here a second time. Query, key and value of the tower are one there.
LAYERS = {
    "decoder/layers/attn/": {part: f"model.language_model.layers.{{}}.self_attn.{part}_proj" for part in "qkvo"},
    "decoder/layers/mlp/": {p: f"model.language_model.layers.{{}}.mlp.{p}_proj" for p in ("gate", "up", "down")},
    "visual/blocks/mlp/": {p: f"model.visual.blocks.{{}}.mlp.{p}_proj" for p in ("gate", "up", "down")},
    "visual/blocks/attn/": {"proj": "model.visual.blocks.{}.attn.proj"},
    "visual/merger/": {"fc1": "model.visual.merger.mlp.0", "fc2": "model.visual.merger.mlp.2"},
}
SINGLE = {prefix + part: module for prefix, parts in LAYERS.items() for part, module in parts.items()}
FUSED = "model.visual.blocks.{}.attn.qkv"
TARGETS = (
    r".*(language_model\.layers|visual\.(blocks|merger))\..*"
    r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|attn\.qkv|attn\.proj|mlp\.0|mlp\.2)"
)


def their_adapters(model):
    """PEFT's matrices by module: module -> (A [r, in], B [out, r]), as parameters of torch."""
    result = {}
    for name, value in model.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            result.setdefault(module, {})[rest[0]] = value
    return result


def ours_from(theirs, shapes, read):
    """Our tree of adapters, filled by `read` from PEFT's parameters."""
    flat = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        layer, _, name = path.rpartition("/")
        side = {"lora_a": "A", "lora_b": "B"}.get(name)
        if side is None:
            flat[path] = np.full(leaf.shape, ALPHA / RANK, np.float32)
            continue
        part = layer.rpartition("/")[2]
        fused = layer.startswith("visual/blocks/attn/") and part in "qkv"
        module = FUSED if fused else SINGLE[layer]
        values = []
        for number in range(leaf.shape[0] if leaf.ndim == 3 else 1):
            value = read(theirs[module.format(number)][side])
            if fused and side == "B":
                value = np.split(value, 3)["qkv".index(part)]
            values.append(value.T)
        flat[path] = np.stack(values) if leaf.ndim == 3 else values[0]
        assert flat[path].shape == leaf.shape, path
    return unflatten_dict(flat, sep="/")


def released(module):
    """The released files' name of a module's matrix."""
    return module.replace("model.language_model.", "model.").replace("model.visual.", "visual.") + ".weight"


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, vision, prompts):
    return forward(model, params, vision, prompts)


def forward(model, params, vision, prompts):
    visual_ZxD = model.apply({"params": params}, vision, method="encode")
    x = model.apply({"params": params}, prompts.ids_QxP, prompts.visual_QxP, visual_ZxD, method="embed")
    return logits_of(params, model.apply({"params": params}, x, prompts.pos_QxPx3, method="decode").hidden_BxTxD)


def real(batch, ours_QxPxV, theirs_QxPxV):
    """Logits of the real tokens of both sides: ours are padded on the right, theirs on the left."""
    P = theirs_QxPxV.shape[1]
    pairs = [(ours_QxPxV[q, :n], theirs_QxPxV[q, P - n :]) for q, n in enumerate(batch.length_Q)]
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))


@pytest.fixture(scope="module")
def pair(oracle, tmp_path_factory):
    """A model of transformers with PEFT's adapters, B random too; ours with the same; and a batch for both."""
    arch = oracle.architecture(SEED)
    official = oracle.build(arch)
    folder = tmp_path_factory.mktemp("base")
    official.save_pretrained(folder)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    theirs = peft.get_peft_model(official, config)
    first = {m: {s: v.detach().numpy().copy() for s, v in own.items()} for m, own in their_adapters(theirs).items()}
    torch.manual_seed(4)
    with torch.no_grad():
        for own in their_adapters(theirs).values():
            own["B"].normal_(std=0.3)
    model, params = qwenla_jax.load(folder)
    kernels = lora.kernels_for(model.config, ALL_LINEAR)
    shapes = jax.eval_shape(lambda: lora.adapters(params, kernels, RANK, ALPHA, jax.random.key(0), "float32"))
    own = ours_from(their_adapters(theirs), shapes, lambda p: p.detach().numpy())
    batch = oracle.inputs(arch)
    return folder, theirs, model, lora.joined(params, own), batch, first


def test_every_linear_layer_but_the_head_has_one(pair):
    _, theirs, _, params, _, _ = pair
    mine = sum(x.size for p, x in flatten_dict(lora.only_adapters(params), sep="/").items() if "scale" not in p)
    own = their_adapters(theirs)
    fused = sum(v["A"].numel() for m, v in own.items() if m.endswith("attn.qkv"))
    assert mine == sum(v.numel() for side in own.values() for v in side.values()) + 2 * fused  # q, k, v share A there


def test_logits_and_gradients_are_pefts(pair):
    _, theirs, model, params, batch, _ = pair
    expected = theirs(**batch.hf).logits
    ours, want = real(batch, np.asarray(logits(model, params, batch.vision, batch.prompts)), expected.detach().numpy())
    plain = np.asarray(logits(model, lora.base_of(params), batch.vision, batch.prompts))
    assert np.abs(real(batch, plain, plain)[0][: len(ours)] - ours).max() > 0.1  # the adapters matter
    np.testing.assert_allclose(ours, want, atol=1e-4, rtol=0)

    # The gradient of one random weighing of all real logits.
    rng = np.random.default_rng(1)
    P, V = expected.shape[1:]
    weights = [rng.normal(size=(n, V)).astype(np.float32) for n in batch.length_Q]
    value = sum((expected[q, P - len(w) :] * torch.from_numpy(w)).sum() for q, w in enumerate(weights))
    theirs.zero_grad()
    value.backward()

    def weighed(own):
        result = forward(model, lora.joined(params, own), batch.vision, batch.prompts)
        return sum(jnp.sum(result[q, : len(w)] * w) for q, w in enumerate(weights))

    own = lora.only_adapters(params)
    grads = flatten_dict(jax.jit(jax.grad(weighed))(own), sep="/")
    want = flatten_dict(ours_from(their_adapters(theirs), own, lambda p: p.grad.numpy()), sep="/")
    qkv = [f"visual/blocks/attn/{part}/lora_a" for part in "qkv"]
    total = sum(np.asarray(grads[path]) for path in qkv)  # one A there, three here
    np.testing.assert_allclose(total, want[qkv[0]], atol=2e-4 * np.abs(total).max(), rtol=0)
    checked = 0
    for path, grad in grads.items():
        if path not in qkv and "scale" not in path:
            assert np.abs(grad).max() > 0
            np.testing.assert_allclose(grad, want[path], atol=2e-4 * np.abs(want[path]).max(), rtol=0, err_msg=path)
            checked += 1
    assert checked == 2 * len(SINGLE) + 3


def test_a_merged_export_is_the_model_with_adapters(pair, tmp_path):
    folder, theirs, model, params, batch, _ = pair
    qwenla_jax.save(tmp_path / "merged", model, params)
    merged = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        one, other = merged(**batch.hf).logits.numpy(), theirs(**batch.hf).logits.numpy()
    P = other.shape[1]
    for q, n in enumerate(batch.length_Q):
        np.testing.assert_allclose(one[q, P - n :], other[q, P - n :], atol=1e-4, rtol=0)
    # Rounded once: bfloat16 of the sum in exact numbers, where rounding the product first would give others.
    qwenla_jax.save(tmp_path / "rounded", model, params, dtype="bfloat16")
    base, result = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "rounded"))
    own = their_adapters(theirs)
    same, twice = [], []
    for module, sides in own.items():
        name = released(module)
        wide = base[name].astype(np.float64)
        more = ALPHA / RANK * sides["B"].detach().double().numpy() @ sides["A"].detach().double().numpy()
        same.append(np.mean(result[name] == (wide + more).astype(ml_dtypes.bfloat16)))
        rough = wide.astype(ml_dtypes.bfloat16).astype(np.float64) + more.astype(ml_dtypes.bfloat16).astype(np.float64)
        twice.append(np.mean(result[name] == rough.astype(ml_dtypes.bfloat16)))
    assert np.mean(same) > 0.999 and np.mean(twice) < 0.9, (np.mean(same), np.mean(twice))
    for name in base.keys() - {released(module) for module in own}:
        assert np.array_equal(result[name], base[name].astype(ml_dtypes.bfloat16)), name


@pytest.mark.parametrize(
    "modules", [ALL_LINEAR, ("visual/blocks/attn/[qv]/kernel", "decoder/layers/mlp/down/kernel")], ids=["all", "some"]
)
def test_peft_loads_the_adapters(pair, tmp_path, modules):
    """Ours are random; the tower's q, k, v have an A of their own each, and in the second case k has none."""
    folder, _, model, params, batch, _ = pair
    base = lora.base_of(params)
    kernels = lora.kernels_for(model.config, modules)
    own = lora.adapters(base, kernels, RANK, ALPHA, jax.random.key(2), "float32")
    rng = np.random.default_rng(3)
    own = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key != "lora_b" else rng.normal(size=x.shape, scale=0.3).astype(np.float32), own
    )
    whole = lora.joined(base, own)
    save_adapters(tmp_path / "adapter", model.config, whole, str(folder))
    fresh = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected tensors are warnings there
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(held) == set(peft.get_peft_model_state_dict(loaded))
    with torch.no_grad():
        expected = loaded(**batch.hf).logits.numpy()
    ours = np.asarray(logits(model, whole, batch.vision, batch.prompts))
    np.testing.assert_allclose(*real(batch, ours, expected), atol=1e-4, rtol=0)
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(folder)
    with pytest.raises(FileExistsError, match="adapter: already exists"):
        save_adapters(tmp_path / "adapter", model.config, whole)
    with pytest.raises(ValueError, match="no adapters to write"):
        save_adapters(tmp_path / "none", model.config, base)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_first_values_are_drawn_as_pefts(pair):
    """A uniform within the same bounds, B zero; no two kernels or layers alike."""
    *_, params, _, first = pair[:6]
    base = lora.base_of(params)
    layers = ("decoder/layers/attn/q", "decoder/layers/attn/o", "decoder/layers/mlp/down", "visual/merger/fc1")
    kernels = tuple(f"{layer}/kernel" for layer in layers)
    own = lora.adapters(base, kernels, 64, 16.0, jax.random.key(0), "float32")
    alone = lora.adapters(base, kernels[2:3], 64, 16.0, jax.random.key(0), "float32")
    flat = flatten_dict(own, sep="/")
    for path in kernels:
        layer = path.removesuffix("/kernel")
        a, theirs = np.asarray(flat[f"{layer}/lora_a"]), first[SINGLE[layer].format(0)]
        bound = 1 / np.sqrt(a.shape[-2])
        # The oracle's matrix is small: its largest entry is near the bound, and the spread is that of a uniform.
        assert 0.8 * bound < np.abs(theirs["A"]).max() <= bound and 0.97 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose([a.std(), a.mean()], [bound / np.sqrt(3), 0], atol=0.05 * bound)
        assert not flat[f"{layer}/lora_b"].any() and not theirs["B"].any()
        assert np.all(flat[f"{layer}/lora_scale"] == 0.25)
    q = np.asarray(flat["decoder/layers/attn/q/lora_a"])
    o = np.asarray(flat["decoder/layers/attn/o/lora_a"])
    assert not np.array_equal(q[0], q[1]) and q.shape == o.shape and not np.array_equal(q, o)
    down = "decoder/layers/mlp/down/lora_a"
    np.testing.assert_array_equal(flat[down], flatten_dict(alone, sep="/")[down])
