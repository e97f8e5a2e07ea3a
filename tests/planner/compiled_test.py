"""Programs from shapes alone. Oracles: the run's own programs and batches, and sizes worked out by hand."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from fit_options import LARGE
from jax.sharding import AbstractMesh, PartitionSpec

from qwenla_jax.config.run_options import OptimOptions, RunOptions
from qwenla_jax.config.shared_options import MeshOptions, ReattentionOptions
from qwenla_jax.data.batching.collate import collate_sft
from qwenla_jax.parallel.mesh import AXES, make_mesh
from qwenla_jax.parallel.sharding import gathered, row_shards
from qwenla_jax.planner.arithmetic import sizes_of
from qwenla_jax.planner.compiled import Load, abstract_batch, abstract_runtime, plan_programs
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.train import token_logprobs as logprobs
from qwenla_jax.train.train_runtime import build, make_run_source


def one_device(options):
    return abstract_runtime(options, make_mesh(MeshOptions(), devices=jax.devices()[:1]))


def tensors(text):
    """Sizes of all values in a lowered program's text, `tensor<8x1024xbf16>`."""
    return {tuple(int(n) for n in dims[:-1].split("x")) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", text)}


@pytest.mark.parametrize(("stage", "mode"), [("brpo", "none"), ("brpo", "copy"), ("sft", "none"), ("sft", "route")])
def test_no_program_holds_logits_of_all_tokens(stage, mode):
    """At the paper's sizes: [B, T, V] of responses would be 64 x 1,024 x 152,064. V stands beside rows, chunks of
    tokens or the width only, and no array is as large.
    """
    options = dataclasses.replace(LARGE, stage=stage, reattention=ReattentionOptions(mode=mode))
    programs = plan_programs(one_device(options), Load(512)).programs
    B, R, V, D = 64 if stage == "brpo" else 8, 1024, 152_064, 3584
    assert set(programs) == ({"rollout", "reference", "update"} if stage == "brpo" else {"update"})
    for name, program in programs.items():
        shapes = tensors(program.as_text())
        assert any(V in shape and D in shape for shape in shapes), "nothing was read"
        for shape in shapes:
            # What 28 layers keep may be larger; V does not divide by 28, so that is no pile of chunks of logits.
            assert shape[0] == 28 or math.prod(shape) < B * R * V * 0.9, (name, shape)
            if V in shape:
                assert math.prod(shape) // V in (1, B, B // 8, D), (name, shape)
            if shape[-1] == V // 11:  # the largest divisor of V up to 16,384
                assert math.prod(shape) // shape[-1] <= max(4096, D), (name, shape)


def test_a_batch_of_shapes_is_what_the_run_collates():
    own = ReattentionOptions(mode="copy", max_insertions=2)
    for options in (
        RunOptions(reattention=own, optim=OptimOptions(accumulation=2)),
        RunOptions(stage="sft", optim=OptimOptions(accumulation=2)),
        RunOptions(stage="sft", reattention=own),
    ):
        runtime, _ = build(options)
        sft = options.stage == "sft"
        source = make_run_source(options, "cold_start" if sft else "train")
        records = [source[i] for i in range(8)]
        if not sft:
            real = runtime.stack(records, runtime.collate_prompts, False)
        elif runtime.reattention().inserts:
            real = runtime.stack(records, runtime.collate_responses, True)
        else:
            real = runtime.stack(records, collate_sft, True)
        result = abstract_batch(runtime, Load(64, 112, 112))
        for mine, his in zip(jax.tree.leaves(result[: len(real)]), jax.tree.leaves(real), strict=True):
            # Lengths are the planned ones and not these records'; axes, types and rows are the same.
            assert mine.dtype == his.dtype and mine.ndim == his.ndim and mine.shape[:2] == his.shape[:2]
        assert jax.tree.structure(result[: len(real)]) == jax.tree.structure(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), real)
        )


def test_sizes_of_the_papers_batch():
    vision, prompts, rollout_batch = abstract_batch(one_device(LARGE), Load(512))
    # 640 x 480 becomes 23 x 17 visual tokens; 6 x 5 windows of 64 slots are 1,920, the next bucket is 2,048.
    assert vision.gather_IxM.shape == (2, 8, 391)
    assert vision.patches_IxSxC.shape == (2, 8, 2048, 1176)
    assert prompts.ids_QxP.shape == (2, 8, 512)
    assert rollout_batch.ids_BxR.shape == (2, 64, 1024)
    with pytest.raises(ValueError, match="prompt_tokens: got 200, but images of 640 x 480 pixels"):
        abstract_batch(one_device(LARGE), Load(200))


def test_sizes_of_questions_with_several_images():
    """Twice the images of the paper's batch; an insertion repeats both, with their delimiters."""
    options = dataclasses.replace(
        LARGE, data=dataclasses.replace(LARGE.data, max_images=2), reattention=ReattentionOptions(mode="copy")
    )
    runtime = one_device(options)
    vision, prompts, rollout_batch = abstract_batch(runtime, Load(1024))
    assert vision.patches_IxSxC.shape == (2, 16, 2048, 1176) and prompts.ids_QxP.shape == (2, 8, 1024)
    assert rollout_batch.selected_BxExX.shape == (2, 64, 2, 2 * (391 + 2))
    sizes, one = sizes_of(runtime, Load(1024)), sizes_of(one_device(LARGE), Load(1024))
    assert sizes.slots == 2 * one.slots and (sizes.patches_IxW == one.patches_IxW.repeat(2, axis=0)).all()
    with pytest.raises(ValueError, match=r"got 512, but images of .* \(config.data.max_images: 2\)"):
        abstract_batch(runtime, Load(512))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="preset 'tiny' names no architecture"):
        one_device(dataclasses.replace(LARGE, preset="tiny"))
    with pytest.raises(ValueError, match="8 rows do not divide over 16 devices"):
        abstract_runtime(LARGE, AbstractMesh((1, 16, 1), AXES))


@pytest.fixture
def peak(monkeypatch):
    """Bytes of the temporaries of a gradient of log-probabilities of B x T tokens out of V."""
    monkeypatch.setattr(logprobs, "TOKEN_CHUNK", 64)
    monkeypatch.setattr(logprobs, "VOCAB_CHUNK", 128)

    def measure(B, T, V, D=16):
        def loss(hidden, head, ids):
            return logprobs.token_logprobs(hidden, head, ids, np.zeros(V, np.float32))[0].sum()

        sizes = (((B, T, D), "float32"), ((D, V), "float32"), ((B, T), "int32"))
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in sizes]
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    return measure


@pytest.mark.slow
def test_memory_grows_with_tokens_and_vocabulary_apart(peak):
    """Linear in each: what [B, T, V] would add, their product, is not there."""
    base, longer, wider, both = peak(4, 256, 512), peak(4, 1024, 512), peak(4, 256, 2048), peak(4, 1024, 2048)
    tokens, numbers = 4 * 768, 1536 * 16
    assert longer - base < 4 * tokens * 16 * 6  # several [B, T, D]
    assert wider - base < 4 * numbers * 4  # several [D, V]
    assert abs(both - longer - wider + base) < 4 * tokens * 1536 / 20


def test_chunks_do_not_become_more_with_the_mesh():
    """A shard's rows decide: 8 times the rows on 8 times the devices are as many chunks."""

    def rounds(B, shards):
        mesh = AbstractMesh((1, shards, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
        with jax.sharding.use_abstract_mesh(mesh):
            assert row_shards() == shards
            text = str(
                jax.make_jaxpr(lambda h, w, i: logprobs.token_logprobs(h, w, i, suppression_bias(96, 96, [])))(
                    jax.ShapeDtypeStruct((B, 1024, 8), "float32"),
                    jax.ShapeDtypeStruct((8, 96), "float32"),
                    jax.ShapeDtypeStruct((B, 1024), "int32"),
                )
            )
        return [int(n) for n in re.findall(r"length=(\d+)", text)]

    assert rounds(64, 8) == rounds(8, 1) == [2]
    assert rounds(64, 1) == [16]


def test_gathered_layouts_leave_only_the_heads_split():
    shardings = one_device(LARGE).shardings
    specs = {name: layout.spec for name, layout in gathered(shardings)["decoder"]["layers"]["attn"]["q"].items()}
    assert specs == {"kernel": PartitionSpec(None, None, "tensor"), "bias": PartitionSpec(None, "tensor")}
