"""Runs with adapters: what moves, what is kept, what is refused. PEFT is the oracle of the model (tests/parity)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from models import IMAGE, VOCAB, questions, small_model
from safetensors.numpy import load_file, save_file

import qwenla_jax
from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import (
    BrpoOptions,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    GuardOptions,
    LoraOptions,
    OptimOptions,
    PoolOptions,
    RewardOptions,
    RunOptions,
)
from qwenla_jax.config.schema import ConfigError, to_dict
from qwenla_jax.model import lora
from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.layers import Dense
from qwenla_jax.model.trainable import VOCABULARY_AXIS, trainable_labels
from qwenla_jax.parallel.sharding import param_shapes
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.tools.dry_run import describe_run, parameter_counts
from qwenla_jax.tools.export import export_run
from qwenla_jax.tools.preflight import examine
from qwenla_jax.tools.replay import replay
from qwenla_jax.train.brpo.reference import make_reference
from qwenla_jax.train.health import Failed
from qwenla_jax.train.loop import RunRefused, first_state, run, state_plan
from qwenla_jax.train.optimizer import make_optimizer
from qwenla_jax.train.sft import trainer
from qwenla_jax.train.sft.update import make_sft_gradient
from qwenla_jax.train.train_runtime import build
from qwenla_jax.train.train_state import create, fingerprint, make_update
from qwenla_jax.types import TokenBatch
from qwenla_jax.weights.hub import EMBEDDED
from qwenla_jax.weights.peft import save_adapters

ATTENTION = ("decoder/layers/attn/(q|k|v|o)/kernel", "decoder/layers/mlp/down/kernel")
SMALL = RunOptions(
    stage="brpo",
    steps=2,
    data=DataOptions(batch_size=2, max_response_tokens=48, max_prompt_tokens=96),
    optim=OptimOptions(learning_rate=1e-2, warmup_ratio=0.0),
    brpo=BrpoOptions(group_size=2, temperature=3.0),  # so hot that rewards differ
    rewards=RewardOptions(target_length=4.0, pool=PoolOptions(workers=1)),
    eval=EvalOptions(every=0, final_size=0),
    checkpoint=CheckpointOptions(every=1, keep=3),
    lora=LoraOptions(rank=4, alpha=8.0, modules=ATTENTION),
)
TAGS = ((r"decoder/(embed/embedding|lm_head/kernel)", "tags"), (".*", "train"))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def with_adapters(config, params, modules=ATTENTION, rank=3, seed=0):
    kernels = lora.kernels_for(config, modules)
    return lora.joined(params, lora.adapters(params, kernels, rank, 6.0, jax.random.key(seed), "float32"))


def untied():
    """The embedded model's configuration, with a head of its own."""
    config = ModelConfig.from_hf(EMBEDDED)
    return replace(config, text=replace(config.text, tie_word_embeddings=False))


def moments(opt_state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state) if leaf.ndim)


# The model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_the_base_model_bit_for_bit(dtype):
    model, params = small_model(dtype=dtype, param_dtype=dtype)
    more = with_adapters(model.config, params, ("(decoder/layers|visual/(blocks|merger))/.*/kernel",))
    vision, prompts = questions(2)
    forward = jax.jit(
        lambda p: model.apply({"params": p}, vision, prompts.ids_QxP, prompts.pos_QxPx3, prompts.visual_QxP),
    )
    base, first = forward(params), forward(more)
    np.testing.assert_array_equal(np.asarray(base, np.float32), np.asarray(first, np.float32))
    more["decoder"]["layers"]["attn"]["v"]["lora_b"] += 1
    assert not np.array_equal(np.asarray(base, np.float32), np.asarray(forward(more), np.float32))


def test_the_product_of_a_and_b_is_never_made():
    """Products of a linear layer of 5 rows, 16 to 12 numbers, rank 3: by shapes alone."""
    layer = Dense(12, ("embed", "mlp"))
    params = {"kernel": jnp.ones((16, 12)), "lora_a": jnp.ones((16, 3)), "lora_b": jnp.ones((3, 12)), "lora_scale": 2.0}
    jaxpr = jax.make_jaxpr(lambda p, x: layer.apply({"params": p}, x))(params, jnp.ones((5, 16)))
    products = [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert sorted(products) == [(5, 3), (5, 12), (5, 12)]


def test_wrong_modules_are_refused_by_name():
    config = untied()
    with pytest.raises(ValueError, match=r"'decoder/layers/atn/q/kernel' matches no .*near are decoder/layers/attn/"):
        lora.kernels_for(config, ("decoder/layers/atn/q/kernel",))
    for pattern in ("q_proj", "attn/q/kernel", "decoder/layers/attn/q"):  # whole paths only
        with pytest.raises(ValueError, match=f"'{pattern}' matches no parameter; near are"):
            lora.kernels_for(config, (pattern,))
    with pytest.raises(ValueError, match=r"decoder/layers/mlp/(dwn|down)/kernel"):
        lora.kernels_for(config, ("decoder/layers/mlp/(up|gate)/kernel", "decoder/layers/mlp/dwn/kernel"))
    for pattern, named in (
        ("decoder/norm/scale", "decoder/norm/scale"),
        ("decoder/layers/.*", "decoder/layers/input_norm/scale"),
        (".*/kernel", "visual/patch_embed/kernel"),
        ("decoder/lm_head/kernel", "decoder/lm_head/kernel"),
        ("decoder/layers/attn/q/bias", "decoder/layers/attn/q/bias"),
        ("decoder/embed/embedding", "decoder/embed/embedding"),
    ):
        with pytest.raises(ValueError, match=f"matches .*{named}.*can have no adapter"):
            lora.kernels_for(config, (pattern,))
    result = lora.kernels_for(config, ATTENTION + ("decoder/layers/attn/q/kernel",))
    assert [path.split("/")[-2] for path in result] == ["q", "k", "v", "o", "down"]


def test_wrong_settings_are_refused_before_anything_starts():
    def check(**changes):
        from_config_dict(to_dict(replace(SMALL, lora=replace(SMALL.lora, **changes))))

    check()
    for changes, message in (
        ({"rank": 0}, "config.lora.rank: got 0, expected at least 1"),
        ({"alpha": 0.0}, "config.lora.alpha: got 0.0, expected more than 0"),
        ({"modules": ("decoder/(",)}, r"config.lora.modules: 'decoder/\(' is not a regular expression"),
        ({"modules": ("(" * 5000 + ")" * 5000,)}, r"config.lora.modules: '\(+\.\.\.\)+' is not a regular expression"),
        ({"modules": ()}, "config.lora.modules: got none"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(**changes)
    with pytest.raises(RunRefused, match="config.lora.modules: 'attn' matches no parameter"):
        run(replace(SMALL, lora=LoraOptions(rank=1, modules=("attn",))), Path("/nonexistent"))


# What is trained


def test_rules_are_for_the_base_model():
    more = param_shapes(untied(), lora.kernels_for(untied(), ATTENTION), 3)

    def trained(rules):
        labels = flatten_dict(trainable_labels(more, rules), sep="/")
        return {path: label for path, label in labels.items() if label != "freeze"}

    adapters = {path: "train" for path in flatten_dict(lora.only_adapters(more), sep="/") if "scale" not in path}
    assert len(adapters) == 2 * 5
    assert trained([(".*", "train")]) == trained([(".*", "freeze")]) == adapters
    head = {"decoder/embed/embedding": "tags", "decoder/lm_head/kernel": "tags"}
    assert trained(TAGS) == adapters | head
    norms = {"decoder/layers/input_norm/scale": "train", "decoder/layers/post_norm/scale": "train"}
    assert trained([("decoder/layers/.*norm/.*", "train"), (".*", "train")]) == adapters | norms
    with pytest.raises(ValueError, match="'train' for decoder/layers/attn/q/kernel, but config.lora gives it an adapt"):
        trained([("decoder/layers/attn/q/.*", "train"), (".*", "freeze")])
    with pytest.raises(ValueError, match="cover no parameter"):
        trained([(".*lora_a", "train"), (".*", "freeze")])


@pytest.mark.parametrize("rules", [((".*", "train"),), TAGS], ids=["adapters", "tags too"])
def test_an_update_moves_the_adapters_and_nothing_else(rules):
    """AdamW of optax, run by hand over the adapters alone, ends at the same numbers; the rest keeps every bit."""
    model, params = small_model()
    # A zero with a sign: adding 0 to it would lose the sign.
    params["decoder"]["layers"]["attn"]["q"]["kernel"] = jnp.negative(
        jnp.zeros_like(params["decoder"]["layers"]["attn"]["q"]["kernel"])
    )
    more = with_adapters(model.config, params)
    options = OptimOptions(learning_rate=1e-2, warmup_ratio=0.0, clip_norm=None, weight_decay=0.1, trainable=rules)
    rows = (3, 5) if rules is TAGS else ()
    optimizer = make_optimizer(options, 10, more, rows)
    state = create(more, optimizer)
    own = {p: x for p, x in flatten_dict(lora.only_adapters(more), sep="/").items() if "scale" not in p}
    also = {p: x for p, x in flatten_dict(more, sep="/").items() if rules is TAGS and p in VOCABULARY_AXIS}
    assert moments(state.opt_state) == 2 * sum(x.nbytes for x in (own | also).values())
    vision, prompts = questions(2)
    target_BxR = np.tile(np.arange(1, prompts.ids_QxP.shape[1], dtype=np.int32), (2, 1))
    loss_BxR = np.ones(target_BxR.shape, np.float32)
    tokens = TokenBatch(prompts.ids_QxP, prompts.pos_QxPx3, prompts.visual_QxP, prompts.length_Q, target_BxR, loss_BxR)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (vision, tokens))
    bias = suppression_bias(VOCAB, VOCAB, [IMAGE])
    gradient = make_sft_gradient(model, rules)
    step = jax.jit(make_update(gradient, optimizer))
    grads = flatten_dict(jax.jit(gradient)(more, *batch, bias)[0], sep="/")
    assert set(grads) == set(own | also)
    new = state
    for _ in range(3):
        new, metrics = step(new, *batch, bias)
    assert metrics["skipped"] == 0
    before, after = flatten_dict(more, sep="/"), flatten_dict(new.params, sep="/")
    assert before.keys() == after.keys()
    for path, old in before.items():
        one, two = np.asarray(old), np.asarray(after[path])
        if path in own:
            assert not np.array_equal(one, two), path
        elif path in also:
            moved = np.flatnonzero((one != two).any(1 if "embed" in path else 0))
            assert set(moved) <= set(rows)
        else:
            assert one.tobytes() == two.tobytes(), path
    if rules is not TAGS:
        theirs = optax.adamw(1e-2, options.b1, options.b2, options.eps, weight_decay=0.1)
        by_hand, memory = own, theirs.init(own)
        at = jax.jit(gradient)
        for _ in range(3):
            whole = lora.joined(more, unflatten_dict(by_hand, sep="/"))
            updates, memory = theirs.update(flatten_dict(at(whole, *batch, bias)[0], sep="/"), memory, by_hand)
            by_hand = optax.apply_updates(by_hand, updates)
        for path, leaf in by_hand.items():
            np.testing.assert_allclose(after[path], leaf, atol=2e-5, err_msg=path)


def test_types_the_reference_and_what_is_copied():
    """The base in the type that is computed in, what is trained in the other; no second base for the reference."""
    # Random weights: on a CPU those of a file may lie in the file's memory, which no array can be given.
    options = replace(SMALL, init_from=f"random:{EMBEDDED}", dtype="bfloat16")
    options = replace(options, optim=replace(SMALL.optim, trainable=TAGS))
    runtime, params = build(options)
    reference = make_reference(runtime, params)
    flat = flatten_dict(params, sep="/")
    wide = {path for path, leaf in flat.items() if leaf.dtype == jnp.float32}
    adapters = {path for path in flat if lora.is_adapter(path)}
    assert len(adapters) == 3 * 5 and wide == adapters | {"decoder/embed/embedding"}
    assert {path: leaf.dtype for path, leaf in flatten_dict(reference, sep="/").items()} == {
        "decoder/embed/embedding": ml_dtypes.bfloat16
    }
    optimizer, shardings = state_plan(runtime, params)
    at = {path: leaf.unsafe_buffer_pointer() for path, leaf in flat.items()}
    del flat
    state = first_state(params, optimizer, shardings, keep=reference is params)
    here = flatten_dict(state.params, sep="/")
    assert all(here[path].unsafe_buffer_pointer() == place for path, place in at.items() if path not in wide)
    assert np.isfinite(np.asarray(reference["decoder"]["embed"]["embedding"], np.float32)).all()
    runtime, params = build(replace(options, optim=SMALL.optim))
    assert make_reference(runtime, params) == {}


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    run(SMALL, workdir)
    return workdir


def test_the_first_step_is_on_policy_and_at_its_reference(finished):
    first, second = [line for line in lines(finished) if "train/kl" in line]
    assert abs(first["train/ratio_mean"] - 1) < 1e-5 and abs(first["train/kl"]) < 1e-9
    assert first["train/grad_norm"] > 0 and second["train/kl"] > 1e-9
    # The sampler has the adapters too.
    assert second["train/sampling_logp_difference"] < 1e-4 and abs(second["train/ratio_mean"] - 1) < 1e-5


def test_the_checkpoint_holds_what_is_trained(finished):
    with ocp.StandardCheckpointer() as reader:
        held = reader.restore(finished / "checkpoints" / "2" / "state")
    params = flatten_dict(held["params"], sep="/")
    assert {path.rpartition("/")[2] for path in params} == {"lora_a", "lora_b"} and len(params) == 2 * 5
    size = sum(leaf.nbytes for leaf in params.values())
    assert moments(held["opt_state"]) == 2 * size
    runtime, start = build(SMALL)
    rank, config = 4, runtime.model.config.text
    wide = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    D, F = config.hidden_size, config.intermediate_size
    sides = 2 * (D + wide[0]) + 2 * (D + wide[1]) + (F + D)
    assert size == 4 * config.num_layers * rank * sides
    assert sum(x.nbytes for x in jax.tree.leaves(start)) > 5 * size


def test_the_export_is_the_base_with_what_was_added(finished, tmp_path):
    result = load_file(finished / "hf" / "model.safetensors")
    with ocp.StandardCheckpointer() as reader:
        held = flatten_dict(reader.restore(finished / "checkpoints" / "2" / "state")["params"], sep="/")
    runtime, base = build(replace(SMALL, lora=LoraOptions()))
    start = flatten_dict(base, sep="/")
    names = {part: f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkvo"} | {
        "down": "model.layers.{}.mlp.down_proj"
    }
    changed = set()
    for part, name in names.items():
        layer = f"decoder/layers/{'mlp' if part == 'down' else 'attn'}/{part}"
        a, b = (np.asarray(held[f"{layer}/{leaf}"], np.float64) for leaf in ("lora_a", "lora_b"))
        want = np.asarray(start[f"{layer}/kernel"], np.float64) + 2.0 * a @ b  # alpha / rank
        for number in range(len(want)):
            tensor = name.format(number) + ".weight"
            changed.add(tensor)
            np.testing.assert_allclose(result[tensor], want[number].T, rtol=0, atol=1e-6)
            assert np.abs(result[tensor] - np.asarray(start[f"{layer}/kernel"][number]).T).max() > 1e-4
    qwenla_jax.save(tmp_path / "base", runtime.model, base)
    before = load_file(tmp_path / "base" / "model.safetensors")
    for name in before.keys() - changed:
        assert before[name].tobytes() == result[name].tobytes(), name
    # And again from the work folder, by itself and as an adapter.
    export_run(finished, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        finished / "hf" / "model.safetensors"
    ).read_bytes()
    for name in ("README.md", "generation_config.json", "custom_generate/generate.py"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / "hf" / name).read_bytes()
    export_run(finished, tmp_path / "adapter", adapter=True)
    assert huggingface_hub.ModelCard.load(tmp_path / "adapter" / "README.md").data.library_name == "peft"
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    for name, value in merged.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if name in result:
            np.testing.assert_allclose(value.numpy(), result[name], atol=1e-6, err_msg=name)


def test_adapters_name_their_base_on_the_hub(tmp_path):
    model, params = small_model()
    save_adapters(tmp_path / "a", model.config, with_adapters(model.config, params), "org/base", revision="abc")
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "abc")


def test_a_resumed_run_is_the_uninterrupted_one(finished, tmp_path):
    run(replace(SMALL, steps=1), tmp_path)
    run(SMALL, tmp_path)
    one, two = (load_file(folder / "hf" / "model.safetensors") for folder in (finished, tmp_path))
    assert one.keys() == two.keys() and all(one[name].tobytes() == two[name].tobytes() for name in one)
    last = [[line for line in lines(folder) if line["step"] == 2][0] for folder in (finished, tmp_path)]
    assert all(last[0][key] == last[1][key] for key in last[0] if "timing" not in key and "perf" not in key)
    with pytest.raises(RunRefused, match="config.lora.rank: 4 in the checkpoint, 5 now"):
        run(replace(SMALL, steps=3, lora=replace(SMALL.lora, rank=5)), tmp_path)


def test_adapters_on_another_base_are_refused(tmp_path):
    """One bit of one frozen weight."""
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    options = replace(SMALL, stage="sft", steps=1, init_from=str(base))
    run(options, tmp_path / "run")
    run(options, tmp_path / "run")  # nothing left to do, and nothing against it
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"].view(np.uint32)[7] ^= 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunRefused, match="not those that the adapters in the checkpoint of step 1 were trained on"):
        run(replace(options, steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match="not those that the adapters"):
        export_run(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_fingerprint_knows_every_bit_and_place():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(3, 40, 5)).astype(np.float32), "b": rng.normal(size=7).astype(ml_dtypes.bfloat16)}
    tree = jax.tree.map(jnp.asarray, tree)
    seen = {fingerprint(tree)}
    assert fingerprint(jax.tree.map(lambda x: x + 0, tree)) in seen
    others = [{"a": tree["a"].at[1, 2, 3].add(1e-7)}, {"a": tree["a"][::-1]}, {"a": tree["a"][:, ::-1]}]
    others += [{"a": jnp.swapaxes(tree["a"], 0, 2)}, {"b": tree["b"].at[0].multiply(-1)}, {"b": tree["b"][::-1]}]
    for number, change in enumerate(others):
        seen.add(fingerprint(tree | change))
        assert len(seen) == number + 2


def test_a_step_with_adapters_is_computed_again(tmp_path, monkeypatch):
    collate = trainer.collate_sft

    def invalid(*args):
        vision, tokens = collate(*args)
        return vision.replace(patches_IxSxC=vision.patches_IxSxC * np.nan), tokens

    monkeypatch.setattr(trainer, "collate_sft", invalid)
    with pytest.raises(Failed, match="1 updates in a row were skipped"):
        run(replace(SMALL, stage="sft", guard=GuardOptions(max_skipped=1)), tmp_path)
    monkeypatch.undo()
    place = tmp_path / "step_dumps" / "step_000001"
    result = replay(place)
    assert result.reproduced, str(result)
    assert "decoder/layers/attn/q/lora_b" in result.not_finite and all("lora_" in path for path in result.not_finite)
    with ocp.StandardCheckpointer() as reader:
        assert len(jax.tree.leaves(reader.restore(place / "state")["params"])) == 2 * 5


def test_preflight_checks_the_adapters():
    checks = {check.name: check for check in examine(replace(SMALL, stage="sft"))}
    assert all(check.ok for check in checks.values()), "\n".join(map(str, checks.values()))
    assert "5 stacked kernels" in checks["adapters"].result and "are the same" in checks["adapters"].result


# Plans


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_parameters_are_those_of_peft(size, shared_data, tmp_path):
    (tmp_path / "config.json").write_text((shared_data / "configs" / f"qwen2_5_vl_{size}.json").read_text())
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
        names = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=names))
    trained, total = theirs.get_nb_trainable_parameters()
    options = RunOptions(init_from=f"random:{tmp_path}", dtype="bfloat16", lora=LoraOptions(rank=64))
    counts = parameter_counts(options, ModelConfig.from_hf(tmp_path))
    tied = 151936 * 2048 if size == "3b" else 0  # counted twice there while the two are not yet tied
    assert counts["adapters"] == trained and counts["train"] == counts["tags"] == 0
    base = sum(counts.values()) - counts["adapters"]
    assert base in (total - trained, total - trained - tied)
    # The base once, in two bytes a number, and the reference with it; adapters, gradient and moments in four each.
    assert f"memory that stays: {(2 * base + 16 * trained) / 1e9:.2f} GB" in "\n".join(describe_run(options))
    options = replace(options, optim=OptimOptions(trainable=((r"decoder/embed/.*", "tags"), (".*", "train"))))
    rows = counts["freeze"] - parameter_counts(options, ModelConfig.from_hf(tmp_path))["freeze"]
    vocab, width = {"3b": (151936, 2048), "7b": (152064, 3584)}[size]
    assert rows == 10 * width
    # The whole matrix is kept, and copied for the reference.
    moving = 16 * (trained + vocab * width) + 2 * vocab * width
    message = "\n".join(describe_run(options))
    assert f"memory that stays: {(2 * (base - vocab * width) + moving) / 1e9:.2f} GB" in message


def test_the_plan_of_a_run():
    options = replace(SMALL, dtype="bfloat16")
    message = "\n".join(describe_run(options))
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(EMBEDDED)
    base = model.num_parameters()
    D, F, K = 128, 320, 64
    own = 4 * 4 * (2 * (D + D) + 2 * (D + K) + D + F)
    assert f"parameters: {base + own:,}, of them trained {own:,} (rows of the tags 0), frozen {base:,}" in message
    assert f"rank 4, alpha 8, on decoder/layers/attn/q/kernel, {'decoder/layers/attn/k/kernel'}" in message
    assert "reference beside the frozen parameters 0.00" in message
